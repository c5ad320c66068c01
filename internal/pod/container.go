package pod

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "runv/api/agent/v1"
	"runv/internal/agentclient"
	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/hostcgroup"
	"runv/internal/join"
	"runv/internal/journal"
	"runv/internal/mirror"
	"runv/internal/rpcerror"
	"runv/internal/standin"
	"runv/internal/state"
	"runv/internal/storage"
)

// Deadlines of what a caller or a stand-in owes the pod.
const (
	standInTimeout = 10 * time.Second // from the request to the stand-in's connection
	killTimeout    = 10 * time.Second // from SIGKILL to the end of a container
)

// initProcess is the key of a container's init among its processes, and its
// exec id in requests.
const initProcess = ""

// container is the pod's record of one. It belongs to the pod's goroutine.
type container struct {
	record    state.Container
	processes map[string]*process // by exec id
	exits     []string            // exec ids of exited processes, oldest first
	cancel    context.CancelCauseFunc
	op        chan struct{}         // closed at the end of the operation in flight; nil: none
	gone      chan struct{}         // closed when status is stopped
	resumed   chan struct{}         // closed when status is no longer paused
	inGuest   bool                  // the agent knows it
	unsaved   bool                  // the record on disk is older than this one
	forgotten chan struct{}         // closed when all of it is gone and its poststop hooks have run
	limits    *specs.LinuxResources // as updates have left them; may be nil
	// affinityCPUs is how many CPUs its execs name, as bundle.AffinityCPUs has it.
	affinityCPUs int
	environ      []string               // of hooks on the host that have none of their own
	oomScore     int                    // of init: the host's kernel is to know it, too
	cgroup       Cgroup                 // where the stand-in is: the pod's or one of its own; nil: not yet
	network      *podNetwork            // nil: it has none of the host's
	mirrors      map[int]*mirror.Mirror // of bind mounts, by index; fixed until leaveMirrors

	oomTold   chan struct{} // closed when the host's cgroup has told of an OOM; nil: there was none
	poststart *poststart    // nil: not begun, or no hooks
}

var errDeleted = rpcerror.New(errdefs.ErrAborted, "container is being deleted")

// CreateRequest asks for a container.
type CreateRequest struct {
	ID      string
	Bundle  string // absolute path
	StandIn standin.Token
	// NoNewKeyring leaves the container's processes the agent's session keyring.
	NoNewKeyring bool
	// Inherited is what init has of the caller; nil: nothing.
	Inherited *agentv1.Inherited
	// Environment is that of the hooks on the host that have none of their own.
	Environment []string
}

// Create makes a container up to the point where only the user's program is missing,
// and boots the VM if it is the first. It returns the stand-in's pid. All is undone
// when it fails or ctx ends.
func (p *Pod) Create(ctx context.Context, req CreateRequest) (int, error) {
	b, err := bundle.Load(req.Bundle)
	if err != nil {
		return 0, fmt.Errorf("create %s: %w", req.ID, err)
	}
	for _, w := range b.Warnings {
		p.log.Warn("bundle", "container", req.ID, "warning", w)
	}
	plan, err := p.findShared(ctx, req.ID, b)
	if err != nil {
		return 0, fmt.Errorf("create %s: %w", req.ID, err)
	}
	callerCtx := ctx // delete ends ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var c *container
	if err := p.do(ctx, func() (err error) { c, err = p.admitContainer(req, b, cancel); return err }); err != nil {
		return 0, fmt.Errorf("create %s: %w", req.ID, err)
	}
	pid, err := p.create(ctx, c, b, plan, req)
	if err != nil {
		err = fmt.Errorf("create %s: %w", req.ID, err)
		// The caller may be gone; the undoing has its own deadlines.
		if p.do(context.WithoutCancel(ctx), func() error { p.abandon(c, err); return nil }) == nil {
			_ = c.awaitForgotten(callerCtx)
		}
		if cause := p.whyEnded(); cause != nil { // err is a consequence then
			err = fmt.Errorf("create %s: %w", req.ID, cause)
		}
		return 0, err
	}
	return pid, nil
}

