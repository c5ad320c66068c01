package pod

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/agentclient"
	"runv/internal/factory"
	"runv/internal/hostcgroup"
	"runv/internal/hypervisor"
	"runv/internal/state"
	"runv/internal/storage"
)

// OverheadBytes is what a VM gets on top of the memory limits of its containers: the
// guest's kernel with its page tables, the agent, and the page cache that the
// share needs. Measured with Debian's cloud kernel: MemTotal is 50 MiB below the VM's size, and the
// idle guest uses 45 MiB of it.
const OverheadBytes = 128 << 20

// overheadPart is the part of the limits that a VM gets beyond that: what its kernel keeps of each page, a 64th, and
// what it does not give away before it kills. A container must come to its own limit first, or the kernel would choose among
// all processes of the VM.
const overheadPart = 32

// guestCall bounds a call to the agent that runs no user code.
const guestCall = 30 * time.Second

// boot is the making of the pod's VM. It happens once; done is closed at its
// end, and then vm or err is set.
type boot struct {
	cancel   context.CancelCauseFunc
	shared   chan struct{} // closed when the share is there, or will not be
	shareErr error         // why not, after shared
	started  chan struct{} // closed when the VMM runs, or will not
	vmm      hypervisor.VM // after started; nil: it does not run
	done     chan struct{}
	vm       *factory.VM
	err      error
}

// size is how large a VM to make.
type size struct {
	vcpus  int
	memory int64 // bytes
}

// sizeForLimit is how much memory a VM needs for a memory limit, in bytes: no more than the
// host has, whatever the limit.
func sizeForLimit(limit int64) int64 {
	const mib = 1 << 20
	limit = min(limit, hostMemory())
	return (limit + limit/overheadPart + OverheadBytes + mib - 1) / mib * mib
}

// hostMemory is how much the host has, in bytes.
func hostMemory() int64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return math.MaxInt64 / 2 // the VMM will tell
	}
	return int64(si.Totalram) * int64(si.Unit)
}

// startBoot begins the boot of the VM for its first container, which has this stand-in. On the
// pod's goroutine.
func (p *Pod) startBoot(s size, c hostcgroup.Container, standIn int) {
	p.to(Starting, "first container")
	ctx, cancel := context.WithCancelCause(context.Background())
	p.boot.cancel = cancel
	p.boot.shared, p.boot.started = make(chan struct{}), make(chan struct{})
	p.record.VCPUs, p.record.MemoryBytes = s.vcpus, s.memory
	go func() {
		defer cancel(nil)
		began := time.Now()
		err := p.cfg.Cgroup.Create(c, standIn, p.saveCgroup)
		took := []state.Phase{{Name: "cgroup", Duration: time.Since(began)}}
		if err == nil {
			began = time.Now()
			err = p.cfg.Share.Start(ctx)
			took = append(took, state.Phase{Name: "share", Duration: time.Since(began)})
		}
		p.boot.shareErr = err
		close(p.boot.shared)
		if err == nil {
			p.boot.vm, err = p.startVM(ctx, s)
		}
		if p.boot.vmm == nil {
			close(p.boot.started)
		}
		p.boot.err = p.whyKilled(err)
		close(p.boot.done)
		p.post(func() { p.booted(took) })
	}()
}

// saveCgroup records the cgroup before what is in it can outlive this process.
func (p *Pod) saveCgroup(r hostcgroup.Record) {
	_ = p.do(context.Background(), func() error {
		p.record.Cgroup = r
		p.save()
		return nil
	})
}

// whyKilled replaces the error of a VM whose VMM, or one of its helpers, has been killed when the
// host's memory, or the part of it that the pod may have, was used up.
func (p *Pod) whyKilled(err error) error {
	if err == nil {
		return nil
	}
	if why := p.cfg.Cgroup.OOM(); why != "" {
		return fmt.Errorf("VM ended: %s", why)
	}
	return err
}

