package qemu_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/hvtest"
	"runv/internal/hypervisor/qemu"
)

// The tests in this file start QEMU, nearly all as a user without privileges, so they run as root.

func TestConformance(t *testing.T) {
	needVM(t)
	hvtest.Run(t, hvtest.Harness{
		Driver:     qemu.New(slog.New(slog.DiscardHandler)),
		Config:     config,
		ServeShare: serveShare,
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
	initrd := filepath.Join(testDir, "initrd.cpio")
	return initrd, os.WriteFile(initrd, append(image, archive("testguest", binary)...), 0o644)
})

// archive is a cpio archive, format newc, of one executable file.
func archive(name string, content []byte) []byte {
	var b bytes.Buffer
	entry := func(name string, mode, size int) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
		pad(&b)
	}
	entry(name, 0o100755, len(content))
	b.Write(content)
	pad(&b)
	entry("TRAILER!!!", 0, 0)
	return b.Bytes()
}

func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

var testDir string

func TestMain(m *testing.M) {
	if runDir := os.Getenv(parentEnv); runDir != "" {
		beParent(runDir)
		return
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

// serveShare runs a real daemon. It ends when QEMU disconnects, or with the test.
func serveShare(t *testing.T, dir string) string {
	t.Helper()
	binary := "/usr/lib/qemu/virtiofsd"
	if found, err := exec.LookPath("virtiofsd"); err == nil {
		binary = found
	}
	socket := filepath.Join(t.TempDir(), "sock")
	args := []string{"--socket-path=" + socket, "-o", "source=" + dir, "-o", "cache=auto"}
	if help, _ := exec.Command(binary, "--help").CombinedOutput(); bytes.Contains(help, []byte("--shared-dir")) {
		args = []string{"--socket-path=" + socket, "--shared-dir=" + dir, "--cache=auto"}
	}
	cmd := exec.Command(binary, args...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	assert.NilError(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		if t.Failed() {
			t.Logf("virtiofsd: %s", output.Bytes())
		}
	})
	for {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		select {
		case <-ended:
			t.Fatalf("virtiofsd ended: %s", output.Bytes())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
