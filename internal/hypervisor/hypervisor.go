// Package hypervisor is the contract between runv and the programs that run
// virtual machines.
//
// # Vocabulary
//
// A Driver starts virtual machines with one VMM (virtual machine monitor, the
// host process that runs the guest, such as QEMU). A VM is one started machine.
// A Device is something that can be plugged into a VM: a Share (a directory
// over virtiofs), a Disk, a NIC. The agent channel is one byte stream between
// the host and the agent in the guest; what is spoken on it is not this
// package's business. The console is what the guest's kernel writes.
//
// # Life cycle
//
//	cfg := hypervisor.Config{...}
//	vm, err := driver.Start(ctx, cfg)    // the VMM runs, the guest boots
//	conn := vm.Agent()                   // may be written to at once; the guest
//	                                     // answers when its agent is there
//	vm.Attach(ctx, hypervisor.Share{...})
//	vm.Pause(ctx); vm.Resume(ctx)
//	vm.(hypervisor.Resizer).Resize(ctx, size) // of a driver that can
//	vm.Stop(ctx)                         // the VMM has ended when it returns
//	<-vm.Done(); vm.Err()
//
// Start either returns a VM whose VMM process runs, or an error and has left nothing behind.
// Whoever calls Start must see to it that Stop or Kill is called; both are idempotent. Done is
// closed exactly once, when the VMM process has been reaped and all that the driver acquired for it
// was released; a VMM that dies of itself closes it, too. A driver ties the VMM to the life of the
// calling process: when that is killed, the VMM dies.
//
// # Layer boundaries
//
// A driver knows no containers, no pods and no state directory; it writes only
// below Config.RunDir. It never imports another driver. Drivers pass the suite
// in hypervisor/hvtest.
package hypervisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/console"
)

// Accel is what executes the guest's instructions.
type Accel string

const (
	// KVM is hardware virtualization through the host's kernel.
	KVM Accel = "kvm"
	// TCG is QEMU's translator. QEMU's developers do not treat it as a
	// security boundary (QEMU documentation, "Security", "Non-virtualization
	// use case").
	TCG Accel = "tcg"
)

// Driver starts VMs. It holds no state of its own and is safe for concurrent use.
type Driver interface {
	// Name is a short lower-case word, such as "qemu".
	Name() string
	// Capabilities tells what VMs of this driver can do.
	Capabilities() Capabilities
	// Start starts a VM and returns when the VMM runs and can be controlled; the
	// guest boots meanwhile. ctx bounds Start only, not the life of the VM.
	// Errors: errdefs.ErrInvalidArgument for a configuration that cannot
	// work, errdefs.ErrNotFound when the VMM or a file is missing, and
	// *ExitError when the VMM ended during the start.
	Start(ctx context.Context, cfg Config) (VM, error)
}

// Capabilities tells what a driver can do beyond the core.
type Capabilities struct {
	// Accels are the accelerators that the driver knows.
	Accels []Accel
	// HotPlug lists the kinds of devices that can be attached to a running VM.
	HotPlug []DeviceKind
}

// VM is a started virtual machine. Methods may be called concurrently. After
// the VMM has ended, the methods that need it return errdefs.ErrFailedPrecondition.
type VM interface {
	// Agent is the host's end of the agent channel, the same at each call. It is
	// closed when the VM ends.
	Agent() net.Conn
	// Console is the guest's console from its first byte on. It stays readable
	// after the VM's end.
	Console() *console.Log
	// Pause stops all vCPUs; idempotent.
	Pause(ctx context.Context) error
	// Resume lets them run again; idempotent.
	Resume(ctx context.Context) error
	// Attach plugs a device into the running VM and returns when the guest was
	// told of it. errdefs.ErrNotImplemented for a kind that is not in
	// Capabilities.HotPlug, errdefs.ErrAlreadyExists for an id in use,
	// errdefs.ErrResourceExhausted when nothing more can be plugged. A failed Attach
	// leaves nothing plugged.
	Attach(ctx context.Context, dev Device) error
	// Detach unplugs what Attach or Config.Shares plugged, and returns when the
	// guest has let go of it. The guest must not use it any more; one that does
	// not let go is waited for until ctx ends, and Detach can be called again.
	// errdefs.ErrNotFound for an unknown id.
	Detach(ctx context.Context, id string) error
	// Stop ends the VM as if its power were cut and returns when the VMM is
	// gone; when ctx ends first it kills the VMM and then returns ctx's error.
	// Programs in the guest get no warning: that is the agent's Shutdown.
	Stop(ctx context.Context) error
	// Kill ends the VMM without asking it. It does not wait; see Done.
	Kill() error
	// Done is closed when the VMM has ended and its resources are released.
	Done() <-chan struct{}
	// Err tells after Done why the VM ended: nil after Stop or Kill or when the guest
	// powered itself off, else an *ExitError. Before Done it is nil.
	Err() error
	// Info describes the running VM.
	Info() Info
}

// Resizer is a VM that can grow while it runs; not every driver's can.
type Resizer interface {
	// Resize plugs vCPUs and memory until the VM has at least the size, and returns what it has
	// then: with an error this may be less than asked for, and more than before. It never takes
	// anything away. The guest was told of what came and has yet to use it.
	// errdefs.ErrResourceExhausted for a size above Config.MaxVCPUs or Config.MaxMemoryBytes, and when
	// nothing more can be plugged; the VM is then as large as it can be.
	Resize(ctx context.Context, size Size) (Size, error)
}

// Size is how large a VM is.
type Size struct {
	VCPUs        int
	MemoryBytes  int64
	PluggedBytes int64 // of MemoryBytes, those that were plugged while the VM ran; Resize ignores it
}

