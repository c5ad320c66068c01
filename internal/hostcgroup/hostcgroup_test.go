package hostcgroup_test

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/hostcgroup"
)

func group(bySystemd bool) *hostcgroup.Group {
	return hostcgroup.New(hostcgroup.Config{Systemd: bySystemd, Overhead: 256 << 20, Log: slog.New(slog.DiscardHandler)})
}

func TestNames(t *testing.T) {
	for _, c := range []struct {
		path    string
		systemd bool
		want    cgroups.Cgroup
		err     string
	}{
		{path: "", want: cgroups.Cgroup{Name: "web"}},
		{path: "/a/b", want: cgroups.Cgroup{Path: "/a/b"}},
		{path: "/a/../../b/.", want: cgroups.Cgroup{Path: "/b"}},
		{path: "a/b", want: cgroups.Cgroup{Path: "a/b"}},
		{path: "../../a", want: cgroups.Cgroup{Path: "a"}},
		{path: "system.slice:runv:web", want: cgroups.Cgroup{Path: "system.slice:runv:web"}},
		{path: "/", err: `"/" is the root of all cgroups`},
		{path: "..", err: `".." is the root of all cgroups`},
		{path: "", systemd: true, want: cgroups.Cgroup{Systemd: true, ScopePrefix: "runv", Name: "web"}},
		{path: "machine.slice:libpod:x", systemd: true, want: cgroups.Cgroup{Systemd: true, Parent: "machine.slice", ScopePrefix: "libpod", Name: "x"}},
		{path: ":docker:x", systemd: true, want: cgroups.Cgroup{Systemd: true, ScopePrefix: "docker", Name: "x"}},
		{path: "/a/b", systemd: true, err: `"/a/b" is not of the form slice:prefix:name, which --systemd-cgroup demands`},
		{path: "a:b", systemd: true, err: "not of the form"},
		{path: "a.slice:b:c:d", systemd: true, err: "not of the form"},
		{path: "a.slice:b:", systemd: true, err: "not of the form"},
		{path: "a.slice:b:../c", systemd: true, err: "not of the form"},
		{path: "a:b:c", systemd: true, err: "invalid slice name: a"},
		{path: "a--b.slice:b:c", systemd: true, err: "invalid slice name"},
	} {
		got, err := hostcgroup.ConfigOf(hostcgroup.Container{ID: "web", Path: c.path}, c.systemd)
		if c.err != "" {
			assert.ErrorContains(t, err, c.err, c.path)
			continue
		}
		assert.NilError(t, err, c.path)
		assert.DeepEqual(t, *got, c.want)
	}
}

func TestSystemdMustRun(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		t.Skip("systemd runs")
	}
	assert.Error(t, hostcgroup.Check("a.slice:b:c", true), "--systemd-cgroup: systemd is not running on this host")
	err := group(true).Create(hostcgroup.Container{ID: "web"}, os.Getpid(), func(hostcgroup.Record) { t.Error("something was made") })
	assert.Error(t, err, "--systemd-cgroup: systemd not running on this host, cannot use systemd cgroups manager")
}