// startVM gets the VM and makes its guest this pod's.
func (p *Pod) startVM(ctx context.Context, s size) (*factory.VM, error) {
	cfg := p.cfg.VM
	cfg.VCPUs, cfg.MemoryBytes = s.vcpus, s.memory
	cfg.MaxVCPUs, cfg.MaxMemoryBytes = max(s.vcpus, runtime.NumCPU()), max(s.memory, sizeForLimit(math.MaxInt64))
	cfg.Shares = []hypervisor.Share{{ID: "share", Tag: storage.Tag, Socket: p.cfg.Share.Socket()}}
	vm, err := p.cfg.Factory.Get(ctx, cfg, func(vmm hypervisor.VM) {
		p.boot.vmm = vmm
		close(p.boot.started)
	})
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := p.configure(ctx, vm); err != nil {
		err = fmt.Errorf("start VM %s: %w", cfg.ID, factory.WithConsole(err, vm.VM))
		_ = vm.Kill()
		_ = vm.Agent.Close()
		<-vm.Done()
		return nil, err
	}
	vm.Phases = append(vm.Phases, factory.Phase{Name: "configure", Duration: time.Since(began)})
	return vm, nil
}

func (p *Pod) configure(ctx context.Context, vm *factory.VM) error {
	ctx, cancel := context.WithTimeout(ctx, guestCall)
	defer cancel()
	entropy := make([]byte, 64)
	if _, err := rand.Read(entropy); err != nil {
		return fmt.Errorf("read entropy: %w", err)
	}
	_, err := vm.Agent.Guest.Configure(ctx, &agentv1.ConfigureRequest{
		Hostname:     p.ID(),
		Entropy:      entropy,
		TimeUnixNano: time.Now().UnixNano(),
		ShareTag:     storage.Tag,

		KernelParameters: readParameters("/proc"),
	})
	if err != nil {
		return fmt.Errorf("configure guest: %w", err)
	}
	return nil
}

// booted takes over what the boot made. On the pod's goroutine.
func (p *Pod) booted(before []state.Phase) {
	for _, ph := range before {
		p.phase(ph.Name, ph.Duration)
	}
	if p.boot.err != nil {
		if p.state == Starting { // else the boot was cancelled
			p.fail(p.boot.err)
		}
		return
	}
	vm := p.boot.vm
	for _, ph := range vm.Phases {
		p.phase(ph.Name, ph.Duration)
	}
	if p.state != Starting {
		return // it is being dismantled already
	}
	p.vm = vm
	p.to(Running, "agent answered")
	info := vm.Info()
	p.record.Command = info.Command
	p.record.VM = nil
	for _, pid := range append([]int{info.PID}, p.cfg.Share.Processes()...) {
		if proc, err := state.ProcessOf(pid); err == nil {
			p.record.VM = append(p.record.VM, proc)
		}
	}
	p.save()
	go p.watchVM(vm)
	go p.watchEvents(vm)
	go p.watchLocks(vm)
	go p.askGuest(vm)
}

// askGuest records which kernel the guest says it runs: one of the user's own has nobody
// else to tell. The container does not wait for that.
func (p *Pod) askGuest(vm *factory.VM) {
	ctx, cancel := context.WithTimeout(context.Background(), guestCall)
	defer cancel()
	info, err := vm.Agent.Guest.Info(ctx, &agentv1.InfoRequest{})
	if err != nil {
		p.log.Debug("ask guest", "err", agentclient.Error(err))
		return
	}
	p.log.Debug("guest", "agent", info.AgentVersion, "kernel", info.KernelRelease, "boot_id", info.BootId,
		"memory", info.MemoryBytes, "cpus", info.Cpus, "boot_ms", info.BootMs)
	release := printable(info.KernelRelease)
	p.post(func() {
		if release != "" && release != p.record.Kernel {
			p.record.Kernel = release
			p.save()
		}
	})
}

// printable bounds a word of the guest's and drops what is no visible character.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s[:min(len(s), 128)])
}

// visible drops what is neither a visible character nor the end of a line.
func visible(r rune) rune {
	if r == utf8.RuneError || r != '\n' && !unicode.IsPrint(r) {
		return -1
	}
	return r
}

