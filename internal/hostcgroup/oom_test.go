package hostcgroup_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/hostcgroup"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hostcgroup.VictimFace {
		os.Exit(hostcgroup.Victim(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == sharerFace {
		os.Exit(sharer())
	}
	os.Exit(m.Run())
}

// A sharer is as a VMM may be: it has more memory than is counted in its cgroup, which it shares with this process.
const (
	sharerFace   = "sharer"
	sharerMemory = 100 << 20
)

func sharer() int {
	memory, err := unix.Mmap(3, 0, sharerMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 1
	}
	for i := 0; i < len(memory); i += 4096 {
		memory[i]++
	}
	_, _ = os.Stdout.Write([]byte{0})
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the test ends
	return 0
}

// startSharer starts one in a cgroup.
func startSharer(t *testing.T, g *hostcgroup.Group) *exec.Cmd {
	t.Helper()
	fd, err := unix.MemfdCreate("shared", unix.MFD_CLOEXEC)
	assert.NilError(t, err)
	f := os.NewFile(uintptr(fd), "shared")
	defer f.Close()
	assert.NilError(t, f.Truncate(sharerMemory))
	memory, err := unix.Mmap(fd, 0, sharerMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	assert.NilError(t, err)
	for i := 0; i < len(memory); i += 4096 {
		memory[i] = 1
	}
	t.Cleanup(func() { assert.Check(t, unix.Munmap(memory)) })
	cmd := exec.Command("/proc/self/exe", sharerFace)
	cmd.ExtraFiles = []*os.File{f}
	stdout, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	stdin, err := cmd.StdinPipe()
	assert.NilError(t, err)
	t.Cleanup(func() { _ = stdin.Close() })
	assert.NilError(t, g.Start(cmd))
	_, err = stdout.Read(make([]byte, 1))
	assert.NilError(t, err)
	return cmd
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
			inside := startSharer(t, g)
			adj := fmt.Sprintf("/proc/%d/oom_score_adj", inside.Process.Pid)
			assert.NilError(t, os.WriteFile(adj, []byte("968"), 0)) // as the kubelet says of a burstable pod
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
			var sharer unix.Stat_t
			assert.NilError(t, unix.Stat(fmt.Sprintf("/proc/%d/exe", inside.Process.Pid), &sharer), "it lives")
			score, err := os.ReadFile(adj)
			assert.NilError(t, err)
			assert.Equal(t, strings.TrimSpace(string(score)), "968")
		})
	}
	assert.NilError(t, group(false).TellOOM(), "without a cgroup")
}

// TestAdd gives a further container a cgroup, in which memory runs out for its watchers alone.
func TestAdd(t *testing.T) {
	r := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(64 << 20))}}
	first, _ := create(t, hostcgroup.Container{ID: name(t), Resources: r, VMMemory: 192 << 20})
	standIn := exec.Command("sleep", "1000")
	assert.NilError(t, standIn.Start())
	defer func() {
		assert.Check(t, standIn.Process.Kill())
		_ = standIn.Wait()
	}()
	further, record := group(false), hostcgroup.Record{}
	defer func() {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		assert.Check(t, first.Join(standIn.Process.Pid), "it is in the way")
		assert.Check(t, further.Remove(ctx))
		assert.Check(t, !cgroups.PathExists(record.String()))
	}()
	assert.NilError(t, further.Add(name(t)+"-further", "", standIn.Process.Pid, func(r hostcgroup.Record) { record = r }))
	assert.Assert(t, strings.HasSuffix(members(t, fmt.Sprintf("/proc/%d/cgroup", standIn.Process.Pid)), name(t)+"-further\n"))
	st, err := further.Stats(nil)
	assert.NilError(t, err)
	assert.Equal(t, st.MemoryLimit, uint64(math.MaxUint64), "the VM's limits are not here")
	assert.Equal(t, st.Pids, uint64(1))
	taken := group(false)
	assert.ErrorContains(t, taken.Add(name(t)+"-further", "", standIn.Process.Pid, func(hostcgroup.Record) { t.Error("made") }), "is not empty: 1 processes")

	if hostcgroup.Probe().Version != 1 {
		return // the watch below is one of cgroup v1
	}
	inside := startSharer(t, first)
	defer func() {
		assert.Check(t, inside.Process.Kill())
		_ = inside.Wait()
	}()
	others := watchOOM(t, memoryDir(t, inside.Process.Pid))
	heard := watchOOM(t, memoryDir(t, standIn.Process.Pid))
	assert.NilError(t, further.TellOOM())
	assert.NilError(t, heard.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, err = heard.Read(make([]byte, 8))
	assert.NilError(t, err, "the watchers heard nothing")
	assert.NilError(t, others.SetReadDeadline(time.Now()))
	_, err = others.Read(make([]byte, 8))
	assert.ErrorIs(t, err, os.ErrDeadlineExceeded, "those of the other heard it, too")
	assert.NilError(t, standIn.Process.Signal(unix.Signal(0)))
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
