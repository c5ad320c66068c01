// Package fake is a hypervisor.Driver whose VMs are some channels and a map, for
// unit tests of what stands above the drivers.
//
// A test gives the Driver a Guest function, which gets the guest's end of the agent
// channel, and makes VMs fail through the VM's own methods. It passes the suite in
// hvtest.
package fake

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/console"
	"runv/internal/hypervisor"
)

// Driver makes VMs in memory. The zero value works; set fields before use.
type Driver struct {
	// Guest, if set, runs in a goroutine for each VM until it returns. It gets the
	// guest's end of the agent channel, which is closed with the VM; Done is
	// closed only when it has returned.
	Guest func(vm *VM, channel net.Conn)
	// OnStart, if set, can make Start fail with its error, or delay it.
	OnStart func(ctx context.Context, cfg hypervisor.Config) error
	// OnAttach, if set, can make Attach fail.
	OnAttach func(ctx context.Context, dev hypervisor.Device) error

	mu  sync.Mutex
	vms []*VM
}

// Name implements hypervisor.Driver.
func (*Driver) Name() string { return "fake" }

// Capabilities implements hypervisor.Driver.
func (*Driver) Capabilities() hypervisor.Capabilities {
	return hypervisor.Capabilities{
		Accels:  []hypervisor.Accel{hypervisor.KVM, hypervisor.TCG},
		HotPlug: []hypervisor.DeviceKind{hypervisor.KindShare, hypervisor.KindNIC},
	}
}

// VMs are all that were started, in order.
func (d *Driver) VMs() []*VM {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.vms)
}

// Start implements hypervisor.Driver.
func (d *Driver) Start(ctx context.Context, cfg hypervisor.Config) (hypervisor.VM, error) {
	vm, err := d.start(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("start VM %s: %w", cfg.ID, err)
	}
	return vm, nil
}

func (d *Driver) start(ctx context.Context, cfg hypervisor.Config) (*VM, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if cfg.VCPUs < 1 || cfg.MemoryBytes < 64<<20 || (cfg.Accel != hypervisor.KVM && cfg.Accel != hypervisor.TCG) {
		return nil, hypervisor.Errorf(errdefs.ErrInvalidArgument, "vcpus, memory or accelerator out of range")
	}
	devices := map[string]hypervisor.Device{}
	for _, s := range cfg.Shares {
		if _, ok := devices[s.ID]; ok {
			return nil, hypervisor.Errorf(errdefs.ErrAlreadyExists, "device %s is there already", s.ID)
		}
		devices[s.ID] = s
	}
	for _, path := range []string{cfg.Kernel, cfg.Initrd} {
		if path == "" {
			continue
		}
		if _, err := os.Stat(path); err != nil {
			return nil, hypervisor.Errorf(errdefs.ErrNotFound, "%w", err)
		}
	}
	if d.OnStart != nil {
		if err := d.OnStart(ctx, cfg); err != nil {
			return nil, err
		}
	}
	log, err := console.New(filepath.Join(cfg.RunDir, "console.log"))
	if err != nil {
		return nil, err
	}
	vm := &VM{
		Config:  cfg,
		size:    hypervisor.Size{VCPUs: cfg.VCPUs, MemoryBytes: cfg.MemoryBytes},
		started: time.Now(),
		console: log,
		attach:  d.OnAttach,
		ending:  make(chan struct{}),
		done:    make(chan struct{}),
		devices: devices,
	}
	var channel net.Conn
	vm.agent, channel = net.Pipe()
	d.mu.Lock()
	d.vms = append(d.vms, vm)
	d.mu.Unlock()
	go vm.run(d.Guest, channel)
	return vm, nil
}

// VM is a VM in memory.
type VM struct {
	Config hypervisor.Config // it was started with

	started time.Time
	agent   net.Conn
	console *console.Log
	attach  func(context.Context, hypervisor.Device) error
	once    sync.Once
	ending  chan struct{} // closed when the VM is to end
	done    chan struct{}

	mu      sync.Mutex // guards what follows
	err     error
	paused  bool
	size    hypervisor.Size
	devices map[string]hypervisor.Device
}

// run owns the VM's end.
func (v *VM) run(guest func(*VM, net.Conn), channel net.Conn) {
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		if guest != nil {
			guest(v, channel)
		}
	}()
	<-v.ending
	v.agent.Close()
	channel.Close()
	<-returned
	v.console.Close()
	close(v.done)
}

// end ends the VM once, with what Err is to say.
func (v *VM) end(err error) {
	v.once.Do(func() {
		v.mu.Lock()
		v.err = err
		v.mu.Unlock()
		close(v.ending)
	})
}

// PowerOff ends the VM as a guest does that powers itself off.
func (v *VM) PowerOff() { v.end(nil) }