// whyEnded tells what the pod failed of, if it did: the death of its VM, a boot
// that went wrong.
func (p *Pod) whyEnded() (cause error) {
	if p.do(context.Background(), func() error { cause = p.failure; return nil }) != nil {
		<-p.ended
		cause = p.failure
	}
	return cause
}

// admitContainer adds the record of a new container. On the pod's goroutine.
func (p *Pod) admitContainer(req CreateRequest, b *bundle.Bundle, cancel context.CancelCauseFunc) (*container, error) {
	_, known := p.containers[req.ID]
	if err := admitCreate(p.state, req.ID, known); err != nil {
		if p.failure != nil {
			return nil, p.failure
		}
		return nil, err
	}
	record, err := p.cfg.Recorder.LoadContainer(req.ID)
	if err != nil {
		return nil, err
	}
	if record.PodID != p.ID() {
		return nil, rpcerror.New(errdefs.ErrFailedPrecondition, fmt.Sprintf("the id is reserved for pod %s", record.PodID))
	}
	record.Status = ""
	record.Bundle, record.Rootfs = b.Dir, b.Rootfs
	record.OCIVersion, record.Annotations = b.Spec.Version, b.Spec.Annotations
	record.Terminal = b.Spec.Process.Terminal
	c := &container{
		record:    record,
		processes: make(map[string]*process),
		cancel:    cancel,
		op:        make(chan struct{}),
		gone:      make(chan struct{}),
		forgotten: make(chan struct{}),
	}
	c.limits = b.Spec.Linux.Resources
	c.affinityCPUs = b.AffinityCPUs()
	c.environ = req.Environment
	c.oomScore = int(req.Inherited.GetOomScoreAdj())
	if score := b.Spec.Process.OOMScoreAdj; score != nil {
		c.oomScore = *score
	}
	if b.Spec.Hooks != nil {
		c.record.Hooks = *b.Spec.Hooks
	}
	p.containers[req.ID] = c
	p.pending++ // until created or forget
	p.setStatus(c, state.Creating)
	return c, nil
}

