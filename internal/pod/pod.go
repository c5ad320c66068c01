package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/factory"
	"runv/internal/hostcgroup"
	"runv/internal/hypervisor"
	"runv/internal/journal"
	"runv/internal/mirror"
	"runv/internal/network"
	"runv/internal/rpcerror"
	"runv/internal/standin"
	"runv/internal/state"
	"runv/internal/storage"
)

// vmFactory is where the pod gets its VM; factory.Direct is one.
type vmFactory interface {
	Get(ctx context.Context, cfg hypervisor.Config, started func(hypervisor.VM)) (*factory.VM, error)
}

// share is the directory that the VM sees; storage.Share is one.
type share interface {
	Start(ctx context.Context) error
	Socket() string
	Add(ctx context.Context, containerID string, root storage.Root, binds map[int]storage.Bind) (storage.Mapping, error)
	Remove(containerID string) error
	Processes() []int
	LockWaits() <-chan []int
	InterruptWaits(threads []int) error
	Done() <-chan struct{}
	Err() error
	Close(ctx context.Context) error
}

// recorder keeps what must survive the supervisor; state.Store is one.
type recorder interface {
	LoadContainer(id string) (state.Container, error)
	SaveContainer(c state.Container) error
	RemoveContainer(id string) (*state.Container, error)
	SavePod(p state.Pod) error
}

// standIns gives the stand-ins that connect; standin.Listener is one.
type standIns interface {
	Await(ctx context.Context, token standin.Token) (*standin.Peer, error)
}

// Cgroup is a cgroup on the host; hostcgroup.Group is one.
type Cgroup interface {
	Create(c hostcgroup.Container, pid int, save func(hostcgroup.Record)) error
	Add(id, path string, pid int, save func(hostcgroup.Record)) error
	Join(pid int) error
	Limit(r *specs.LinuxResources, vmMemory int64) error
	Stats(vm []int) (hostcgroup.Stats, error)
	OOM() string
	TellOOM() error
	Remove(ctx context.Context) error
}

// Config describes a pod. All fields are needed.
type Config struct {
	Record        state.Pod         // as created; the pod fills in the rest
	VM            hypervisor.Config // all but the size and the shares
	DefaultVCPUs  int
	DefaultMemory int64 // bytes
	IdleTimeout   time.Duration

	Factory vmFactory
	Share   share
	// ExclusiveBinds says that nobody but the pod's VM changes the files of bind mounts.
	ExclusiveBinds bool
	Cgroup         Cgroup        // the pod's, which is that of its first container
	NewCgroup      func() Cgroup // for each further container
	Recorder       recorder
	StandIns       standIns
	Journal        *journal.Journal
	OnHost         func(f func() error) error // runs f on a thread with the file system of the host
	// Mirror makes what mirrors a network namespace of the host in the guest, as the network with this id;
	// it calls save before it does what must be undone if this process is killed.
	Mirror func(id string, ns *network.Namespace, vcpus int, save func(network.Record) error) Mirror
	// UserNetwork connects a new network namespace that nobody has put an interface into; nil: it stays alone. The
	// result is closed with the network.
	UserNetwork func(ctx context.Context, ns *network.Namespace) (io.Closer, error)
	// Mirrors has small read-only binds in the guest's memory; the pod closes it. nil: all come over the share.
	Mirrors *mirror.Set
	Log     *slog.Logger
}

// Pod is one VM and all that lives in it. Its exported methods are safe for
// concurrent use; they block until the deed is done.
type Pod struct {
	cfg    Config
	log    *slog.Logger
	inputs chan func()
	ended  chan struct{} // closed when Run has returned
	boot   boot
	// starting has a place for each exec that is with the agent.
	starting chan struct{}
	sizer    chan struct{} // has a place for who changes the VM's size or the pod's limits

	// What follows belongs to the goroutine of Run.
	state      State
	record     state.Pod
	containers map[string]*container
	networks   []*podNetwork
	leaving    []*podNetwork // dropped, with what they have made in their namespaces still recorded
	lastNet    int           // number of the newest network
	vm         *factory.VM
	failure    error            // why the VM ended, if nobody asked it to
	pending    int              // ends that are still to be told, records still to be removed
	resave     <-chan time.Time // when to save again; nil: all is saved
	stopped    chan struct{}    // closed when state is Stopped
}

