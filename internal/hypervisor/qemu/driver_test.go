package qemu_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu"
)

func driver() *qemu.Driver { return qemu.New(slog.New(slog.DiscardHandler)) }

func TestFind(t *testing.T) {
	path, version, err := qemu.Find(t.Context(), "")
	assert.NilError(t, err)
	assert.Assert(t, filepath.IsAbs(path) && version[0] >= '0' && version[0] <= '9', "%s %s", path, version)
	firmware, err := qemu.FindFirmware(path)
	assert.NilError(t, err)
	assert.Equal(t, filepath.Base(firmware), "qboot.rom")
}

func TestFindRefuses(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	assert.NilError(t, os.WriteFile(plain, nil, 0o644))
	for _, c := range []struct {
		name, binary, text string
		is                 func(error) bool
	}{
		{"missing", filepath.Join(dir, "nothing"), "no such file", errdefs.IsNotFound},
		{"missing in PATH", "qemu-of-nowhere", "install", errdefs.IsNotFound},
		{"not executable", plain, "permission denied", errdefs.IsPermissionDenied},
		{"not QEMU", script(t, "echo hello"), "not QEMU", errdefs.IsInvalidArgument},
		{"fails", script(t, "exit 3"), "exit status 3", errdefs.IsInvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := qemu.Find(t.Context(), c.binary)
			var file *qemu.FileError
			assert.Assert(t, errors.As(err, &file) && file.Remedy != "", "%v", err)
			assert.Assert(t, c.is(err), "%v", err)
			assert.ErrorContains(t, err, c.text)
			assert.ErrorContains(t, err, c.binary)
		})
	}
}

// script is a program that stands for QEMU. Descriptor 5 is its QMP socket.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	assert.NilError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755))
	return path
}

// scriptConfig needs no guest.
func scriptConfig(t *testing.T, text string) hypervisor.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	assert.NilError(t, os.WriteFile(file, nil, 0o644))
	return hypervisor.Config{
		ID: "test", Binary: script(t, text), Kernel: file, Initrd: file, Accel: hypervisor.TCG, VCPUs: 1,
		MemoryBytes: 64 << 20, RunDir: t.TempDir(),
	}
}