// create does the work of Create. What it acquired for the container is undone by abandon.
func (p *Pod) create(ctx context.Context, c *container, b *bundle.Bundle, plan join.Plan, req CreateRequest) (int, error) {
	began := time.Now()
	peer, err := p.awaitStandIn(ctx, req.StandIn)
	if err != nil {
		return 0, err
	}
	proc := newProcess(c, initProcess, peer)
	var record state.Container      // as hooks see it
	var first *hostcgroup.Container // nil: the pod has another, whose VM it shares
	if err := p.do(ctx, func() error {
		c.record.StandIn = proc.standIn
		record = c.record
		switch p.state {
		case Idle:
			s := p.sizeFor([]*specs.LinuxResources{c.limits}).withCPUs(c.affinityCPUs)
			first = &hostcgroup.Container{
				ID: req.ID, Path: b.Spec.Linux.CgroupsPath, Resources: b.Spec.Linux.Resources, VMMemory: s.memory,
			}
			p.startBoot(s, *first, proc.standIn.PID)
		case Stopping, Stopped:
			return errStopping
		}
		return p.addProcess(proc)
	}); err != nil {
		_ = peer.Close()
		peer.CloseStdio()
		return 0, err
	}
	if err := p.awaitShare(ctx); err != nil {
		return 0, err
	}
	if err := p.joinCgroup(c, b.Spec.Linux.CgroupsPath, proc.standIn.PID, first != nil); err != nil { // while the VM boots; hooks find it there
		return 0, err
	}
	net, firstThere, err := p.joinNetwork(ctx, c, b, proc.standIn.PID)
	if err != nil {
		return 0, err
	}
	mapping, err := p.addToShare(ctx, c, b)
	if err != nil {
		return 0, err
	}
	mounted := time.Now()
	if err := p.runCreateHooks(ctx, record, req.Environment); err != nil {
		return 0, err
	}
	hooked := time.Now()
	if net != nil {
		if err := p.connectUser(ctx, net, b); err != nil {
			return 0, err
		}
	}
	if firstThere {
		vmm, err := p.awaitVMM(ctx)
		if err != nil {
			return 0, err
		}
		// While the guest boots: what it finds then need not be plugged under its hands.
		if err := net.mirror.Prepare(ctx, vmm); err != nil {
			return 0, err
		}
	}
	vm, err := p.awaitBoot(ctx)
	if err != nil {
		return 0, err
	}
	if first == nil {
		if err := p.makeRoom(ctx, c, vm); err != nil {
			return 0, err
		}
	}
	booted := time.Now()
	if net != nil {
		if err := p.startNetwork(ctx, net, vm); err != nil {
			return 0, p.explain(err, vm)
		}
	}
	connected := time.Now()
	stdio, err := proc.openStreams(vm.Agent)
	if err != nil {
		return 0, p.explain(err, vm)
	}
	var namespaces map[specs.LinuxNamespaceType]string
	if err := p.do(ctx, func() (err error) {
		namespaces, err = p.shares(plan)
		c.inGuest = err == nil
		return err
	}); err != nil {
		return 0, err
	}
	if net != nil {
		namespaces[specs.NetworkNamespace] = "network:" + net.id
	}
	b.Made, b.HostReadOnly = mapping.Made, mapping.HostReadOnly
	p.startMirrors(ctx, c, vm, mapping)
	spec, err := b.GuestSpec(mapping.Root, mapping.Binds, namespaces)
	if err != nil {
		return 0, err
	}
	document, err := vm.Agent.Send(spec)
	if err != nil {
		return 0, p.explain(err, vm)
	}
	defer document.Close()
	create := &agentv1.CreateRequest{Id: req.ID, Spec: document.Inline, SpecStream: document.Stream, Stdio: stdio, Bundle: b.Dir, NoNewKeyring: req.NoNewKeyring, Inherited: req.Inherited}
	if f := b.Seccomp(); f != nil {
		create.Seccomp = &agentv1.Seccomp{Program: f.Program, Flags: f.Flags}
	}
	if _, err := vm.Agent.Containers.Create(ctx, create); err != nil {
		return 0, p.explain(agentclient.Error(err), vm)
	}
	if err := settleMirrors(ctx, c); err != nil {
		return 0, err
	}
	if net != nil {
		net.created.Store(true)
		if err := p.serveNames(ctx, net, vm); err != nil {
			return 0, p.explain(err, vm)
		}
	}
	if first != nil { // those of CPU time the boot did not have
		if err := p.setLimits(ctx); err != nil {
			return 0, err
		}
	}
	return proc.standIn.PID, p.do(ctx, func() error {
		if context.Cause(ctx) != nil {
			return context.Cause(ctx)
		}
		p.phase("mount "+req.ID, mounted.Sub(began))
		if h := record.Hooks; len(h.Prestart)+len(h.CreateRuntime) > 0 { //nolint:staticcheck // prestart is deprecated, and used
			p.phase("hooks "+req.ID, hooked.Sub(mounted))
		}
		if firstThere {
			p.phase("network "+net.id, connected.Sub(booted))
		}
		p.phase("create "+req.ID, time.Since(connected))
		p.created(c, proc)
		return nil
	})
}

func idMap(m *bundle.IDMap) *storage.IDMap {
	if m == nil {
		return nil
	}
	ranges := func(list []specs.LinuxIDMapping) (ids []storage.IDRange) {
		for _, r := range list {
			ids = append(ids, storage.IDRange{Inside: r.ContainerID, Outside: r.HostID, Size: r.Size})
		}
		return ids
	}
	return &storage.IDMap{UIDs: ranges(m.UIDs), GIDs: ranges(m.GIDs), Recursive: m.Recursive}
}

