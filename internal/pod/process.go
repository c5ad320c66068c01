package pod

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	agentv1 "runv/api/agent/v1"
	"runv/internal/agentclient"
	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/journal"
	"runv/internal/rpcerror"
	"runv/internal/standin"
	"runv/internal/state"
	"runv/internal/stdio"
)

const (
	// drainTimeout bounds the wait for the output of a process that has exited,
	// between the guest and this process: an agent that is alive needs milliseconds.
	drainTimeout = 30 * time.Second
	// stallTimeout is how long the news of an exit wait for a caller who does not read the
	// output. The output is not lost then: it is delivered when he does.
	stallTimeout = time.Second
	// keepExits is how many exited processes of a container can still be waited for.
	keepExits = 256
	// maxStarting is how many execs are with the agent at once. Their streams reach it before the
	// calls that name them; it holds 64 of those and drops the rest, which nobody would then find.
	maxStarting = 16
)

// process is the pod's record of a process in the guest. It belongs to the
// pod's goroutine, save what is said to be fixed.
type process struct {
	c       *container      // fixed
	execID  string          // fixed
	peer    *standin.Peer   // fixed
	standIn state.Process   // fixed
	outputs []*stdio.Output // stdout, stderr; fixed after openStreams
	input   *stdio.Input    // nil: none; fixed after openStreams
	ctx     context.Context // of the pumps
	pumps   sync.WaitGroup  // of outputs
	discard func()          // ends the pumps and loses what they hold

	state    ProcessState
	starting chan struct{} // closed when Exec knows how it went; nil for init
	exiting  bool          // its exit is known, its output may be on its way
	status   uint32
	exitedAt time.Time
	counts   []uint64 // bytes of output that the agent has sent

	drained   chan struct{} // closed when counts is set, or will not be
	exited    chan struct{} // closed when state is exited
	delivered chan struct{} // closed when the caller has all output, or it was discarded
}

func newProcess(c *container, execID string, peer *standin.Peer) *process {
	ctx, cancel := context.WithCancel(context.Background())
	proc := &process{
		c: c, execID: execID, peer: peer, ctx: ctx, discard: cancel,
		drained: make(chan struct{}), exited: make(chan struct{}), delivered: make(chan struct{}),
	}
	// A stand-in that has died already has no start time; its pid says enough.
	proc.standIn, _ = state.ProcessOf(peer.PID)
	return proc
}

// addProcess records a new process. On the pod's goroutine.
func (p *Pod) addProcess(proc *process) error {
	if _, ok := proc.c.processes[proc.execID]; ok {
		return rpcerror.New(errdefs.ErrAlreadyExists, fmt.Sprintf("exec id %s exists already", proc.execID))
	}
	proc.c.processes[proc.execID] = proc
	p.setProcess(proc, ProcessCreating)
	return nil
}

// setProcess moves a process to a state. On the pod's goroutine.
func (p *Pod) setProcess(proc *process, next ProcessState) {
	if err := transition(processNext, proc.state, next); err != nil {
		p.log.Error("process state", "container", proc.c.record.ID, "exec", proc.execID, "err", err)
		return
	}
	proc.state = next
}

// openStreams opens a stream for each of the caller's files and lets output flow. Input
// is not touched before the process is there; see serve.
func (proc *process) openStreams(agent *agentclient.Client) (*agentv1.Stdio, error) {
	ids := &agentv1.Stdio{PlainNewlines: proc.peer.Terminal && proc.peer.Foreground}
	if err := proc.openInput(agent, ids); err != nil {
		return nil, fmt.Errorf("open stdin: %w", err)
	}
	for fd, out := range []struct {
		name string
		file *os.File
		id   *uint32
	}{{}, {"stdout", proc.peer.Stdout, &ids.Stdout}, {"stderr", proc.peer.Stderr, &ids.Stderr}} {
		if out.file == nil {
			continue
		}
		sink, err := stdio.NewSink(out.file)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", out.name, err)
		}
		if streamless, faulty := proc.hasInstead(sink.IsNull(), sink.Fault()); streamless {
			_ = sink.Close()
			if faulty {
				ids.Faulty |= 1 << fd
			}
			continue
		}
		st, err := agent.OpenStream()
		if err != nil {
			_ = sink.Close()
			return nil, err
		}
		*out.id = st.StreamID()
		output := stdio.NewOutput(sink, 0)
		proc.outputs = append(proc.outputs, output)
		go func() {
			// On the host a process that writes to a pipe without a reader gets
			// SIGPIPE. Closing the stream makes the agent do the same to this one.
			select {
			case <-output.Broken():
				_ = st.Close()
			case <-proc.ctx.Done():
			}
		}()
		proc.pumps.Go(func() {
			_ = output.Run(proc.ctx, st)
			_ = st.Close()
		})
	}
	return ids, nil
}