func TestStartRefuses(t *testing.T) {
	private := filepath.Join(t.TempDir(), "private")
	assert.NilError(t, os.WriteFile(private, nil, 0o600))
	for _, c := range []struct {
		name   string
		change func(*hypervisor.Config)
		text   string
		is     func(error) bool
	}{
		{"id", func(c *hypervisor.Config) { c.ID = "a,b" }, "id", errdefs.IsInvalidArgument},
		{"run directory", func(c *hypervisor.Config) { c.RunDir = "/nowhere" }, "/nowhere", errdefs.IsInvalidArgument},
		{"odd memory", func(c *hypervisor.Config) { c.MemoryBytes++ }, "memory", errdefs.IsInvalidArgument},
		{"many vcpus", func(c *hypervisor.Config) { c.VCPUs = 1000 }, "vcpus", errdefs.IsInvalidArgument},
		{"QEMU", func(c *hypervisor.Config) { c.Binary = "/nowhere/qemu" }, "/nowhere/qemu", errdefs.IsNotFound},
		{"kernel is a directory", func(c *hypervisor.Config) { c.Kernel = c.RunDir }, "not a regular file", errdefs.IsInvalidArgument},
		{"kernel the VMM may not read", func(c *hypervisor.Config) {
			c.Kernel, c.User = private, &hypervisor.User{UID: 65534, GID: 65534}
		}, "readable for all", errdefs.IsPermissionDenied},
		{"program the VMM may not run", func(c *hypervisor.Config) {
			c.User = &hypervisor.User{UID: 65534, GID: 65534} // the script's directory is private
		}, "may the user of the VMM execute it", errdefs.IsPermissionDenied},
		{"share's id", func(c *hypervisor.Config) {
			c.Shares = []hypervisor.Share{{ID: "A", Tag: "a"}}
		}, "device id", errdefs.IsInvalidArgument},
		{"share's tag", func(c *hypervisor.Config) {
			c.Shares = []hypervisor.Share{{ID: "a", Tag: strings.Repeat("x", 37)}}
		}, "tag", errdefs.IsInvalidArgument},
		{"share's socket", func(c *hypervisor.Config) {
			c.Shares = []hypervisor.Share{{ID: "a", Tag: "a", Socket: "/nowhere"}}
		}, "connect share a", func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
		{"many shares", func(c *hypervisor.Config) {
			c.Shares = make([]hypervisor.Share, 32)
		}, "at most", errdefs.IsResourceExhausted},
	} {
		t.Run(c.name, func(t *testing.T) {
			expectNoLeak(t)
			cfg := scriptConfig(t, "exec sleep 1000")
			c.change(&cfg)
			vm, err := driver().Start(t.Context(), cfg)
			assert.Assert(t, vm == nil)
			assert.Assert(t, c.is(err), "%v", err)
			assert.ErrorContains(t, err, c.text)
		})
	}
}

// greet is a script's part of a QMP negotiation.
const greet = `echo '{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}}}}' >&5
read line <&5
echo '{"return": {}, "id": "1"}' >&5
`

// What QEMU says when it ends during the start reaches the caller.
func TestStartFails(t *testing.T) {
	expectNoLeak(t)
	cfg := scriptConfig(t, "echo '-device what: no such device' >&2; exit 7")
	_, err := driver().Start(t.Context(), cfg)
	var exit *hypervisor.ExitError
	assert.Assert(t, errors.As(err, &exit), "%v", err)
	assert.Equal(t, exit.Status, "exit status 7")
	assert.Equal(t, exit.Stderr, "-device what: no such device")
	log, err := os.ReadFile(filepath.Join(cfg.RunDir, "qemu.log"))
	assert.NilError(t, err)
	assert.Equal(t, string(log), "-device what: no such device\n")
}

func TestStartTimeout(t *testing.T) {
	expectNoLeak(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := driver().Start(ctx, scriptConfig(t, "exec sleep 1000"))
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestStartGarbage(t *testing.T) {
	expectNoLeak(t)
	_, err := driver().Start(t.Context(), scriptConfig(t, "echo garbage >&5; exec sleep 1000"))
	assert.ErrorContains(t, err, "qmp greeting")
}

// A QEMU that breaks the protocol is ended, as nobody can control it.
func TestGarbageLater(t *testing.T) {
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), scriptConfig(t, greet+"echo garbage >&5; exec sleep 1000"))
	assert.NilError(t, err)
	<-vm.Done()
	assert.ErrorContains(t, vm.Err(), "QMP connection lost")
	assert.Equal(t, vm.Info().Version, "9.0.0")
}

// A QEMU that does not obey quit is killed.
func TestStopDisobeyed(t *testing.T) {
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), scriptConfig(t, greet+"exec sleep 1000"))
	assert.NilError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	assert.ErrorIs(t, vm.Stop(ctx), context.DeadlineExceeded)
	<-vm.Done()
	assert.NilError(t, vm.Err())
}

// A command that QEMU does not answer ends with its context.
func TestCommandTimeout(t *testing.T) {
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), scriptConfig(t, greet+"exec sleep 1000"))
	assert.NilError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	assert.ErrorIs(t, vm.Pause(ctx), context.DeadlineExceeded)
	assert.NilError(t, vm.Kill())
	<-vm.Done()
}

// What QEMU may not have.
func TestConfinement(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), config(t))
	assert.NilError(t, err)
	defer stop(t, vm)
	proc := fmt.Sprintf("/proc/%d/", vm.Info().PID)

	text, err := os.ReadFile(proc + "status")
	assert.NilError(t, err)
	status := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.Join(strings.Fields(value), " ")
	}
	for key, want := range map[string]string{
		"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "",
		"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2", "Umask": "0077",
	} {
		assert.Check(t, is.Equal(status[key], want), key)
	}
	session, err := unix.Getsid(vm.Info().PID)
	assert.NilError(t, err)
	assert.Equal(t, session, vm.Info().PID)
	for _, ns := range []string{"net", "ipc", "uts"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		assert.NilError(t, err)
		its, err := os.Readlink(proc + "ns/" + ns)
		assert.NilError(t, err)
		assert.Assert(t, own != its, ns)
	}
	environ, err := os.ReadFile(proc + "environ")
	assert.NilError(t, err)
	assert.Equal(t, string(environ), "PATH=/usr/sbin:/usr/bin:/sbin:/bin\x00LC_ALL=C\x00")
	fds, err := filepath.Glob(proc + "fd/*")
	assert.NilError(t, err)
	for _, fd := range fds {
		target, _ := os.Readlink(fd)
		known := slices.ContainsFunc([]string{"socket:", "pipe:", "anon_inode:", "/dev/null", "/memfd:", "/dev/zero"},
			func(prefix string) bool { return strings.HasPrefix(target, prefix) })
		number, _ := strconv.Atoi(filepath.Base(fd))
		assert.Check(t, known || number == 3 || number == 4, "QEMU has %s open as %d", target, number)
	}
}