// addToShare makes the container's root and bind mounts visible to the VM.
func (p *Pod) addToShare(ctx context.Context, c *container, b *bundle.Bundle) (storage.Mapping, error) {
	binds := make(map[int]storage.Bind)
	for _, bind := range b.Binds() {
		binds[bind.Index] = storage.Bind{
			Source: bind.Source, Recursive: bind.Recursive, ReadOnly: bind.ReadOnly, ReadOnlyBelow: bind.ReadOnlyBelow, IDMap: idMap(bind.IDMap),
			Exclusive: bind.Exclusive || p.cfg.ExclusiveBinds,
		}
	}
	root := storage.Root{Path: b.Rootfs, ReadOnly: b.Spec.Root.Readonly}
	for _, point := range b.MountPoints() {
		root.MountPoints = append(root.MountPoints, storage.MountPoint(point))
	}
	m, err := p.cfg.Share.Add(ctx, c.record.ID, root, binds)
	if err != nil {
		return m, fmt.Errorf("mount: %w", err)
	}
	return m, p.addMirrors(ctx, c, b, m)
}

// joinCgroup puts a stand-in where callers watch its container: the stand-in of the pod's first container into the pod's cgroup, that of a
// further one into a cgroup of its own. If that cannot be made, for example because the caller names the same for two containers, the stand-in
// goes into the pod's cgroup.
func (p *Pod) joinCgroup(c *container, path string, standIn int, first bool) error {
	group := p.cfg.Cgroup
	if !first {
		own := p.cfg.NewCgroup()
		err := own.Add(c.record.ID, path, standIn, func(r hostcgroup.Record) {
			_ = p.do(context.Background(), func() error {
				c.record.Cgroup = r
				p.saveContainer(c)
				return nil
			})
		})
		if err == nil {
			group = own
		} else {
			p.log.Warn("the container is in the pod's cgroup", "container", c.record.ID, "why", err)
			defer p.removeCgroup(own)
		}
	}
	if group == p.cfg.Cgroup {
		if err := group.Join(standIn); err != nil {
			return err
		}
	}
	return p.do(context.Background(), func() error { c.cgroup = group; return nil })
}

// leaveCgroup removes the cgroup of a container that has ended, if it has one of its own.
func (p *Pod) leaveCgroup(c *container) {
	if c.cgroup != nil && c.cgroup != p.cfg.Cgroup {
		p.removeCgroup(c.cgroup)
	}
}

func (p *Pod) awaitStandIn(ctx context.Context, token standin.Token) (*standin.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, standInTimeout)
	defer cancel()
	return p.cfg.StandIns.Await(ctx, token)
}

// created moves a container on and begins its input and output. On the pod's goroutine.
func (p *Pod) created(c *container, proc *process) {
	p.setProcess(proc, ProcessCreated)
	p.setStatus(c, state.Created)
	p.pending--
	p.endOp(c)
	p.save()
	p.setScores()
	p.append(journal.Event{Type: journal.Create, Container: c.record.ID, PID: proc.standIn.PID})
	p.serve(proc)
}

// abandon undoes a failed Create. On the pod's goroutine.
func (p *Pod) abandon(c *container, err error) {
	p.log.Warn("create failed", "container", c.record.ID, "err", err)
	vm, inGuest := p.vm, c.inGuest
	for _, proc := range c.processes {
		p.dropProcess(proc)
	}
	if c.record.Status != state.Stopped { // it is when the VM has died
		p.setStatus(c, state.Stopped)
	}
	go func() {
		p.removeFromVM(vm, c, inGuest)
		p.leaveCgroup(c)
		p.post(func() { p.forget(c) })
	}()
	p.stopIfUnused()
}

