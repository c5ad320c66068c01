package qemu_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/image/initramfs"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/hvtest"
	"runv/internal/hypervisor/qemu"
	"runv/internal/shareserver"
	"runv/internal/unixsock"
)

// The tests in this file start QEMU, nearly all as a user without privileges, so they run as root.

func TestConformance(t *testing.T) {
	needVM(t)
	hvtest.Run(t, hvtest.Harness{
		Driver:     qemu.New(slog.New(slog.DiscardHandler)),
		Config:     config,
		ServeShare: serveShare,
		NewWire:    newWire,
		KillVMM: func(t *testing.T, vm hypervisor.VM) {
			assert.NilError(t, syscall.Kill(vm.Info().PID, syscall.SIGKILL))
		},
		PauseFreezes: true,
	})
}

func needVM(t *testing.T) {
	if testing.Short() {
		t.Skip("starts VMs")
	}
}

// config boots the test guest as an unprivileged user.
func config(t *testing.T) hypervisor.Config {
	t.Helper()
	initrd, err := testInitrd()
	assert.NilError(t, err)
	return hypervisor.Config{
		ID:          "test",
		Kernel:      filepath.Join(guestDir(), "vmlinux"),
		Initrd:      initrd,
		KernelArgs:  []string{"rdinit=/testguest"},
		Accel:       hypervisor.TCG,
		VCPUs:       1,
		MemoryBytes: 256 << 20,
		RunDir:      t.TempDir(),
		User:        &hypervisor.User{UID: 65534, GID: 65534},
	}
}

func guestDir() string {
	if dir := os.Getenv("RUNV_GUEST_DIR"); dir != "" {
		return dir
	}
	return "../../../build/guest"
}

// testInitrd is the guest image's initramfs with the test guest appended, made once.
var testInitrd = sync.OnceValues(func() (string, error) {
	image, err := os.ReadFile(filepath.Join(guestDir(), "initrd.cpio"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: build the guest's files first (make), or set RUNV_GUEST_DIR", err)
	}
	if err != nil {
		return "", err
	}
	program := filepath.Join(testDir, "testguest")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "runv/internal/hypervisor/hvtest/testguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build test guest: %w: %s", err, out)
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	var extra initramfs.Archive
	if err := extra.File("testguest", 0o755, binary); err != nil {
		return "", err
	}
	all := bytes.NewBuffer(image)
	if _, err := extra.WriteTo(all); err != nil {
		return "", err
	}
	initrd := filepath.Join(testDir, "initrd.cpio")
	return initrd, os.WriteFile(initrd, all.Bytes(), 0o644)
})

var testDir string

func TestMain(m *testing.M) {
	if runDir := os.Getenv(parentEnv); runDir != "" {
		beParent(runDir)
		return
	}
	if len(os.Args) > 2 && os.Args[1] == shareserver.Face {
		os.Exit(shareserver.Main(os.Args[2:]))
	}
	dir, err := os.MkdirTemp("", "runv-qemu-test-")
	if err != nil {
		panic(err)
	}
	testDir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// serveShare runs a real share server. It ends when QEMU disconnects, or with the test.
func serveShare(t *testing.T, dir string) string {
	t.Helper()
	// A socket of ours listens before the server runs, so nobody comes too early.
	runDir := t.TempDir()
	l, err := unixsock.Listen(runDir, "sock", "unix")
	assert.NilError(t, err)
	f, err := l.File()
	assert.NilError(t, err)
	assert.NilError(t, l.Close())
	control, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, unix.Close(control[0])) })
	theirs := os.NewFile(uintptr(control[1]), "control")
	cmd := shareserver.Command(dir, f, theirs)
	cmd.SysProcAttr.Pdeathsig = 0 // the thread that starts it may end before the test does
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	assert.NilError(t, cmd.Start())
	assert.NilError(t, f.Close())
	assert.NilError(t, theirs.Close())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		if t.Failed() {
			t.Logf("share server: %s", output.Bytes())
		}
	})
	return filepath.Join(runDir, "sock")
}

// wires counts the networks that the guest's devices are in, which must not overlap.
var wires atomic.Uint32

// newWire makes a tap device in a network namespace of its own.
func newWire(t *testing.T, queues int) hvtest.Wire {
	t.Helper()
	n := byte(wires.Add(1))
	w := hvtest.Wire{Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, n, 2}), 24)}
	var netns *os.File
	assert.NilError(t, onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if netns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		for range queues {
			tap, err := openTap(queues > 1)
			if err != nil {
				return err
			}
			w.Taps = append(w.Taps, tap)
		}
		link, err := netlink.LinkByName(tapName)
		if err != nil {
			return err
		}
		address := &netlink.Addr{IPNet: &net.IPNet{IP: net.IP{10, 99, n, 1}, Mask: net.CIDRMask(24, 32)}}
		return errors.Join(netlink.AddrAdd(link, address), netlink.LinkSetMTU(link, 9000), netlink.LinkSetUp(link))
	}))
	t.Cleanup(func() {
		w.Close()
		netns.Close()
	})
	w.Ping = func(t *testing.T) {
		t.Helper()
		assert.NilError(t, onThread(func() error {
			if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return knock(w.Address.Addr())
		}))
	}
	return w
}

const tapName = "tap0"

func openTap(several bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(tapName)
	if err != nil {
		return nil, err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if several {
		flags |= unix.IFF_MULTI_QUEUE
	}
	request.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), tapName), nil
}

// knock waits until somebody says that nobody listens: that is an answer.
func knock(at netip.Addr) error {
	conn, err := net.Dial("udp", netip.AddrPortFrom(at, 9).String())
	if err != nil {
		return err
	}
	defer conn.Close()
	for range 100 {
		if _, err := conn.Write([]byte("hello")); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return err
		}
		_, err = conn.Read(make([]byte, 1))
		if errors.Is(err, unix.ECONNREFUSED) {
			return nil
		}
	}
	return err
}

// onThread calls f on a thread that ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- f()
	}()
	return <-done
}