func TestLimits(t *testing.T) {
	const mib = 1 << 20
	const vm, overhead = 256 * mib, 4*mib + 256*mib
	limits := func(r *specs.LinuxResources, quota bool) cgroups.Resources {
		return *hostcgroup.Limits(group(false), r, vm, quota)
	}
	none := limits(nil, true)
	assert.DeepEqual(t, limits(&specs.LinuxResources{}, true), none)
	assert.Equal(t, none.Memory, int64(0))
	assert.Assert(t, none.PidsLimit == nil)

	memory := func(m specs.LinuxMemory) cgroups.Resources { return limits(&specs.LinuxResources{Memory: &m}, false) }
	got := memory(specs.LinuxMemory{Limit: new(int64(128 * mib)), Reservation: new(int64(64 * mib)), Swap: new(int64(192 * mib)), DisableOOMKiller: new(true)})
	assert.Equal(t, got.Memory, int64(vm+overhead))
	assert.Equal(t, got.MemoryReservation, int64(vm+overhead-64*mib))
	assert.Equal(t, got.MemorySwap, int64(vm+overhead+64*mib))
	assert.Assert(t, !got.OomKillDisable)
	got = memory(specs.LinuxMemory{Limit: new(int64(-1)), Swap: new(int64(-1))})
	assert.Equal(t, got.Memory, int64(-1))
	assert.Equal(t, got.MemorySwap, int64(-1))
	// More than the VM has, as after an update.
	got = memory(specs.LinuxMemory{Limit: new(int64(1 << 60)), Swap: new(int64(1 << 60)), Reservation: new(int64(mib))})
	assert.Equal(t, got.Memory, int64(vm+overhead))
	assert.Equal(t, got.MemorySwap, int64(1<<60))
	assert.Equal(t, got.MemoryReservation, int64(mib))

	cpu := func(c specs.LinuxCPU, booted bool) cgroups.Resources {
		return limits(&specs.LinuxResources{CPU: &c}, booted)
	}
	got = cpu(specs.LinuxCPU{Quota: new(int64(10000)), Period: new(uint64(20000)), Shares: new(uint64(1024))}, true)
	assert.Equal(t, got.CpuQuota, int64(20000), "half a CPU more")
	assert.Equal(t, got.CpuPeriod, uint64(20000))
	assert.Equal(t, got.CpuShares, uint64(1024))
	assert.Equal(t, got.CpuWeight, uint64(100), "v2's default for v1's")
	assert.Equal(t, cpu(specs.LinuxCPU{Quota: new(int64(10000))}, true).CpuQuota, int64(60000))
	assert.Equal(t, cpu(specs.LinuxCPU{Quota: new(int64(-1))}, true).CpuQuota, int64(-1))
	assert.Equal(t, cpu(specs.LinuxCPU{Quota: new(int64(10000))}, false).CpuQuota, int64(0), "the boot is not slowed down")
	got = cpu(specs.LinuxCPU{Shares: new(uint64(2))}, false)
	assert.Equal(t, got.CpuShares, uint64(0), "the boot has an ordinary weight")
	assert.Equal(t, got.CpuWeight, uint64(0))

	assert.Equal(t, *limits(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(5))}}, true).PidsLimit, int64(512))
	assert.Equal(t, *limits(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(-1))}}, true).PidsLimit, int64(-1))
}

func TestMissingControllers(t *testing.T) {
	assert.DeepEqual(t, hostcgroup.Missing("cpuset cpu io memory hugetlb pids rdma misc\n"), []string{})
	assert.DeepEqual(t, hostcgroup.Missing("hugetlb\n"), []string{"cpu", "memory", "pids"})
}

// create makes a cgroup below this process's own, and sees to its end.
func create(t *testing.T, c hostcgroup.Container) (*hostcgroup.Group, *hostcgroup.Record) {
	t.Helper()
	if h := hostcgroup.Probe(); h.Version == 0 || h.Err != nil || len(h.Missing) > 0 || os.Geteuid() != 0 {
		t.Skipf("no cgroups can be made: %+v", h)
	}
	g, record := group(false), &hostcgroup.Record{}
	assert.NilError(t, g.Create(c, -1, func(r hostcgroup.Record) { *record = r }))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		assert.Check(t, g.Remove(ctx))
	})
	return g, record
}

func name(t *testing.T) string { return "runv-test-" + t.Name() + "-" + strconv.Itoa(os.Getpid()) }

// members are the cgroups that a process says it is in.
func members(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	return string(data)
}

func TestStartIsInTheCgroupFromItsFirstMoment(t *testing.T) {
	id := name(t)
	g, record := create(t, hostcgroup.Container{ID: id})
	before := members(t, "/proc/self/cgroup")
	cmd := exec.Command("cat", "/proc/self/cgroup")
	var out strings.Builder
	cmd.Stdout = &out
	assert.NilError(t, g.Start(cmd))
	assert.NilError(t, cmd.Wait())
	for line := range strings.Lines(out.String()) {
		assert.Assert(t, strings.HasSuffix(strings.TrimSpace(line), "/"+id), line)
	}
	// The threads of this process are where they were.
	threads, err := filepath.Glob("/proc/self/task/*/cgroup")
	assert.NilError(t, err)
	for _, thread := range threads {
		assert.Equal(t, members(t, thread), before)
	}
	err = g.Start(exec.Command("/no/such/program"))
	assert.ErrorContains(t, err, "no such file")
	assert.Equal(t, members(t, "/proc/thread-self/cgroup"), before)

	assert.NilError(t, record.Validate())
	for _, d := range record.Dirs {
		assert.Assert(t, d.Inode != 0 && strings.HasSuffix(d.Path, "/"+id), "%+v", d)
	}
}

