// Package qemu is the hypervisor.Driver that runs QEMU.
//
// It starts one QEMU process a VM, controls it over QMP (package qmp), keeps its
// console and its standard error, and waits for it. QEMU gets every file and socket
// as an inherited descriptor; it runs with a clean environment, in a session of
// its own, as Config.User and dies with the process that started it.
//
// The factory calls it. It knows no containers, pods or state files, writes only
// console.log and qemu.log in Config.RunDir, and starts no other program.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/console"
	"runv/internal/hypervisor"
)

const (
	consoleFile = "console.log"
	vmmFile     = "qemu.log"

	startTimeout = 30 * time.Second // until QEMU has answered on QMP
	minMemory    = 64 << 20
	maxVCPUs     = 255       // what the q35 machine without an IOMMU takes
	maxGrown     = 512 << 30 // bytes: what an address of 40 bits reaches, and room to align in
	firstFD      = 3         // of exec.Cmd.ExtraFiles in the child
)

// idPattern is what Config.ID and device ids look like, as they are part of QEMU's options.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Driver runs VMs with QEMU.
type Driver struct {
	log *slog.Logger
}

// New makes a driver. It starts nothing.
func New(log *slog.Logger) *Driver {
	return &Driver{log: log}
}

// Name implements hypervisor.Driver.
func (*Driver) Name() string { return "qemu" }

// Capabilities implements hypervisor.Driver.
func (*Driver) Capabilities() hypervisor.Capabilities {
	return hypervisor.Capabilities{
		Accels:  []hypervisor.Accel{hypervisor.KVM, hypervisor.TCG},
		HotPlug: []hypervisor.DeviceKind{hypervisor.KindShare, hypervisor.KindNIC},
	}
}

// Start implements hypervisor.Driver. Errors beyond the contract's: *FileError for
// a file that cannot be used.
func (d *Driver) Start(ctx context.Context, cfg hypervisor.Config) (hypervisor.VM, error) {
	v, err := d.start(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("start VM %s: %w", cfg.ID, err)
	}
	return v, nil
}