// Info describes a running VM for state files and operators.
type Info struct {
	PID     int      // of the VMM
	Command []string // that started the VMM, to reproduce by hand
	Version string   // of the VMM
}

// Config describes a VM. The zero value of an optional field means the
// driver's default.
type Config struct {
	ID          string   // of the pod; used in names and messages
	Binary      string   // VMM program; optional
	Kernel      string   // path of the guest kernel
	Initrd      string   // path of the guest's initramfs
	KernelArgs  []string // appended to the driver's own kernel command line
	Accel       Accel
	VCPUs       int   // at least 1
	MemoryBytes int64 // at least 64 MiB, a multiple of 1 MiB
	// What Resize can make of them, if the driver knows no lower bound; 0: the VM cannot grow.
	MaxVCPUs       int
	MaxMemoryBytes int64
	RunDir         string // existing directory for the driver's files: console.log, VMM log
	Shares         []Share
	User           *User // whom the VMM runs as; nil: as the caller
	// Launch starts the VMM as the command's own Start does, on the same thread, in a cgroup for
	// example; nil: that is enough.
	Launch func(cmd *exec.Cmd) error
}

// User is an identity on the host without any privileges.
type User struct {
	UID, GID uint32
	Groups   []uint32 // such as the one that may use /dev/kvm
}

// DeviceKind names a kind of device.
type DeviceKind string

// The kinds of devices.
const (
	KindShare DeviceKind = "share"
	KindDisk  DeviceKind = "disk"
	KindNIC   DeviceKind = "nic"
)

// Device is a Share, a Disk or a NIC.
type Device interface {
	// DeviceID is unique among the VM's devices: [a-z0-9-], at most 32 bytes.
	DeviceID() string
	DeviceKind() DeviceKind
}

// Share is a directory that a vhost-user file system daemon serves.
type Share struct {
	ID string
	// Tag is what the guest mounts, at most 36 bytes (virtio-fs, section 5.11.4 of VIRTIO 1.2).
	Tag string
	// Socket is the path of the daemon's listening vhost-user socket. The driver
	// connects to it; the VMM needs no access to the path.
	Socket string
}

// DeviceID implements Device.
func (s Share) DeviceID() string { return s.ID }

// DeviceKind implements Device.
func (Share) DeviceKind() DeviceKind { return KindShare }

// Disk is a raw image or block device.
type Disk struct {
	ID       string
	Path     string
	ReadOnly bool
}

// DeviceID implements Device.
func (d Disk) DeviceID() string { return d.ID }

// DeviceKind implements Device.
func (Disk) DeviceKind() DeviceKind { return KindDisk }

// NIC is a network card on a tap device that the caller made.
type NIC struct {
	ID  string
	MAC net.HardwareAddr // shown to the guest
	MTU int              // the largest that the guest may set; 0: 1500
	// Taps are the tap device's queues, opened with IFF_VNET_HDR. VhostNet are as many open /dev/vhost-net,
	// or none. All stay the caller's and may be closed after Attach.
	Taps, VhostNet []*os.File
}

// DeviceID implements Device.
func (n NIC) DeviceID() string { return n.ID }

// DeviceKind implements Device.
func (NIC) DeviceKind() DeviceKind { return KindNIC }

const (
	maxQueues = 256 // of a tap device, in Linux
	minMTU    = 68
	maxMTU    = 65535
)

// Validate tells whether a driver can plug it: errdefs.ErrInvalidArgument.
func (n NIC) Validate() error {
	if err := ValidateDeviceID(n.ID); err != nil {
		return err
	}
	switch {
	case len(n.MAC) != 6 || n.MAC[0]&1 != 0:
		return Errorf(errdefs.ErrInvalidArgument, "address %q: not a unicast address of 6 bytes", n.MAC)
	case n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU):
		return Errorf(errdefs.ErrInvalidArgument, "MTU %d: not within %d and %d", n.MTU, minMTU, maxMTU)
	case len(n.Taps) == 0 || len(n.Taps) > maxQueues:
		return Errorf(errdefs.ErrInvalidArgument, "%d queues: not within 1 and %d", len(n.Taps), maxQueues)
	case len(n.VhostNet) != 0 && len(n.VhostNet) != len(n.Taps):
		return Errorf(errdefs.ErrInvalidArgument, "%d descriptors of vhost-net for %d queues", len(n.VhostNet), len(n.Taps))
	}
	return nil
}

var deviceIDPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// ValidateDeviceID tells whether a text is an id as Device.DeviceID says: errdefs.ErrInvalidArgument.
func ValidateDeviceID(id string) error {
	if !deviceIDPattern.MatchString(id) {
		return Errorf(errdefs.ErrInvalidArgument, "device id %q: small letters, digits and dashes only, at most 32", id)
	}
	return nil
}

// ExitError tells that the VMM ended though nobody asked it to.
type ExitError struct {
	Status  string        // "exit status 1", "signal: killed"
	After   time.Duration // since the start of the VMM
	Stderr  string        // last lines of the VMM's standard error
	Console []string      // last lines of the guest's console, or from its kernel's panic on
}

// Error is one line: the status, then what the VMM and the guest said last.
func (e *ExitError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "VMM ended after %s: %s", e.After.Round(time.Millisecond), e.Status)
	if e.Stderr != "" {
		fmt.Fprintf(&b, "; stderr: %s", strings.Join(strings.Fields(e.Stderr), " "))
	}
	if len(e.Console) > 0 {
		fmt.Fprintf(&b, "; console: %s", strings.Join(e.Console, " | "))
	}
	return b.String()
}
