package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/fault"
	"runv/internal/guest/launch"
	"runv/internal/guest/stage"
	"runv/internal/guest/stdio"
	"runv/internal/hook"
)

// process is one that the agent started: a container's init or an exec.
type process struct {
	c      *Container
	execID string
	pid    int
	pidfd  *os.File
	ctl    *launch.Stage
	io     *stdio.IO
	gone   chan struct{} // closed when reaped

	// Under c.mu.
	announced bool // its exit is an event
	exited    bool
	status    uint32
	instead   uint32 // status to report when the agent had to use SIGKILL for another signal
}

// setupTimeout bounds the stage of a process but for its hooks, should the request have no
// deadline.
const setupTimeout = 60 * time.Second

// launchOptions say which process of the container to start where.
type launchOptions struct {
	execID string // empty: init
	cgroup string // below the container's; empty: that
	files  *agentv1.Stdio
	scheduling
}

// launch starts a process. An init waits for its start when launch returns; an exec
// has become the program. When launch fails the process is gone.
func (c *Container) launch(ctx context.Context, opts launchOptions, cfg *stage.Config, streams stdio.Streams) (_ *process, err error) {
	limit := setupTimeout
	if cfg.Container != nil {
		limit += hook.Timeouts(cfg.Container.Hooks.Create, 0)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	p := &process{c: c, execID: opts.execID, gone: make(chan struct{})}
	defer func() {
		if err != nil {
			p.abandon()
		}
	}()
	if p.io, err = stdio.New(streams, stdio.Options{
		Terminal: cfg.Process.Terminal, PlainNewlines: opts.files.GetPlainNewlines(), Faulty: opts.files.GetFaulty(),
	}); err != nil {
		return nil, err
	}
	if err := p.prepare(cfg); err != nil {
		return nil, err
	}
	if err := p.fork(cfg, opts.cgroup); err != nil {
		return nil, err
	}
	p.ctl.CloseInherit()
	p.io.CloseChild()
	if cfg.UserNS {
		if err := opts.set(p.pid); err != nil {
			return nil, err
		}
		if err := p.admit(ctx, cfg); err != nil {
			return nil, err
		}
	}
	if !cfg.Process.Terminal {
		p.io.Start()
	}
	return p, p.awaitSetup(ctx, cfg)
}

// prepare makes the stage, and what a user namespace must be given.
func (p *process) prepare(cfg *stage.Config) (err error) {
	ns := &p.c.namespaces
	var devices *os.File
	if ns.user() {
		if err := p.io.Chown(ns.owner(0, 0)); err != nil {
			return err
		}
		if cfg.Container != nil {
			if devices, err = ns.newDevices(cfg.Container.Devices); err != nil {
				return err
			}
			defer func() {
				if devices != nil {
					devices.Close()
				}
			}()
		}
	}
	if p.ctl, err = launch.New(cfg); err != nil {
		return err
	}
	if devices != nil {
		p.ctl.Devices(devices)
		devices = nil
	}
	if cfg.Container == nil {
		return p.ctl.Target(p.c.init.pidfd, ns.flags&singleThreaded)
	}
	return nil
}

// admit makes what a process in a user namespace finds there, and lets it go on. What the container
// says of its network is done last, since it may be told otherwise by the host.
func (p *process) admit(ctx context.Context, cfg *stage.Config) error {
	ns := &p.c.namespaces
	if cfg.Container != nil {
		if ns.network != "" && ns.own&unix.CLONE_NEWNET != 0 {
			if err := p.adoptNetwork(ctx); err != nil {
				return fmt.Errorf("give the container its network: %w", err)
			}
		}
		if len(cfg.Container.Sysctl) > 0 {
			if err := ns.writeSysctl(p.pidfd, cfg.Container.Sysctl); err != nil {
				return err
			}
		}
	}
	return p.ctl.Proceed()
}

// adoptNetwork makes the network namespace of an init the container's network.
func (p *process) adoptNetwork(ctx context.Context) error {
	netns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", p.pid))
	if err != nil {
		return err
	}
	defer netns.Close()
	if err := p.signal(0); err != nil { // else it may be that of somebody else with the pid
		return err
	}
	return p.c.set.Networks.Adopt(ctx, p.c.namespaces.network, netns)
}

// awaitSetup waits until an init is ready, or an exec the program.
func (p *process) awaitSetup(ctx context.Context, cfg *stage.Config) error {
	if cfg.Container != nil || cfg.Process.Terminal {
		ptmx, err := p.ctl.Ready(ctx)
		if err != nil {
			return err
		}
		if cfg.Process.Terminal {
			if err := p.io.SetTerminal(ptmx); err != nil {
				return err
			}
			p.io.Start()
		}
	}
	if cfg.Container != nil {
		return nil
	}
	if err := p.ctl.Executed(ctx); err != nil {
		return err
	}
	p.ctl.Close()
	return nil
}

// fork starts the stage in the container's control group and, for an exec, in its
// pid namespace.
func (p *process) fork(cfg *stage.Config, cgroup string) error {
	c := p.c
	attr := &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: c.group.FD()}
	if cgroup != "" {
		sub, err := c.group.Sub(cgroup)
		if err != nil {
			return fmt.Errorf("open cgroup %q of the container: %w", cgroup, err)
		}
		defer sub.Close()
		attr.CgroupFD = int(sub.Fd())
	}
	start := func() (pid int, err error) {
		err = c.inPidNS(func() (err error) {
			pid, err = p.forkOnce(cfg, attr)
			return err
		})
		return pid, err
	}
	if cfg.Container != nil {
		if !c.namespaces.joinsUser() { // else what it makes is to be that user namespace's
			attr.Cloneflags = uintptr(c.namespaces.madeFlags())
		}
		c.namespaces.become(attr)
		start = func() (int, error) { return p.forkInit(cfg, attr) }
	}
	pid, err := c.set.Reaper.Start(start, p.reaped)
	if errors.Is(err, unix.EBUSY) && cfg.Container == nil && cgroup == "" {
		// The container has distributed its group's controllers to groups of its
		// own: no process may be in the group itself any more.
		group, gerr := c.group.FDOf(c.init.pid)
		if gerr != nil {
			return fmt.Errorf("find cgroup of init: %w", gerr)
		}
		defer group.Close()
		attr.CgroupFD = int(group.Fd())
		pid, err = c.set.Reaper.Start(start, p.reaped)
	}
	if err != nil {
		return fmt.Errorf("start process: %w", err)
	}
	p.pid = pid
	return nil
}