// The end of the process that started QEMU, even by SIGKILL, ends QEMU.
func TestParentDeath(t *testing.T) {
	needVM(t)
	cfg := config(t)
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), parentEnv+"="+cfg.RunDir, "RUNV_TEST_INITRD="+cfg.Initrd)
	out, err := parent.StdoutPipe()
	assert.NilError(t, err)
	parent.Stderr = os.Stderr
	assert.NilError(t, parent.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	assert.NilError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	assert.NilError(t, err)
	fd, err := unix.PidfdOpen(pid, 0)
	assert.NilError(t, err)
	defer unix.Close(fd)
	assert.NilError(t, parent.Process.Kill())
	assert.ErrorContains(t, parent.Wait(), "killed")
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000)
	assert.NilError(t, err)
	assert.Equal(t, n, 1, "QEMU outlives the process that started it")
}

// parentEnv makes the test program start a VM in the given run directory and wait to be killed.
const parentEnv = "RUNV_TEST_PARENT"

func beParent(runDir string) {
	vm, err := driver().Start(context.Background(), hypervisor.Config{
		ID: "child", Kernel: filepath.Join(guestDir(), "vmlinux"), Initrd: os.Getenv("RUNV_TEST_INITRD"),
		Accel: hypervisor.TCG, VCPUs: 1, MemoryBytes: 64 << 20, RunDir: runDir,
		User: &hypervisor.User{UID: 65534, GID: 65534},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(vm.Info().PID)
	<-vm.Done()
}

// QEMU obeys a polite signal with exit status 0, which nobody here asked for.
func TestTerminatedFromOutside(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), config(t))
	assert.NilError(t, err)
	assert.NilError(t, syscall.Kill(vm.Info().PID, syscall.SIGTERM))
	<-vm.Done()
	assert.ErrorContains(t, vm.Err(), "host-signal")
}

// A guest with two processors boots, and its console is kept from the first byte.
func TestTwoVCPUs(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	cfg := config(t)
	cfg.VCPUs = 2
	cfg.KernelArgs = append(cfg.KernelArgs, "loglevel=7")
	vm, err := driver().Start(t.Context(), cfg)
	assert.NilError(t, err)
	defer stop(t, vm)
	assert.NilError(t, vm.Agent().SetDeadline(time.Now().Add(time.Minute)))
	fmt.Fprintln(vm.Agent(), "echo two")
	line, err := bufio.NewReader(vm.Agent()).ReadString('\n')
	assert.NilError(t, err, "%q", vm.Console().Tail(20))
	assert.Equal(t, line, "ok two\n")
	log, err := os.ReadFile(filepath.Join(cfg.RunDir, "console.log"))
	assert.NilError(t, err)
	assert.Check(t, is.Contains(string(log[:200]), "Linux version"))
	assert.Check(t, is.Contains(string(log), "Total of 2 processors activated"))
}

// A device that the guest never lets go of, here as it has no kernel any more that
// could, does not hold Detach beyond its context.
func TestDetachRefused(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	cfg := config(t)
	cfg.Shares = []hypervisor.Share{{ID: "a", Tag: "a", Socket: serveShare(t, t.TempDir())}}
	vm, err := driver().Start(t.Context(), cfg)
	assert.NilError(t, err)
	defer stop(t, vm)
	assert.NilError(t, vm.Pause(t.Context()))
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		err = vm.Detach(ctx, "a")
		cancel()
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}
	assert.NilError(t, vm.Kill())
	<-vm.Done()
	assert.Assert(t, errdefs.IsFailedPrecondition(vm.Detach(t.Context(), "a")))
}