// watchVM waits for the ends of what the pod cannot live without.
func (p *Pod) watchVM(vm *factory.VM) {
	select {
	case <-vm.Done():
		err := p.vmError(vm)
		p.post(func() { p.fail(err) })
	case <-p.cfg.Share.Done():
		err := p.whyKilled(fmt.Errorf("share ended: %w", orUnknown(p.cfg.Share.Err())))
		p.post(func() { p.fail(err) })
	case <-vm.Agent.Done():
		// Either the VM dies, which tells more, or the guest broke the channel.
		select {
		case <-vm.Done():
			err := p.vmError(vm)
			p.post(func() { p.fail(err) })
		case <-time.After(2 * time.Second):
			p.post(func() { p.fail(factory.WithConsole(errors.New("agent channel broke"), vm.VM)) })
		case <-p.ended:
		}
	case <-p.ended:
	}
}

// watchLocks lets signals end the waits of the guest's threads for locks on files of the share. The host has the locks, but only the
// guest knows of signals, and virtio-fs has no message to say so.
func (p *Pod) watchLocks(vm *factory.VM) {
	for {
		select {
		case threads := <-p.cfg.Share.LockWaits():
			if err := p.interruptWaits(vm, threads); err != nil {
				p.log.Debug("interrupt waits for locks", "err", err)
			}
		case <-p.cfg.Share.Done():
			return
		case <-vm.Done():
			return
		case <-p.ended:
			return
		}
	}
}

func (p *Pod) interruptWaits(vm *factory.VM, waiting []int) error {
	ctx, cancel := context.WithTimeout(context.Background(), guestCall)
	defer cancel()
	req := &agentv1.SignalledRequest{}
	for _, t := range waiting {
		req.Threads = append(req.Threads, int32(t)) //nolint:gosec // the guest has named them
	}
	resp, err := vm.Agent.Guest.Signalled(ctx, req)
	if err != nil {
		return agentclient.Error(err)
	}
	threads := make([]int, len(resp.Threads))
	for i, t := range resp.Threads {
		threads[i] = int(t)
	}
	return p.cfg.Share.InterruptWaits(threads)
}

// vmError tells why the VM has ended, if nobody has asked it to.
func (p *Pod) vmError(vm *factory.VM) error {
	err := vm.Err()
	if err == nil {
		err = errors.New("the guest powered itself off")
	}
	return p.whyKilled(fmt.Errorf("VM ended: %w", err))
}

func orUnknown(err error) error {
	if err == nil {
		return errors.New("for no known reason")
	}
	return err
}

// awaitShare waits until containers can be added to the share.
func (p *Pod) awaitShare(ctx context.Context) error {
	select {
	case <-p.boot.shared:
		return p.boot.shareErr
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// awaitVMM waits for the VMM, whose guest may still boot.
func (p *Pod) awaitVMM(ctx context.Context) (hypervisor.VM, error) {
	select {
	case <-p.boot.started:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if p.boot.vmm == nil {
		_, err := p.awaitBoot(ctx)
		return nil, err
	}
	return p.boot.vmm, nil
}

// awaitBoot waits for the VM.
func (p *Pod) awaitBoot(ctx context.Context) (*factory.VM, error) {
	select {
	case <-p.boot.done:
		return p.boot.vm, p.boot.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// explain replaces an error of a call to the agent by its cause when the VM
// has died of it: the call only knows that the connection is lost. It may wait for
// seconds, so it is not for the pod's goroutine. nil stays nil.
func (p *Pod) explain(err error, vm *factory.VM) error {
	if err == nil {
		return nil
	}
	if !errdefs.IsUnavailable(err) {
		select {
		case <-vm.Agent.Done():
		case <-vm.Done():
		default:
			return err
		}
	}
	select {
	case <-vm.Done():
		if exit := vm.Err(); exit != nil {
			return p.whyKilled(exit)
		}
	case <-time.After(2 * time.Second):
	}
	return factory.WithConsole(err, vm.VM)
}

// shutdownGuest lets the agent end all processes and write back what the guest holds.
func shutdownGuest(ctx context.Context, vm *factory.VM) error {
	select {
	case <-vm.Done():
		return nil
	default:
	}
	_, err := vm.Agent.Guest.Shutdown(ctx, &agentv1.ShutdownRequest{})
	return agentclient.Error(err)
}