// removeFromVM removes what the guest and the share hold of a container.
func (p *Pod) removeFromVM(vm *factory.VM, c *container, inGuest bool) {
	id := c.record.ID
	if vm != nil && inGuest {
		select {
		case <-p.stopped:
		case <-vm.Done():
		default:
			ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
			if _, err := vm.Agent.Containers.Delete(ctx, &agentv1.DeleteRequest{Id: id}); err != nil {
				select {
				case <-vm.Agent.Done(): // it went with the VM
				default:
					p.log.Warn("delete container in guest", "container", id, "err", err)
				}
			}
			cancel()
		}
	}
	p.leaveNetwork(c)
	p.leaveMirrors(c)
	if err := p.cfg.Share.Remove(id); err != nil {
		p.log.Error("remove from share", "container", id, "err", err)
	}
}

// setStatus moves a container to a status and records it. On the pod's goroutine.
func (p *Pod) setStatus(c *container, next state.Status) {
	if err := transition(containerNext, c.record.Status, next); err != nil {
		p.log.Error("container state", "container", c.record.ID, "err", err)
		return
	}
	p.log.Debug("container state", "container", c.record.ID, "from", c.record.Status, "to", next)
	if c.record.Status == state.Paused {
		close(c.resumed)
	}
	if next == state.Paused {
		c.resumed = make(chan struct{})
	}
	c.record.Status = next
	if next == state.Stopped {
		close(c.gone)
	}
	p.saveContainer(c)
}

// resaveInterval is the time between attempts to record what a full disk did not take.
const resaveInterval = time.Second

// saveContainer records a container on disk, later if need be. On the pod's goroutine.
func (p *Pod) saveContainer(c *container) {
	err := p.cfg.Recorder.SaveContainer(c.record)
	if err == nil || errdefs.IsNotFound(err) {
		c.unsaved = false
		return
	}
	if !c.unsaved {
		p.log.Error("save container", "container", c.record.ID, "err", err)
	}
	c.unsaved = true
	if p.resave == nil {
		p.resave = time.After(resaveInterval)
	}
}

// saveAgain tries what has failed before. On the pod's goroutine.
func (p *Pod) saveAgain() {
	p.resave = nil
	for _, c := range p.containers {
		if c.unsaved {
			p.saveContainer(c)
		}
	}
}

// find returns a container. On the pod's goroutine.
func (p *Pod) find(id string) (*container, error) {
	c, ok := p.containers[id]
	if !ok {
		return nil, rpcerror.New(errdefs.ErrNotFound, "container does not exist")
	}
	return c, nil
}

// inspect admits a verb that changes nothing in the pod's record of the container.
func (p *Pod) inspect(ctx context.Context, v verb, id string) (vm *factory.VM, err error) {
	err = p.do(ctx, func() error {
		c, err := p.find(id)
		if err != nil {
			return err
		}
		vm = p.vm
		return admit(v, id, c.record.Status)
	})
	return vm, err
}