func (d *Driver) start(ctx context.Context, cfg hypervisor.Config) (*vm, error) {
	if err := validate(cfg); err != nil {
		return nil, err
	}
	l := &launch{cfg: cfg, tsc: lookTSC()}
	defer l.close()
	if err := l.prepare(ctx); err != nil {
		return nil, err
	}
	if cfg.Accel == hypervisor.TCG {
		l.machine.TSCKHz = tscKHz(l.tsc)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return l.run(ctx, d.log.With("vm", cfg.ID))
}

func validate(cfg hypervisor.Config) error {
	invalid := func(format string, args ...any) error {
		return hypervisor.Errorf(errdefs.ErrInvalidArgument, format, args...)
	}
	switch {
	case !idPattern.MatchString(cfg.ID):
		return invalid("id %q: letters, digits, dot, dash and underscore only", cfg.ID)
	case cfg.Accel != hypervisor.KVM && cfg.Accel != hypervisor.TCG:
		return invalid("accelerator %q: not one of kvm, tcg", cfg.Accel)
	case cfg.VCPUs < 1 || cfg.VCPUs > maxVCPUs:
		return invalid("%d vcpus: not within 1 and %d", cfg.VCPUs, maxVCPUs)
	case cfg.MemoryBytes < minMemory || cfg.MemoryBytes%(1<<20) != 0:
		return invalid("memory of %d bytes: not a multiple of 1 MiB from 64 MiB", cfg.MemoryBytes)
	case cfg.MaxVCPUs < 0:
		return invalid("at most %d vcpus: less than 0", cfg.MaxVCPUs)
	case cfg.MaxMemoryBytes < 0 || cfg.MaxMemoryBytes%(1<<20) != 0:
		return invalid("memory of at most %d bytes: not a multiple of 1 MiB", cfg.MaxMemoryBytes)
	case len(cfg.Shares) > bridgeSlots:
		return hypervisor.Errorf(errdefs.ErrResourceExhausted, "%d shares: at most %d", len(cfg.Shares), bridgeSlots)
	}
	seen := map[string]bool{}
	for _, s := range cfg.Shares {
		if err := validateShare(s); err != nil {
			return err
		}
		if seen[s.ID] {
			return hypervisor.Errorf(errdefs.ErrAlreadyExists, "device %s is there already", s.ID)
		}
		seen[s.ID] = true
	}
	if info, err := os.Stat(cfg.RunDir); err != nil || !info.IsDir() {
		return invalid("run directory %q: not a directory", cfg.RunDir)
	}
	return nil
}

// launch is what is acquired before QEMU runs. close gives back what QEMU or the VM
// did not take over.
type launch struct {
	cfg     hypervisor.Config
	tsc     tscLook // when the start began
	binary  string
	machine Machine
	passed  []*os.File // to QEMU, from descriptor firstFD on
	opened  []io.Closer

	qmp, agent, console *net.UnixConn
	consoleLog, vmmLog  *console.Log
}

// close is idempotent.
func (l *launch) close() {
	for _, f := range l.passed {
		f.Close()
	}
	for _, c := range l.opened {
		c.Close()
	}
	l.passed, l.opened = nil, nil
}

// pass gives a file to QEMU and returns its number there.
func (l *launch) pass(f *os.File) int {
	l.passed = append(l.passed, f)
	return firstFD + len(l.passed) - 1
}

// channel makes a socket pair, passes one end and returns the other.
func (l *launch) channel(name string) (*net.UnixConn, int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("make %s channel: %w", name, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	number := l.pass(theirs)
	conn, err := net.FileConn(ours) // a duplicate
	ours.Close()
	if err != nil {
		return nil, 0, fmt.Errorf("make %s channel: %w", name, err)
	}
	l.opened = append(l.opened, conn)
	return conn.(*net.UnixConn), number, nil
}

// prepare acquires everything but the process.
func (l *launch) prepare(ctx context.Context) error {
	l.cfg.MaxVCPUs = min(l.cfg.MaxVCPUs, maxVCPUs)
	if more := min(l.cfg.MaxMemoryBytes, maxGrown) - l.cfg.MemoryBytes; more > 0 {
		l.cfg.MaxMemoryBytes = l.cfg.MemoryBytes + inDIMMs(more)
	}
	cfg, m := l.cfg, &l.machine
	*m = Machine{
		Name: cfg.ID, Accel: cfg.Accel, VCPUs: cfg.VCPUs, MemoryBytes: cfg.MemoryBytes, KernelArgs: cfg.KernelArgs,
		MaxVCPUs: cfg.MaxVCPUs, MaxMemory: cfg.MaxMemoryBytes,
	}
	var err error
	if l.binary, err = findBinary(cfg.Binary); err != nil {
		return err
	}
	if m.Firmware, err = FindFirmware(l.binary); err != nil {
		return err
	}
	kernel, err := openInput("guest kernel", cfg.Kernel, cfg.User)
	if err != nil {
		return err
	}
	m.KernelFD = l.pass(kernel)
	initrd, err := openInput("guest initramfs", cfg.Initrd, cfg.User)
	if err != nil {
		return err
	}
	m.InitrdFD = l.pass(initrd)
	if l.qmp, m.QMPFD, err = l.channel("qmp"); err != nil {
		return err
	}
	if l.agent, m.AgentFD, err = l.channel("agent"); err != nil {
		return err
	}
	if l.console, m.ConsoleFD, err = l.channel("console"); err != nil {
		return err
	}
	for _, s := range cfg.Shares {
		f, err := dialShare(ctx, s)
		if err != nil {
			return err
		}
		m.Shares = append(m.Shares, ShareFD{ID: s.ID, Tag: s.Tag, FD: l.pass(f)})
	}
	if l.consoleLog, err = l.logFile(consoleFile); err != nil {
		return err
	}
	l.vmmLog, err = l.logFile(vmmFile)
	return err
}

func (l *launch) logFile(name string) (*console.Log, error) {
	log, err := console.New(filepath.Join(l.cfg.RunDir, name))
	if err != nil {
		return nil, err
	}
	l.opened = append(l.opened, log)
	return log, nil
}

// run starts QEMU and returns when it can be controlled, or has ended.
func (l *launch) run(ctx context.Context, log *slog.Logger) (*vm, error) {
	cmd := exec.Command(l.binary, Args(l.machine)...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.ExtraFiles = l.passed
	cmd.Stdout, cmd.Stderr = l.vmmLog, l.vmmLog
	cmd.WaitDelay = drainTimeout
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:    true, // a terminal's signals are not for QEMU
		Pdeathsig: syscall.SIGKILL,
		// What QEMU speaks with it has as open descriptors: a network and System V objects are nothing for it.
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	if u := l.cfg.User; u != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	proc, err := startProcess(cmd, l.cfg.Launch)
	if err != nil {
		return nil, startError(l.binary, err)
	}
	v := newVM(log, l, proc)
	l.opened = nil // the VM's now
	l.close()      // QEMU has its own copies; an end we kept would hide QEMU's end
	if err := v.connect(ctx, l.qmp); err != nil {
		return nil, err
	}
	return v, nil
}

// startError says what kept the program from running.
func startError(binary string, err error) error {
	if _, ok := errors.AsType[*os.PathError](err); ok {
		return &FileError{"QEMU", binary, "may the user of the VMM execute it?", err}
	}
	return err
}