// forkInit forks init: into the namespaces of others that it joins, and into a time namespace if it is
// to have one of its own.
func (p *process) forkInit(cfg *stage.Config, attr *syscall.SysProcAttr) (pid int, err error) {
	ns := &p.c.namespaces
	fork := func() (err error) {
		if err := p.enterAlone(); err != nil {
			return err
		}
		return ns.inJoined(func() (err error) {
			pid, err = p.forkOnce(cfg, attr)
			return err
		})
	}
	if ns.own&unix.CLONE_NEWTIME == 0 {
		return pid, fork()
	}
	err = ns.inTimeNS(func(timeNS *os.File) (err error) {
		if ns.own&unix.CLONE_NEWUSER == 0 {
			return p.ctl.Enter(timeNS, unix.CLONE_NEWTIME)
		}
		// A user namespace's process is born with a memory of its own, so this works; to enter
		// the time namespace it had no right.
		if err := ns.enter(); err != nil {
			return err
		}
		pid, err = p.forkOnce(cfg, attr)
		return err
	})
	if err != nil || ns.own&unix.CLONE_NEWUSER != 0 {
		return pid, err
	}
	return pid, fork()
}

// enterAlone makes the stage of an init enter those namespaces of others that its parent does not enter for it,
// and make its own in a user namespace. Once it is there it may enter no others.
func (p *process) enterAlone() error {
	ns := &p.c.namespaces
	for _, kind := range []int{unix.CLONE_NEWCGROUP, unix.CLONE_NEWTIME, unix.CLONE_NEWUSER} {
		for _, j := range ns.from {
			if j.flags&kind != 0 {
				if err := p.ctl.Enter(j.file, kind); err != nil {
					return err
				}
			}
		}
	}
	if made := ns.madeFlags(); ns.joinsUser() && made != 0 {
		p.ctl.Make(made)
	}
	return nil
}

// forkOnce forks and opens the pidfd, which names the right process for sure since
// the caller is the one to reap it and does not do so meanwhile.
func (p *process) forkOnce(cfg *stage.Config, attr *syscall.SysProcAttr) (int, error) {
	ns := &p.c.namespaces
	pid, err := p.ctl.Fork(p.c.set.Exe, p.io.Child(), attr)
	if err != nil {
		return 0, err
	}
	if cfg.Container != nil && ns.joinsUser() {
		now, err := p.ctl.Made()
		if err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			return 0, err
		}
		if now != 0 {
			pid = now // the first is nobody's any more, and reaped as an orphan
		}
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		// Without a pidfd the process cannot be controlled: its setup shall fail.
		_ = unix.Kill(pid, unix.SIGKILL)
		return pid, nil
	}
	p.pidfd = os.NewFile(uintptr(fd), "pidfd")
	if cfg.UserNS {
		if err := ns.settle(pid, &cfg.Process); err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			return pid, err
		}
	}
	return pid, nil
}

// inPidNS calls fork on a thread whose children are born in the container's pid namespace.
func (c *Container) inPidNS(fork func() error) error {
	if c.namespaces.flags&unix.CLONE_NEWPID == 0 {
		return fork()
	}
	runtime.LockOSThread()
	if err := unix.Setns(int(c.init.pidfd.Fd()), unix.CLONE_NEWPID); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("join pid namespace: %w", err)
	}
	forkErr := fork()
	if err := unix.Setns(c.set.pidNS, unix.CLONE_NEWPID); err != nil {
		// The thread stays locked, so that it ends with its goroutine and nobody
		// else's child is born there.
		c.set.Log.Error("leave pid namespace", "error", err)
		return forkErr
	}
	runtime.UnlockOSThread()
	return forkErr
}

