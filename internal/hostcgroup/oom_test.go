package hostcgroup_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/hostcgroup"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hostcgroup.VictimFace {
		os.Exit(hostcgroup.Victim())
	}
	os.Exit(m.Run())
}

// TestTellOOM watches as containerd's shim and conmon do, and looks whether anybody else came to harm.
func TestTellOOM(t *testing.T) {
	if hostcgroup.Probe().Version != 1 {
		t.Skip("the watch below is one of cgroup v1")
	}
	for name, r := range map[string]*specs.LinuxResources{
		"limited":   {Memory: &specs.LinuxMemory{Limit: new(int64(64 << 20))}},
		"unlimited": nil,
	} {
		t.Run(name, func(t *testing.T) {
			g, _ := create(t, hostcgroup.Container{ID: fmt.Sprintf("runv-test-oom-%s-%d", name, os.Getpid()), Resources: r, VMMemory: 192 << 20})
			assert.NilError(t, g.Limit(r, 192<<20))
			inside := exec.Command("sleep", "1000")
			assert.NilError(t, g.Start(inside))
			defer func() {
				assert.Check(t, inside.Process.Kill())
				_ = inside.Wait()
			}()
			before, err := g.Stats(nil)
			assert.NilError(t, err)
			dir := memoryDir(t, inside.Process.Pid)
			heard := watchOOM(t, dir)

			assert.NilError(t, g.TellOOM())
			assert.NilError(t, heard.SetReadDeadline(time.Now().Add(5*time.Second)))
			count := make([]byte, 8)
			_, err = heard.Read(count)
			assert.NilError(t, err, "the watchers heard nothing")
			assert.Assert(t, binary.NativeEndian.Uint64(count) >= 1)

			after, err := g.Stats(nil)
			assert.NilError(t, err)
			assert.Equal(t, after.MemoryLimit, before.MemoryLimit)
			assert.Equal(t, after.OOMKills, uint64(0))
			assert.Equal(t, g.OOM(), "")
			assert.NilError(t, inside.Process.Signal(unix.Signal(0)))
			data, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(inside.Process.Pid), "comm"))
			assert.NilError(t, err)
			assert.Equal(t, string(data), "sleep\n")
		})
	}
	assert.NilError(t, group(false).TellOOM(), "without a cgroup")
}

// memoryDir is the directory of a process's cgroup of memory.
func memoryDir(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	assert.NilError(t, err)
	for line := range strings.Lines(string(data)) {
		if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 && parts[1] == "memory" {
			return filepath.Join("/sys/fs/cgroup/memory", parts[2])
		}
	}
	t.Skip("no controller of memory")
	return ""
}

// watchOOM returns an eventfd that the kernel writes to when memory runs out in a cgroup of v1.
func watchOOM(t *testing.T, dir string) *os.File {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	assert.NilError(t, err)
	f := os.NewFile(uintptr(fd), "eventfd") // pollable, for it does not block
	t.Cleanup(func() { _ = f.Close() })
	control, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	assert.NilError(t, err)
	defer control.Close()
	line := fmt.Sprintf("%d %d", fd, control.Fd())
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(line), 0))
	return f
}