// openInput is openStreams for the standard input.
func (proc *process) openInput(agent *agentclient.Client, ids *agentv1.Stdio) error {
	if proc.peer.Stdin == nil {
		return nil
	}
	src, err := stdio.NewSource(proc.peer.Stdin)
	if err != nil {
		return err
	}
	if streamless, faulty := proc.hasInstead(src.IsNull(), src.Fault()); streamless {
		if faulty {
			ids.Faulty |= 1 << 0
		}
		return src.Close()
	}
	st, err := agent.OpenStream()
	if err != nil {
		_ = src.Close()
		return err
	}
	ids.Stdin = st.StreamID()
	proc.input = stdio.NewInput(src, st)
	return nil
}

// hasInstead tells whether the process has the guest's /dev/null instead of a stream to a caller's file, and whether
// its calls must fail, as on one machine. A caller who stays in the foreground copies between his
// files and pipes under runc, so there the process sees nothing of what they are; nor does it on a terminal.
func (proc *process) hasInstead(null bool, fault error) (streamless, faulty bool) {
	switch {
	case proc.peer.Foreground || proc.peer.Terminal:
		return false, false
	case null && proc.execID == initProcess: // runc opens it anew, for both directions
		return true, false
	}
	return null || fault != nil, fault != nil
}

// serve lets input flow and obeys the stand-in until the process's end. On the pod's goroutine.
func (p *Pod) serve(proc *process) {
	if proc.input != nil {
		go func() { _ = proc.input.Run(proc.ctx) }()
	}
	go func() {
		id := proc.c.record.ID
		err := proc.peer.Serve(proc.ctx, func(n int) {
			if err := p.Signal(proc.ctx, id, proc.execID, uint32(n), false); err != nil {
				p.log.Debug("forward signal", "container", id, "exec", proc.execID, "signal", n, "err", err)
			}
		}, func(width, height uint32) {
			if err := p.Resize(proc.ctx, id, proc.execID, width, height); err != nil {
				p.log.Debug("forward size", "container", id, "exec", proc.execID, "err", err)
			}
		})
		select {
		case <-proc.exited:
			return
		default:
		}
		p.log.Debug("stand-in has gone, killing its process", "container", id, "exec", proc.execID, "err", err)
		ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
		defer cancel()
		if err := p.Signal(ctx, id, proc.execID, 9, false); err != nil && !errors.Is(err, ErrEnded) {
			p.log.Debug("kill process without stand-in", "container", id, "exec", proc.execID, "err", err)
		}
	}()
}

// ExecRequest asks for a process in a container.
type ExecRequest struct {
	Container string
	ExecID    string // empty: chosen
	Process   []byte // OCI process as JSON
	StandIn   standin.Token
	Cgroup    string // an existing one below the container's; empty: that
	// IgnorePaused waits for the container's resumption, should it be paused.
	IgnorePaused bool
	Inherited    *agentv1.Inherited // what the process has of the caller; nil: nothing
}