func TestRemove(t *testing.T) {
	g, record := create(t, hostcgroup.Container{ID: name(t)})
	path := record.String()
	assert.Assert(t, path != "")
	assert.NilError(t, os.Mkdir(filepath.Join(path, "below"), 0o755))

	// Nobody else can have it while somebody is in it, and it cannot be removed.
	cmd := exec.Command("sleep", "1000")
	assert.NilError(t, g.Start(cmd))
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	err := group(false).Create(hostcgroup.Container{ID: name(t), Path: name(t)}, -1, func(hostcgroup.Record) { t.Error("something was made") })
	assert.ErrorContains(t, err, "linux.cgroupsPath: ")
	assert.ErrorContains(t, err, "is not empty: 1 processes")
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err = record.Remove(short)
	assert.ErrorContains(t, err, "remove cgroup: rmdir "+path)
	assert.ErrorContains(t, err, "1 processes are in it, such as "+strconv.Itoa(cmd.Process.Pid))

	// One of another time with the same name is left alone, whoever is in it, and what is no cgroup.
	older := *record
	older.Dirs = nil
	for _, d := range record.Dirs {
		older.Dirs = append(older.Dirs, hostcgroup.Dir{Path: d.Path, Inode: d.Inode + 1})
	}
	dir := t.TempDir()
	older.Dirs = append(older.Dirs, hostcgroup.Dir{Path: dir})
	assert.NilError(t, older.Remove(t.Context()))
	for _, path := range []string{path, dir} {
		_, err = os.Stat(path)
		assert.NilError(t, err)
	}

	// It waits for those who are ending.
	time.AfterFunc(20*time.Millisecond, func() { _ = cmd.Process.Kill() })
	long, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	assert.NilError(t, record.Remove(long))
	_, err = os.Stat(path)
	assert.ErrorIs(t, err, os.ErrNotExist)
	assert.NilError(t, record.Remove(long), "again")
}

// A pod's sandbox has next to no share of CPU time, and the VM must boot first.
func TestSharesComeAfterTheBoot(t *testing.T) {
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: new(uint64(2)), Quota: new(int64(1000))}}
	g, record := create(t, hostcgroup.Container{ID: name(t), Resources: r, VMMemory: 1 << 28})
	weight := func() string {
		t.Helper()
		for _, d := range record.Dirs {
			for _, file := range []string{"cpu.shares", "cpu.weight"} {
				if data, err := os.ReadFile(filepath.Join(d.Path, file)); err == nil {
					return strings.TrimSpace(string(data))
				}
			}
		}
		t.Fatal("no file tells the weight")
		return ""
	}
	ordinary := weight()
	assert.Assert(t, ordinary == "1024" || ordinary == "100", ordinary)
	assert.NilError(t, g.Limit(r, 1<<28))
	assert.Assert(t, weight() == "2" || weight() == "1", weight())
	r.CPU.Shares = new(uint64(1024 + 2))
	assert.NilError(t, g.Limit(r, 1<<28))
	assert.Assert(t, weight() == "1026" || weight() == "101", weight())
}

func TestUpdateAndStats(t *testing.T) {
	const mib = 1 << 20
	r := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: new(int64(64 * mib))}, Pids: &specs.LinuxPids{Limit: new(int64(1))},
	}
	g, record := create(t, hostcgroup.Container{ID: name(t), Resources: r, VMMemory: 192 * mib})
	s, err := g.Stats([]int{os.Getpid(), 1 << 30})
	assert.NilError(t, err)
	assert.Equal(t, s.Path, record.String())
	assert.Equal(t, s.MemoryLimit, uint64((192+3+256)*mib))
	assert.Equal(t, s.PidsLimit, uint64(512))
	assert.Assert(t, s.Overhead > 1*mib, "this process has memory of its own: %d", s.Overhead)
	r.Memory.Limit = new(int64(-1))
	assert.NilError(t, g.Limit(r, 192*mib))
	s, err = g.Stats(nil)
	assert.NilError(t, err)
	assert.Equal(t, s.MemoryLimit, ^uint64(0))
	assert.Equal(t, g.OOM(), "")
}

// Without a cgroup all works but what needs one.
func TestNoCgroup(t *testing.T) {
	g := group(false)
	cmd := exec.Command("true")
	assert.NilError(t, g.Start(cmd))
	assert.NilError(t, cmd.Wait())
	assert.NilError(t, g.Join(1))
	assert.NilError(t, g.Limit(nil, 1))
	s, err := g.Stats([]int{os.Getpid()})
	assert.NilError(t, err)
	assert.Assert(t, s.Path == "" && s.Overhead > 0)
	assert.Equal(t, g.OOM(), "")
	assert.NilError(t, g.Remove(t.Context()))
}