// New makes a pod that Run drives. It starts nothing.
func New(cfg Config) *Pod {
	return &Pod{
		cfg:        cfg,
		log:        cfg.Log,
		inputs:     make(chan func()),
		ended:      make(chan struct{}),
		boot:       boot{done: make(chan struct{})},
		starting:   make(chan struct{}, maxStarting),
		sizer:      make(chan struct{}, 1),
		state:      Idle,
		record:     cfg.Record,
		containers: make(map[string]*container),
		stopped:    make(chan struct{}),
	}
}

// Run owns the pod: it alone reads and writes its state, one input after the
// other. It returns when the VM has gone, every process's end was told and its output
// delivered. When ctx ends it shuts the pod down first.
func (p *Pod) Run(ctx context.Context) error {
	defer close(p.ended)
	idle := time.NewTimer(p.cfg.IdleTimeout)
	defer idle.Stop()
	cancelled := ctx.Done()
	for p.state != Stopped || p.pending > 0 {
		select {
		case input := <-p.inputs:
			input()
		case <-idle.C:
			if p.state == Idle && len(p.containers) == 0 {
				p.log.Warn("nobody asked for a container", "timeout", p.cfg.IdleTimeout)
				p.stop("idle")
			}
		case <-p.resave:
			p.saveAgain()
		case <-cancelled:
			cancelled = nil
			p.endHooks()
			p.stop("supervisor is told to end")
		}
	}
	p.closeMirrors()            // also of a pod that had no VM
	if len(p.containers) == 0 { // else the cgroup is removed with the last record of one, as under runc
		p.removeCgroup(p.cfg.Cgroup)
	}
	return p.failure
}

// cgroupTimeout bounds the wait for the stand-in's end.
const cgroupTimeout = 2 * time.Second

// removeCgroup removes a cgroup, as far as it was made.
func (p *Pod) removeCgroup(g Cgroup) {
	ctx, cancel := context.WithTimeout(context.Background(), cgroupTimeout)
	defer cancel()
	if err := g.Remove(ctx); err != nil {
		p.log.Warn("leave", "err", err) // the pod's record is on disk
	}
}

// ErrEnded is the answer to requests that come when the pod has ended.
var ErrEnded = rpcerror.New(errdefs.ErrUnavailable, "pod has ended")