// Exec starts a process in a container and returns its exec id and the pid of
// its stand-in.
func (p *Pod) Exec(ctx context.Context, req ExecRequest) (execID string, pid int, err error) {
	parsed, err := bundle.ParseProcess(req.Process)
	if err != nil {
		return "", 0, err
	}
	process, err := bundle.GuestProcess(parsed)
	if err != nil {
		return "", 0, err
	}
	if req.ExecID == "" {
		var id [8]byte
		if _, err := rand.Read(id[:]); err != nil {
			return "", 0, fmt.Errorf("choose exec id: %w", err)
		}
		req.ExecID = hex.EncodeToString(id[:])
	} else if err := bundle.ValidateID(req.ExecID); err != nil {
		return "", 0, err
	}
	if !req.IgnorePaused { // else the answer may change until then
		if _, err := p.inspect(ctx, verbExec, req.Container); err != nil {
			return "", 0, err
		}
	}
	peer, err := p.awaitStandIn(ctx, req.StandIn)
	if err != nil {
		return "", 0, err
	}
	proc, vm, err := p.admitProcess(ctx, req, peer)
	if err != nil {
		_ = peer.Close()
		peer.CloseStdio()
		return "", 0, err
	}
	if err := p.execInGuest(ctx, vm, proc, process, req); err != nil {
		err = p.explain(err, vm)
		_ = p.do(context.WithoutCancel(ctx), func() error { p.dropProcess(proc); return nil })
		return "", 0, err
	}
	err = p.do(context.WithoutCancel(ctx), func() error {
		if proc.state == ProcessCreating {
			p.setProcess(proc, ProcessRunning)
		}
		p.append(journal.Event{Type: journal.ExecStarted, Container: req.Container, Exec: req.ExecID, PID: peer.PID})
		p.serve(proc)
		proc.begun()
		return nil
	})
	return req.ExecID, peer.PID, err
}