// The driver takes no more devices than it has slots for.
func TestSlotsExhausted(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), config(t))
	assert.NilError(t, err)
	defer stop(t, vm)
	const slots = 30 // behind the one bridge of a VM without shares, beside the agent channel
	w := newWire(t, slots+1)
	for i, tap := range w.Taps {
		err := vm.Attach(t.Context(), hypervisor.NIC{
			ID: fmt.Sprintf("n%d", i), MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}, Taps: []*os.File{tap},
		})
		if i < slots {
			assert.NilError(t, err)
		} else {
			assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
		}
	}
}

// QEMU has no more files open after a NIC was unplugged, or could not be plugged.
func TestNICLeavesNoFile(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	cfg := config(t)
	cfg.VCPUs = 2
	vm, err := driver().Start(t.Context(), cfg)
	assert.NilError(t, err)
	defer stop(t, vm)
	answers := bufio.NewReader(vm.Agent())
	ask := func(request string) {
		t.Helper()
		assert.NilError(t, vm.Agent().SetDeadline(time.Now().Add(time.Minute)))
		fmt.Fprintln(vm.Agent(), request)
		line, err := answers.ReadString('\n')
		assert.NilError(t, err)
		assert.Assert(t, strings.HasPrefix(line, "ok "), line)
	}
	ask("echo ready")
	files := func() int {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", vm.Info().PID))
		assert.NilError(t, err)
		return len(fds)
	}
	before := files()
	null, err := os.Open("/dev/null")
	assert.NilError(t, err)
	defer null.Close()
	for range 3 {
		w := newWire(t, 2)
		nic := hypervisor.NIC{ID: "eth", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Taps: w.Taps}
		assert.NilError(t, vm.Attach(t.Context(), nic))
		ask(fmt.Sprintf("nic %s %s", nic.MAC, w.Address))
		w.Ping(t)
		assert.NilError(t, vm.Detach(t.Context(), "eth"))

		nic.Taps = []*os.File{null, null}
		err := vm.Attach(t.Context(), nic)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.ErrorContains(t, err, "attach nic eth: /dev/null is no tap device")
		nic.Taps = newWire(t, 1).Taps
		nic.VhostNet = []*os.File{null}
		err = vm.Attach(t.Context(), nic)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.ErrorContains(t, err, "attach nic eth: /dev/null is no vhost-net")
		nic.VhostNet, nic.Taps = nil, slices.Repeat(nic.Taps, 2) // a device of one queue has no two
		err = vm.Attach(t.Context(), nic)
		assert.ErrorContains(t, err, "attach nic eth: tap0 is no tap device with several queues")
	}
	// A descriptor is closed when all of QEMU's threads have seen that it goes.
	for end := time.Now().Add(10 * time.Second); files() > before; <-time.After(10 * time.Millisecond) {
		assert.Assert(t, time.Now().Before(end), "QEMU had %d files open and has %d", before, files())
	}
}

func stop(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	if err := vm.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// expectNoLeak compares goroutines and descriptors at the end of the test with now.
func expectNoLeak(t *testing.T) {
	t.Helper()
	goroutines := goleak.IgnoreCurrent()
	before, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	t.Cleanup(func() {
		goleak.VerifyNone(t, goroutines)
		after, err := os.ReadDir("/proc/self/fd")
		assert.NilError(t, err)
		assert.Assert(t, len(after) <= len(before)+2, "%d descriptors, were %d", len(after), len(before)) // the runtime's poller comes late
	})
}

// A daemon that hangs up makes Attach fail, and leaves id and slot free.
func TestAttachBrokenDaemon(t *testing.T) {
	needVM(t)
	expectNoLeak(t)
	vm, err := driver().Start(t.Context(), config(t))
	assert.NilError(t, err)
	defer stop(t, vm)
	socket := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", socket)
	assert.NilError(t, err)
	defer l.Close()
	hungUp := make(chan struct{})
	go func() {
		defer close(hungUp)
		for range 5 {
			conn, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
		}
	}()
	for range 5 {
		err := vm.Attach(t.Context(), hypervisor.Share{ID: "a", Tag: "a", Socket: socket})
		assert.ErrorContains(t, err, "attach share a: qmp device_add:")
	}
	<-hungUp
	assert.NilError(t, vm.Attach(t.Context(), hypervisor.Share{ID: "a", Tag: "a", Socket: serveShare(t, t.TempDir())}))
	assert.NilError(t, vm.Resume(t.Context()))
}