// operate runs a verb that changes a container, one at a time for each: it admits the verb, calls
// the agent, and lets commit change the record on the pod's goroutine.
func (p *Pod) operate(ctx context.Context, v verb, id string, call func(ctx context.Context, vm *factory.VM) error, commit func(c *container)) error {
	// A caller who goes away does not end what the agent does: the record must tell how that ended.
	callCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var c *container
	var vm *factory.VM
	for c == nil {
		var busy chan struct{}
		err := p.do(ctx, func() error {
			found, err := p.find(id)
			if err != nil {
				return err
			}
			if err := admit(v, id, found.record.Status); err != nil {
				return err
			}
			if busy = found.op; busy == nil {
				c, vm = found, p.vm
				c.op, c.cancel = make(chan struct{}), cancel
			}
			return nil
		})
		if err != nil {
			return err
		}
		if busy != nil {
			select {
			case <-busy:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	err := p.explain(agentclient.Error(call(callCtx, vm)), vm)
	_ = p.do(context.WithoutCancel(ctx), func() error {
		if err == nil {
			commit(c)
		}
		p.endOp(c)
		return nil
	})
	return err
}

// endOp ends a container's operation in flight. On the pod's goroutine.
func (p *Pod) endOp(c *container) {
	if c.op != nil {
		close(c.op)
		c.op = nil
	}
	c.cancel = func(error) {}
}

// Start runs the user's program of a created container, and then its poststart hooks.
func (p *Pod) Start(ctx context.Context, id string) error {
	began := time.Now()
	hooksCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var run *poststart
	var started *container
	var record state.Container
	var env []string
	err := p.operate(ctx, verbStart, id, func(ctx context.Context, vm *factory.VM) error {
		p.syncMirrors(ctx, id)
		_, err := vm.Agent.Containers.Start(ctx, &agentv1.StartRequest{Id: id})
		return err
	}, func(c *container) {
		// The program may have ended already, and its event may have come first.
		if c.record.Status == state.Created {
			p.setStatus(c, state.Running)
		}
		proc := c.processes[initProcess]
		if proc.state == ProcessCreated {
			p.setProcess(proc, ProcessRunning)
		}
		p.phase("start "+id, time.Since(began))
		p.save()
		p.append(journal.Event{Type: journal.Start, Container: id, PID: proc.standIn.PID})
		if len(c.record.Hooks.Poststart) > 0 {
			run = &poststart{cancel: cancel, done: make(chan struct{})}
			c.poststart, started, record, env = run, c, c.record, c.environ
			p.pending++ // the program may be short, and the last
		}
	})
	if err == nil && run != nil {
		err = p.runPoststart(hooksCtx, started, run, record, env)
	}
	if err != nil {
		return fmt.Errorf("start %s: %w", id, err)
	}
	return nil
}

// Pause freezes a container that was created or runs.
func (p *Pod) Pause(ctx context.Context, id string) error {
	return p.operate(ctx, verbPause, id, func(ctx context.Context, vm *factory.VM) error {
		_, err := vm.Agent.Containers.Pause(ctx, &agentv1.PauseRequest{Id: id})
		return err
	}, func(c *container) {
		if c.record.Status == state.Created || c.record.Status == state.Running {
			p.setStatus(c, state.Paused)
			p.append(journal.Event{Type: journal.Paused, Container: id})
		}
	})
}

// Resume thaws a paused container, which then is what it was before.
func (p *Pod) Resume(ctx context.Context, id string) error {
	return p.operate(ctx, verbResume, id, func(ctx context.Context, vm *factory.VM) error {
		_, err := vm.Agent.Containers.Resume(ctx, &agentv1.ResumeRequest{Id: id})
		return err
	}, func(c *container) {
		if c.record.Status == state.Paused {
			was := state.Running
			if init := c.processes[""]; init != nil && init.state == ProcessCreated {
				was = state.Created
			}
			p.setStatus(c, was)
			p.append(journal.Event{Type: journal.Resumed, Container: id})
		}
	})
}

// State returns a container's record.
func (p *Pod) State(ctx context.Context, id string) (record state.Container, err error) {
	err = p.do(ctx, func() error {
		c, err := p.find(id)
		if err == nil {
			record = c.record
		}
		return err
	})
	return record, err
}

// Stats reads what a container uses in the guest, and what its VM takes on the host.
func (p *Pod) Stats(ctx context.Context, id string) (*agentv1.StatsResponse, hostcgroup.Stats, error) {
	var host hostcgroup.Stats
	vm, err := p.inspect(ctx, verbInspect, id)
	if err != nil {
		return nil, host, err
	}
	resp, err := vm.Agent.Containers.Stats(ctx, &agentv1.StatsRequest{Id: id})
	if err != nil {
		return nil, host, p.explain(agentclient.Error(err), vm)
	}
	host, err = p.cfg.Cgroup.Stats(append([]int{vm.Info().PID}, p.cfg.Share.Processes()...))
	return resp, host, err
}

// Processes lists what runs in a container.
func (p *Pod) Processes(ctx context.Context, id string) ([]*agentv1.Process, error) {
	vm, err := p.inspect(ctx, verbInspect, id)
	if err != nil {
		return nil, err
	}
	resp, err := vm.Agent.Containers.Processes(ctx, &agentv1.ProcessesRequest{Id: id})
	if err != nil {
		return nil, p.explain(agentclient.Error(err), vm)
	}
	return resp.Processes, nil
}

// Delete removes a container that is created or stopped, or with force any. When it was the
// last, it returns after the VM has gone. environment is that of the poststop hooks that have none of their own.
func (p *Pod) Delete(ctx context.Context, id string, force bool, environment []string) error {
	v := verbDelete
	if force {
		v = verbForceDelete
	}
	var c *container
	err := p.do(ctx, func() (err error) {
		if c, err = p.find(id); err != nil {
			return err
		}
		if err = admit(v, id, c.record.Status); err == nil {
			p.pending++ // the pod does not end with its last container before that is removed
			c.environ = environment
		}
		return err
	})
	if force && errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.post(func() { p.pending-- })
	if err := p.kill(ctx, c); err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return p.remove(ctx, c)
}

// kill ends a container with all its processes and returns when it is stopped.
// A guest that does not obey loses its VM.
func (p *Pod) kill(ctx context.Context, c *container) error {
	var vm *factory.VM
	var status state.Status
	err := p.do(ctx, func() error {
		vm, status = p.vm, c.record.Status
		if status == state.Creating {
			c.cancel(errDeleted)
		}
		return nil
	})
	if err != nil || status == state.Stopped {
		return err
	}
	deadline, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	if status != state.Creating {
		_, err = vm.Agent.Processes.Signal(deadline, &agentv1.SignalRequest{ContainerId: c.record.ID, Signal: 9, All: true})
		if err = agentclient.Error(err); err != nil && !errdefs.IsNotFound(err) {
			p.log.Warn("kill container", "container", c.record.ID, "err", err)
		}
	}
	select {
	case <-c.gone:
		return nil
	case <-deadline.Done():
	}
	p.log.Warn("container does not end, killing its VM", "container", c.record.ID)
	if err := p.do(context.WithoutCancel(ctx), func() error {
		p.fail(fmt.Errorf("container %s did not end %s after SIGKILL", c.record.ID, killTimeout))
		return nil
	}); err != nil {
		return err
	}
	select {
	case <-c.gone:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// remove removes a stopped container, after the operation that is in flight.
func (p *Pod) remove(ctx context.Context, c *container) error {
	if err := p.endPoststart(ctx, c); err != nil {
		return err
	}
	var vm *factory.VM
	var last, known bool
	for busy := c.gone; busy != nil; {
		select {
		case <-busy:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		err := p.do(ctx, func() error {
			if known = p.containers[c.record.ID] == c; !known {
				busy = nil
				return nil // somebody else has removed it
			}
			if busy = c.op; busy != nil {
				return nil
			}
			p.pending++
			c.op = make(chan struct{})
			vm, last = p.vm, !p.live()
			for _, proc := range c.processes {
				proc.discard()
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if !known {
		return c.awaitForgotten(ctx)
	}
	var err error
	if last {
		// The VM goes as a whole; taking it apart piece by piece would only take longer.
		err = p.awaitStopped(ctx)
	} else {
		p.removeFromVM(vm, c, c.inGuest)
	}
	p.leaveCgroup(c)
	return errors.Join(err, p.do(context.WithoutCancel(ctx), func() error {
		p.append(journal.Event{Type: journal.Delete, Container: c.record.ID})
		p.forget(c)
		return nil
	}), c.awaitForgotten(ctx))
}