// execInGuest lets the agent start a process. A caller who goes away does not end that: what the
// agent has begun it finishes, and then the end of the caller's stand-in ends the process.
func (p *Pod) execInGuest(ctx context.Context, vm *factory.VM, proc *process, spec []byte, req ExecRequest) error {
	select {
	case p.starting <- struct{}{}:
		defer func() { <-p.starting }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.syncMirrors(ctx, proc.c.record.ID)
	stdio, err := proc.openStreams(vm.Agent)
	if err != nil {
		return err
	}
	document, err := vm.Agent.Send(spec)
	if err != nil {
		return err
	}
	defer document.Close()
	_, err = vm.Agent.Processes.Exec(context.WithoutCancel(ctx), &agentv1.ExecRequest{
		ContainerId: proc.c.record.ID, ExecId: proc.execID, Process: document.Inline, ProcessStream: document.Stream, Stdio: stdio, Cgroup: req.Cgroup,
		Inherited: req.Inherited,
	})
	return agentclient.Error(err)
}

// admitProcess records the process that an Exec is about to start. It waits for the end of a pause
// that the request ignores.
func (p *Pod) admitProcess(ctx context.Context, req ExecRequest, peer *standin.Peer) (proc *process, vm *factory.VM, err error) {
	for {
		var resumed chan struct{}
		proc, vm, resumed, err = p.tryProcess(ctx, req, peer)
		if resumed == nil {
			return proc, vm, err
		}
		select {
		case <-resumed:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

// tryProcess is one attempt of admitProcess. With resumed the container is paused, and a next one
// makes sense when that is closed.
func (p *Pod) tryProcess(ctx context.Context, req ExecRequest, peer *standin.Peer) (proc *process, vm *factory.VM, resumed chan struct{}, err error) {
	err = p.do(ctx, func() error {
		c, err := p.find(req.Container)
		if err != nil {
			return err
		}
		if req.IgnorePaused && c.record.Status == state.Paused {
			resumed = c.resumed
			return nil
		}
		if err := admit(verbExec, req.Container, c.record.Status); err != nil {
			return err
		}
		vm = p.vm
		proc = newProcess(c, req.ExecID, peer)
		proc.starting = make(chan struct{})
		if err := p.addProcess(proc); err != nil {
			return err
		}
		p.append(journal.Event{Type: journal.ExecAdded, Container: req.Container, Exec: req.ExecID, PID: peer.PID})
		return nil
	})
	return proc, vm, resumed, err
}

// dropProcess ends the record of a process that did not come to be. On the pod's goroutine.
func (p *Pod) dropProcess(proc *process) {
	proc.discard()
	_ = proc.peer.Close()
	proc.peer.CloseStdio() // what no stream has taken over
	proc.begun()
	if proc.exiting || proc.state == ProcessExited {
		return // conclude tells its end
	}
	p.setProcess(proc, ProcessExited)
	close(proc.exited)
	close(proc.delivered)
	delete(proc.c.processes, proc.execID)
}

// begun tells that the start of a process is over, well or not. On the pod's goroutine.
func (proc *process) begun() {
	if proc.starting != nil {
		close(proc.starting)
		proc.starting = nil
	}
}

// watchEvents takes what the agent tells until the VM's end.
func (p *Pod) watchEvents(vm *factory.VM) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-vm.Done():
		case <-p.ended:
		}
		cancel()
	}()
	stream, err := vm.Agent.Guest.Events(ctx, &agentv1.EventsRequest{})
	if err != nil {
		err = fmt.Errorf("follow the agent's events: %w", p.explain(agentclient.Error(err), vm))
		p.post(func() { p.fail(err) })
		return
	}
	for next := uint64(1); ; next++ {
		ev, err := stream.Recv()
		if err != nil {
			return // watchVM tells why
		}
		if ev.Seq != next {
			p.post(func() { p.fail(fmt.Errorf("the agent's event %d came when %d was due", ev.Seq, next)) })
			return
		}
		p.post(func() { p.agentEvent(ev) })
	}
}

// agentEvent acts on what the agent tells. The guest may tell anything: what
// names no process of ours is ignored. On the pod's goroutine.
func (p *Pod) agentEvent(ev *agentv1.Event) {
	c, ok := p.containers[ev.ContainerId]
	if !ok {
		return
	}
	switch kind := ev.Kind.(type) {
	case *agentv1.Event_Exit:
		if proc, ok := c.processes[ev.ExecId]; ok {
			p.exited(proc, kind.Exit.GetStatus()&0xff, time.Now())
		}
	case *agentv1.Event_Drained:
		if proc, ok := c.processes[ev.ExecId]; ok {
			p.drained(proc, []uint64{kind.Drained.GetStdoutBytes(), kind.Drained.GetStderrBytes()})
		}
	case *agentv1.Event_Oom:
		p.append(journal.Event{Type: journal.OOM, Container: ev.ContainerId})
		p.tellOOM(c)
	}
}

// tellOOM lets those who watch a container's cgroup on the host see, once, that memory ran out in the guest. If another
// container is in the same cgroup, its watchers would believe it of theirs, so nobody is told. On the pod's goroutine.
func (p *Pod) tellOOM(c *container) {
	if c.cgroup == nil || c.oomTold != nil {
		return
	}
	for _, other := range p.containers {
		if other != c && other.cgroup == c.cgroup {
			return
		}
	}
	group := c.cgroup
	told := make(chan struct{})
	c.oomTold = told
	go func() {
		defer close(told)
		if err := group.TellOOM(); err != nil {
			p.log.Warn("oom", "container", c.record.ID, "err", err)
		}
	}()
}

// exited is told when a process has ended. On the pod's goroutine.
func (p *Pod) exited(proc *process, status uint32, at time.Time) {
	if proc.exiting || proc.state == ProcessExited {
		return
	}
	proc.exiting, proc.status, proc.exitedAt = true, status, at
	for _, out := range proc.outputs {
		out.Lift()
	}
	p.pending++
	// The news of a start goes before the news of an exit.
	starting := proc.starting
	if proc.execID == initProcess {
		starting = proc.c.op
	}
	go p.conclude(proc, starting, proc.c.oomTold)
}

// drained is told when the agent has sent all output of a process; without
// counts all that will come has come. On the pod's goroutine.
func (p *Pod) drained(proc *process, counts []uint64) {
	select {
	case <-proc.drained:
	default:
		proc.counts = counts
		close(proc.drained)
	}
}

// conclude waits for the output of a process that has exited, and then tells its end, after what
// oomTold, if not nil, tells.
func (p *Pod) conclude(proc *process, starting, oomTold <-chan struct{}) {
	if starting != nil {
		<-starting // calls to the agent have deadlines
	}
	ctx, cancel := context.WithTimeout(proc.ctx, drainTimeout)
	select {
	case <-proc.drained:
		for i, out := range proc.outputs {
			if i < len(proc.counts) {
				_ = out.WaitReceived(ctx, proc.counts[i])
			}
		}
	case <-ctx.Done():
	}
	cancel()
	if proc.input != nil {
		_ = proc.input.Close()
	}
	p.post(func() { p.concluded(proc) })

	go func() {
		defer close(proc.delivered)
		for _, out := range proc.outputs {
			_ = out.Flushed(proc.ctx)
		}
	}()
	stall := time.NewTimer(stallTimeout)
	defer stall.Stop()
	select {
	case <-proc.delivered:
	case <-stall.C:
	}
	p.post(func() {
		p.append(journal.Event{
			Type: journal.Exit, Container: proc.c.record.ID, Exec: proc.execID,
			PID: proc.standIn.PID, Status: proc.status, Time: proc.exitedAt,
		})
	})
	if oomTold != nil {
		<-oomTold
	}
	_ = proc.peer.Exit(proc.status)
	<-proc.delivered
	_ = proc.peer.Close()
	p.post(func() { p.pending-- })
	// Processes that it has left in the background may hold its pipes: what they write still
	// reaches the caller, as on one machine. A terminal ends with its process.
	if !proc.peer.Terminal {
		proc.pumps.Wait() // their streams end with the VM at the latest
	}
	proc.discard()
}

// concluded moves a process, and with init its container, to its last state. On the pod's
// goroutine.
func (p *Pod) concluded(proc *process) {
	c := proc.c
	p.setProcess(proc, ProcessExited)
	defer close(proc.exited) // who waits for it may look at the record at once
	if proc.execID == initProcess {
		c.record.ExitStatus, c.record.ExitedAt = &proc.status, &proc.exitedAt
		if c.record.Status != state.Stopped { // it is when its creation was abandoned
			p.setStatus(c, state.Stopped)
		}
		p.stopIfUnused()
		return
	}
	c.exits = append(c.exits, proc.execID)
	if len(c.exits) > keepExits {
		delete(c.processes, c.exits[0])
		c.exits = c.exits[1:]
	}
}

// findProcess returns a process. On the pod's goroutine.
func (p *Pod) findProcess(id, execID string) (*process, error) {
	c, err := p.find(id)
	if err != nil {
		return nil, err
	}
	proc, ok := c.processes[execID]
	if !ok {
		return nil, rpcerror.New(errdefs.ErrNotFound, fmt.Sprintf("process %s of container %s does not exist", execID, id))
	}
	return proc, nil
}

// errNotRunning is the answer to a signal that comes too late, in runc's words.
var errNotRunning = rpcerror.New(errdefs.ErrFailedPrecondition, "container not running")

// Signal sends a signal to a process, or to all of its container.
func (p *Pod) Signal(ctx context.Context, id, execID string, signal uint32, all bool) error {
	if signal > 64 {
		return rpcerror.New(errdefs.ErrInvalidArgument, fmt.Sprintf("signal %d is none", signal))
	}
	var vm *factory.VM
	err := p.do(ctx, func() error {
		proc, err := p.findProcess(id, execID)
		if err != nil {
			return err
		}
		vm = p.vm
		if proc.exiting || proc.state == ProcessExited {
			return errNotRunning
		}
		return admit(verbSignal, id, proc.c.record.Status)
	})
	if err != nil {
		return err
	}
	_, err = vm.Agent.Processes.Signal(ctx, &agentv1.SignalRequest{ContainerId: id, ExecId: execID, Signal: signal, All: all})
	err = agentclient.Error(err)
	if errdefs.IsNotFound(err) {
		return errNotRunning
	}
	return p.explain(err, vm)
}

// Resize sets the size of a process's terminal, in characters.
func (p *Pod) Resize(ctx context.Context, id, execID string, width, height uint32) error {
	var vm *factory.VM
	err := p.do(ctx, func() error {
		proc, err := p.findProcess(id, execID)
		if err != nil {
			return err
		}
		vm = p.vm
		if proc.exiting || proc.state == ProcessExited {
			return errNotRunning
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = vm.Agent.Processes.Resize(ctx, &agentv1.ResizeRequest{ContainerId: id, ExecId: execID, Width: width, Height: height})
	return p.explain(agentclient.Error(err), vm)
}

// CloseStdin ends a process's standard input after what was sent.
func (p *Pod) CloseStdin(ctx context.Context, id, execID string) error {
	return p.do(ctx, func() error {
		proc, err := p.findProcess(id, execID)
		if err == nil && proc.input != nil {
			return proc.input.Close()
		}
		return err
	})
}

// Wait blocks until a process has exited and the caller has all its output, and
// tells its status and the time of its end.
func (p *Pod) Wait(ctx context.Context, id, execID string) (status uint32, at time.Time, err error) {
	var proc *process
	if err := p.do(ctx, func() (err error) { proc, err = p.findProcess(id, execID); return err }); err != nil {
		return 0, at, err
	}
	for _, ch := range []chan struct{}{proc.exited, proc.delivered} {
		select {
		case <-ch:
		case <-ctx.Done():
			return 0, at, context.Cause(ctx)
		}
	}
	return proc.status, proc.exitedAt, nil // fixed now
}