// abandon ends a process that could not be set up.
func (p *process) abandon() {
	if p.ctl != nil {
		p.ctl.Close()
	}
	if p.pid != 0 {
		_ = p.signal(unix.SIGKILL)
		select {
		case <-p.gone:
		case <-time.After(removeTimeout):
			p.c.set.Log.Error("process does not end", "pid", p.pid)
		}
	}
	if p.io != nil {
		p.io.CloseChild()
	}
	p.close()
}

// close releases what the process held. Idempotent.
func (p *process) close() {
	if p.ctl != nil {
		p.ctl.Close()
	}
	if p.io != nil {
		p.io.Close()
	}
	if p.pidfd != nil {
		p.pidfd.Close()
	}
}

// reaped is called when the process has ended.
func (p *process) reaped(status uint32) {
	p.c.mu.Lock()
	p.exited = true
	p.status = status
	if p.instead != 0 && status == 128+uint32(unix.SIGKILL) {
		p.status = p.instead
	}
	report := p.announced
	p.c.mu.Unlock()
	close(p.gone)
	if report {
		p.report()
	}
}

// announce tells that the host knows of the process, so that its exit is an event.
func (p *process) announce() {
	p.c.mu.Lock()
	p.announced = true
	report := p.exited
	p.c.mu.Unlock()
	if report {
		p.report()
	}
}

// report makes the exit an event, and starts what follows.
func (p *process) report() {
	c := p.c
	// The kernel's own notice may come later than the exit; the host shall know the cause
	// when it learns of the exit.
	if p.status == 128+uint32(unix.SIGKILL) {
		c.group.CheckOOM()
	}
	if p == c.init {
		c.stop()
	}
	c.set.Events.Append(&agentv1.Event{
		ContainerId: c.id, ExecId: p.execID,
		Kind: &agentv1.Event_Exit{Exit: &agentv1.Exit{Status: p.status}},
	})
	go p.finish()
}

// stop marks the container as stopped. Without a pid namespace of its own the kernel does
// not kill what init leaves behind.
func (c *Container) stop() {
	c.mu.Lock()
	c.status = stopped
	c.paused = false
	c.mu.Unlock()
	if c.namespaces.own&unix.CLONE_NEWPID == 0 {
		if err := c.group.Kill(); err != nil {
			c.set.Log.Error("kill container", "container", c.id, "error", err)
		}
	}
}

// finish reports when the output was sent, and stays until nobody can write any more.
// Delete ends it by closing the process.
func (p *process) finish() {
	c := p.c
	p.io.Exited()
	stdout, stderr := p.io.Drained()
	c.set.Events.Append(&agentv1.Event{
		ContainerId: c.id, ExecId: p.execID,
		Kind: &agentv1.Event_Drained{Drained: &agentv1.Drained{StdoutBytes: stdout, StderrBytes: stderr}},
	})
	if p == c.init {
		return // its descriptors are those of the container
	}
	c.mu.Lock()
	delete(c.execs, p.execID)
	c.lingers[p] = struct{}{}
	c.mu.Unlock()
	p.io.Wait()
	c.mu.Lock()
	delete(c.lingers, p)
	c.mu.Unlock()
	p.close()
}

func (p *process) signal(sig unix.Signal) error {
	if p.pidfd == nil {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(int(p.pidfd.Fd()), sig, nil, 0)
}

// maxSignal is the highest signal number of Linux.
const maxSignal = 64

// Signal sends a signal to a process, or to all of the container.
func (c *Container) Signal(execID string, number uint32, all bool) error {
	if number > maxSignal {
		return invalid("signal %d does not exist", number)
	}
	sig := unix.Signal(number)
	if all {
		return c.signalAll(sig)
	}
	p, err := c.find(execID)
	if err != nil {
		return err
	}
	if execID == "" && c.beforeStart(p, sig) {
		return nil
	}
	err = p.signal(sig)
	if errors.Is(err, unix.ESRCH) {
		return fault.New(errdefs.ErrNotFound, "process %d has ended", p.pid)
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// beforeStart gives a signal to an init that is still a stage the effect that it has on runc's
// init, and tells whether it did so: some end it, the others are lost. The stage itself would
// handle some in ways of its own.
func (c *Container) beforeStart(p *process, sig unix.Signal) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status != created {
		return false
	}
	switch sig {
	case 0, unix.SIGKILL, unix.SIGSTOP, unix.SIGCONT:
		return false
	case unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGILL, unix.SIGTRAP, unix.SIGABRT, unix.SIGBUS, unix.SIGFPE,
		unix.SIGSEGV, unix.SIGTERM, unix.SIGSTKFLT, unix.SIGSYS:
		p.instead = 128 + uint32(sig)
		_ = p.signal(unix.SIGKILL)
	}
	return true
}

func (c *Container) signalAll(sig unix.Signal) error {
	if sig == unix.SIGKILL {
		return c.group.Kill()
	}
	if c.init != nil && c.beforeStart(c.init, sig) {
		return nil
	}
	pids, err := c.group.Processes()
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return fault.New(errdefs.ErrNotFound, "container %q has no processes", c.id)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return nil
}