// do runs fn on the pod's goroutine and returns its error. fn must not block.
func (p *Pod) do(ctx context.Context, fn func() error) error {
	done := make(chan error, 1)
	select {
	case p.inputs <- func() { done <- fn() }:
		return <-done
	case <-p.ended:
		return ErrEnded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// post runs fn on the pod's goroutine unless the pod has ended. It must not
// be called on that goroutine.
func (p *Pod) post(fn func()) {
	select {
	case p.inputs <- fn:
	case <-p.ended:
	}
}

// to moves the pod to a state. On the pod's goroutine.
func (p *Pod) to(next State, cause string) {
	if err := transition(podNext, p.state, next); err != nil {
		p.log.Error("pod state", "err", err, "cause", cause)
		return
	}
	p.log.Info("pod state", "from", p.state, "to", next, "cause", cause)
	p.state = next
	if next == Stopped {
		close(p.stopped)
	}
}

// live tells whether a container keeps the VM alive. On the pod's goroutine.
func (p *Pod) live() bool {
	for _, c := range p.containers {
		if c.record.Status != state.Stopped {
			return true
		}
	}
	return false
}

// append records an event; a full disk must not stop the pod.
func (p *Pod) append(ev journal.Event) {
	if err := p.cfg.Journal.Append(ev); err != nil {
		p.log.Error("record event", "type", ev.Type, "err", err)
	}
}

// save records the pod on disk.
func (p *Pod) save() {
	if err := p.cfg.Recorder.SavePod(p.record); err != nil {
		p.log.Error("save pod", "err", err)
	}
}

// phase adds a timed step to the record of the pod's start. On the pod's goroutine.
func (p *Pod) phase(name string, d time.Duration) {
	if len(p.record.Phases) < state.MaxPhases {
		p.record.Phases = append(p.record.Phases, state.Phase{Name: name, Duration: d})
	}
}

// dropPhases forgets the steps of a container that is removed: others come. On the pod's goroutine.
func (p *Pod) dropPhases(id string) {
	p.record.Phases = slices.DeleteFunc(p.record.Phases, func(ph state.Phase) bool { return strings.HasSuffix(ph.Name, " "+id) })
}

// Shutdown kills all containers, ends the VM and returns when it has gone.
func (p *Pod) Shutdown(ctx context.Context) error {
	err := p.do(ctx, func() error {
		p.endHooks()
		p.stop("shutdown was asked for")
		return nil
	})
	if errors.Is(err, ErrEnded) {
		return nil
	}
	if err != nil {
		return err
	}
	return p.awaitStopped(ctx)
}

func (p *Pod) awaitStopped(ctx context.Context) error {
	select {
	case <-p.stopped:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the VM's end: %w", context.Cause(ctx))
	}
}

// ID is the pod's.
func (p *Pod) ID() string { return p.cfg.Record.ID }

// Follow tells events; see journal.Journal.Follow.
func (p *Pod) Follow(ctx context.Context, after uint64, wait bool, fn func(journal.Event) error) error {
	return p.cfg.Journal.Follow(ctx, after, wait, fn)
}

// stopIfUnused begins the VM's shutdown when no container needs it. On the pod's goroutine.
func (p *Pod) stopIfUnused() {
	if !p.live() {
		p.stop("no container is left")
	}
}

// Deadlines of the shutdown's steps. Under load a guest without KVM may take seconds to sync.
const (
	shutdownTimeout = 10 * time.Second
	stopTimeout     = 5 * time.Second
	closeTimeout    = 5 * time.Second
)

// stop begins the shutdown of the VM, once. On the pod's goroutine.
func (p *Pod) stop(cause string) {
	if p.state == Stopping || p.state == Stopped {
		return
	}
	booted := p.state != Idle
	p.to(Stopping, cause)
	for _, c := range p.containers {
		c.cancel(errStopping)
	}
	graceful := p.failure == nil
	go func() {
		if booted {
			p.boot.cancel(errStopping)
			<-p.boot.done
			p.dismantle(graceful)
		}
		p.post(func() {
			p.endAll()
			p.to(Stopped, cause)
		})
	}()
}

var errStopping = rpcerror.New(errdefs.ErrFailedPrecondition, "pod is stopping")

// dismantle undoes the boot, in reverse order. The agent gets a chance to write
// back what the guest holds unless the VM has failed.
func (p *Pod) dismantle(graceful bool) {
	if vm := p.boot.vm; vm != nil {
		if graceful {
			ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
			go func() { // a guest that has lost its root file system only seems to work
				select {
				case <-p.cfg.Share.Done():
					cancel()
				case <-ctx.Done():
				}
			}()
			if err := shutdownGuest(ctx, vm); err != nil {
				p.log.Warn("shut down guest", "err", err)
			}
			cancel()
		}
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		if err := vm.Stop(ctx); err != nil {
			p.log.Warn("stop VM", "err", err)
		}
		cancel()
		_ = vm.Agent.Close()
		<-vm.Done()
	}
	p.closeNetworks()
	p.closeMirrors()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := p.cfg.Share.Close(ctx); err != nil {
		p.log.Error("close share", "err", err)
	}
}

// endAll ends the processes whose end the agent can no longer tell: the VM
// has gone, and they with it. On the pod's goroutine.
func (p *Pod) endAll() {
	for _, c := range p.containers {
		for _, proc := range c.processes {
			p.exited(proc, exitKilled, time.Now())
			p.drained(proc, nil)
		}
	}
}

// exitKilled is the status of a process that died by SIGKILL.
const exitKilled = 128 + 9

// fail ends a pod whose VM cannot go on. On the pod's goroutine.
func (p *Pod) fail(err error) {
	if p.state == Stopping || p.state == Stopped {
		return
	}
	p.log.Error("pod failed", "err", err)
	p.failure = err
	p.record.Failure = err.Error()
	p.save()
	p.stop(err.Error())
}
