package standin_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/internal/standin"
)

// TestShowRoot looks at a stand-in's file system as engines do: from its mount namespace.
func TestShowRoot(t *testing.T) {
	s, p := start(t, standin.StartOptions{NewMountNS: true})
	dir := t.TempDir()
	rootfs := filepath.Join(dir, "rootfs")
	for _, sub := range []string{"rootfs/bin", "rootfs/proc", "rootfs/data", "rootfs/ro", "volume"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	busybox, err := os.ReadFile("/bin/busybox")
	assert.NilError(t, err)
	for name, data := range map[string]string{"rootfs/bin/busybox": string(busybox), "rootfs/file": "", "single": "one file", "volume/in": "in the volume"} {
		assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(data), 0o755))
	}
	assert.NilError(t, os.Symlink("/data", filepath.Join(rootfs, "link")))
	assert.NilError(t, os.Symlink("/../../../etc", filepath.Join(rootfs, "escape")))

	assert.NilError(t, s.ShowRoot(standin.Root{Path: rootfs, Mounts: []standin.RootMount{
		{Destination: "/proc"},
		{Destination: "/link", Source: filepath.Join(dir, "volume")},
		{Destination: "/ro", Source: filepath.Join(dir, "volume"), ReadOnly: true},
		{Destination: "file", Source: filepath.Join(dir, "single")},
		{Destination: "/missing", Source: filepath.Join(dir, "volume")},
		{Destination: "/escape/passwd", Source: filepath.Join(dir, "single")},
		{Destination: "/bin/busybox/x"},
		{Destination: "/bin/busybox", Source: filepath.Join(dir, "volume")}, // a directory on a file
	}}))
	inside := func(script string) string {
		t.Helper()
		out, _ := exec.Command("nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", s.PID), "/bin/busybox", "sh", "-c", script).CombinedOutput()
		return string(out)
	}
	assert.Equal(t, inside("busybox ls /; busybox ls -A /proc; cd /data; busybox cat in /file"), "bin\ndata\nescape\nfile\nlink\nproc\nro\nin the volumeone file")
	assert.Assert(t, cmp.Contains(inside("echo x >/ro/x; echo x >/proc/x"), "Read-only file system"))
	assert.Equal(t, inside("echo made >/data/made; echo made >/made"), "")
	for _, made := range []string{"volume/made", "rootfs/made"} {
		_, err := os.Stat(filepath.Join(dir, made))
		assert.NilError(t, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	assert.NilError(t, err)
	assert.Assert(t, !cmp.Contains(string(mounts), dir)().Success(), "the host sees none of it")

	// It goes on as it was.
	served := make(chan error, 1)
	heard := make(chan int)
	go func() { served <- p.Serve(t.Context(), func(n int) { heard <- n }, nil) }()
	assert.NilError(t, s.Signal(unix.SIGUSR1))
	assert.Equal(t, <-heard, int(unix.SIGUSR1))
	assert.NilError(t, p.Exit(3))
	status, err := s.Wait()
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(3))
	assert.NilError(t, <-served)
}

// TestShowRootNeedsNamespace keeps the caller's own root from being taken away.
func TestShowRootNeedsNamespace(t *testing.T) {
	s, _ := start(t, standin.StartOptions{})
	assert.ErrorContains(t, s.ShowRoot(standin.Root{Path: t.TempDir()}), "no mount namespace of its own")
}