// Crash ends the VM with an *hypervisor.ExitError of that status, such as "signal:
// killed", and the console's last lines.
func (v *VM) Crash(status string) {
	v.end(&hypervisor.ExitError{Status: status, After: time.Since(v.started), Console: v.console.Tail(8)})
}

// Print writes a line to the console, as the guest's kernel does.
func (v *VM) Print(line string) { _, _ = io.WriteString(v.console, line+"\r\n") }

// Paused tells whether the VM is paused.
func (v *VM) Paused() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.paused
}

// Devices are what is plugged now, by id. The files of a NIC are its caller's and may be closed.
func (v *VM) Devices() map[string]hypervisor.Device {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.devices)
}

// Agent implements hypervisor.VM.
func (v *VM) Agent() net.Conn { return v.agent }

// Console implements hypervisor.VM.
func (v *VM) Console() *console.Log { return v.console }

// Pause implements hypervisor.VM. The guest function runs on.
func (v *VM) Pause(ctx context.Context) error { return v.setPaused(ctx, "pause", true) }

// Resume implements hypervisor.VM.
func (v *VM) Resume(ctx context.Context) error { return v.setPaused(ctx, "resume", false) }

func (v *VM) setPaused(ctx context.Context, verb string, paused bool) error {
	if err := v.usable(ctx); err != nil {
		return fmt.Errorf("%s VM %s: %w", verb, v.Config.ID, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = paused
	return nil
}

// Resize implements hypervisor.Resizer.
func (v *VM) Resize(ctx context.Context, want hypervisor.Size) (hypervisor.Size, error) {
	err := v.usable(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err == nil {
		memory := min(want.MemoryBytes, max(v.Config.MaxMemoryBytes, v.Config.MemoryBytes))
		v.size.PluggedBytes += max(0, memory-v.size.MemoryBytes)
		v.size.MemoryBytes = max(memory, v.size.MemoryBytes)
		v.size.VCPUs = max(v.size.VCPUs, min(want.VCPUs, max(v.Config.MaxVCPUs, v.Config.VCPUs)))
		if want.VCPUs > v.size.VCPUs || want.MemoryBytes > v.size.MemoryBytes {
			err = hypervisor.Errorf(errdefs.ErrResourceExhausted, "the VM cannot be so large")
		}
	}
	if err != nil {
		err = fmt.Errorf("resize VM %s: %w", v.Config.ID, err)
	}
	return v.size, err
}

// Size is how large the VM is now.
func (v *VM) Size() hypervisor.Size {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.size
}

// usable gives the error of a call on a VM that has ended or whose ctx has.
func (v *VM) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	select {
	case <-v.ending:
		return hypervisor.Errorf(errdefs.ErrFailedPrecondition, "VM has ended")
	default:
		return nil
	}
}

// Attach implements hypervisor.VM.
func (v *VM) Attach(ctx context.Context, dev hypervisor.Device) error {
	err := v.usable(ctx)
	if dev.DeviceKind() == hypervisor.KindDisk {
		err = hypervisor.Errorf(errdefs.ErrNotImplemented, "the fake driver does not plug devices of this kind")
	}
	if nic, ok := dev.(hypervisor.NIC); err == nil && ok {
		err = nic.Validate()
	}
	if err == nil && v.attach != nil {
		err = v.attach(ctx, dev)
	}
	if err == nil {
		err = v.plug(dev)
	}
	if err != nil {
		return fmt.Errorf("attach %s %s: %w", dev.DeviceKind(), dev.DeviceID(), err)
	}
	return nil
}

func (v *VM) plug(dev hypervisor.Device) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.devices[dev.DeviceID()]; ok {
		return hypervisor.Errorf(errdefs.ErrAlreadyExists, "device is there already")
	}
	v.devices[dev.DeviceID()] = dev
	return nil
}

// Detach implements hypervisor.VM.
func (v *VM) Detach(ctx context.Context, id string) error {
	if err := v.usable(ctx); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.devices[id]; !ok {
		return hypervisor.Errorf(errdefs.ErrNotFound, "detach %s: no such device", id)
	}
	delete(v.devices, id)
	return nil
}

// Stop implements hypervisor.VM.
func (v *VM) Stop(ctx context.Context) error {
	v.end(nil)
	select {
	case <-v.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop VM %s: %w", v.Config.ID, context.Cause(ctx))
	}
}

// Kill implements hypervisor.VM.
func (v *VM) Kill() error {
	v.end(nil)
	return nil
}

// Done implements hypervisor.VM.
func (v *VM) Done() <-chan struct{} { return v.done }

// Err implements hypervisor.VM.
func (v *VM) Err() error {
	select {
	case <-v.done:
	default:
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.err
}

// Info implements hypervisor.VM. No process runs such a VM: PID is 0.
func (v *VM) Info() hypervisor.Info {
	return hypervisor.Info{Command: []string{"fake", v.Config.ID}, Version: "1"}
}
