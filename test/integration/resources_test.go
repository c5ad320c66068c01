package integration

import (
	"encoding/json"
	"fmt"
	"regexp"
	"runtime"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// limits reads files of a container's cgroup as the container sees them.
func limits(e *harness.Env, id string, files ...string) string {
	return e.OK("exec", id, "sh", "-c", "cd /sys/fs/cgroup && for f in "+strings.Join(files, " ")+"; do echo \"$f $(cat $f)\"; done")
}

// updated is what update --json prints.
type updated struct {
	InEffect map[string]string `json:"inEffect"`
	VM       struct {
		VCPUs       int   `json:"vcpus"`
		MemoryBytes int64 `json:"memoryBytes"`
	} `json:"vm"`
	Warnings []string `json:"warnings"`
}

func update(t *testing.T, e *harness.Env, args ...string) (u updated) {
	t.Helper()
	assert.NilError(t, json.Unmarshal([]byte(e.OK(append([]string{"update", "--json"}, args...)...)), &u))
	return u
}

// TestResourcesAndTheirUpdate is one container's story: all that config.json limits is in the
// container's cgroup, and update changes it as under runc.
func TestResourcesAndTheirUpdate(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", "while :; do sleep 1; done"}, func(s *specs.Spec) {
		r := s.Linux.Resources
		r.CPU = &specs.LinuxCPU{
			Shares: new(uint64(2048)), Quota: new(int64(50000)), Period: new(uint64(20000)), Burst: new(uint64(1000)), Cpus: "0,2", Mems: "0",
		}
		r.Memory = &specs.LinuxMemory{
			Limit: new(int64(64 << 20)), Reservation: new(int64(16 << 20)), Swap: new(int64(96 << 20)),
			Swappiness: new(uint64(10)), DisableOOMKiller: new(true), // not of cgroup v2: ignored, as by runc
		}
		r.Pids = &specs.LinuxPids{Limit: new(int64(50))}
		r.BlockIO = &specs.LinuxBlockIO{Weight: new(uint16(500))}
		r.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}}
		r.Unified = map[string]string{"memory.high": fmt.Sprint(60 << 20), "cgroup.max.depth": "3", "memory.oom.group": "1"}
		s.Linux.Resources.Network = &specs.LinuxNetwork{ClassID: new(uint32(1))}
	})
	// runc would want CPU 2 of the host. The VM gets as many as the quota can use, and by the cpuset
	// as many as the host has.
	r := e.Run("create", "--bundle", bundle, "box")
	assert.Equal(t, r.Code, 0, r.Stderr)
	got := limits(e, "box", "cpu.weight", "cpu.max", "cpu.max.burst", "cpuset.cpus", "cpuset.cpus.effective", "cpuset.mems", "memory.max",
		"memory.low", "memory.swap.max", "memory.high", "memory.oom.group", "pids.max", "io.weight", "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max",
		"cgroup.max.depth")
	assert.Equal(t, got, `cpu.weight 174
cpu.max 50000 20000
cpu.max.burst 1000
cpuset.cpus 0,2
cpuset.cpus.effective 0,2
cpuset.mems 0
memory.max 67108864
memory.low 16777216
memory.swap.max 33554432
memory.high 62914560
memory.oom.group 1
pids.max 50
io.weight default 4950
hugetlb.2MB.max 4194304
hugetlb.2MB.rsvd.max 4194304
cgroup.max.depth 3
`)

	// A container that is created can be updated, one that is running, and one that is paused.
	u := update(t, e, "--memory", "128m", "--memory-swap", "128m", "--pids-limit", "-1", "box")
	assert.Equal(t, u.InEffect["memory.max"], "134217728")
	assert.Equal(t, u.InEffect["memory.swap.max"], "0")
	assert.Equal(t, u.InEffect["pids.max"], "max")
	assert.Equal(t, u.VM.VCPUs, 3)
	e.OK("start", "box")
	assert.Equal(t, e.OK("update", "--cpu-share", "100", "--cpu-quota", "30000", "--cpu-burst", "2000", "--memory-reservation", "8m",
		"--blkio-weight", "10", "--cpuset-cpus", "1-2", "box"), "", "runc prints nothing")
	e.OK("pause", "box")
	u = update(t, e, "--cpu-period", "40000", "--memory-swap", "-1", "box")
	e.OK("resume", "box")
	assert.Equal(t, u.InEffect["cpu.max"], "30000 40000", "the quota stays when the period changes")
	assert.Equal(t, limits(e, "box", "cpu.weight", "cpu.max", "cpu.max.burst", "cpuset.cpus.effective", "memory.max", "memory.low",
		"memory.swap.max", "memory.high", "pids.max", "io.weight"), `cpu.weight 17
cpu.max 30000 40000
cpu.max.burst 2000
cpuset.cpus.effective 1-2
memory.max 134217728
memory.low 8388608
memory.swap.max max
memory.high 62914560
pids.max max
io.weight default 1
`)
	assert.Equal(t, e.OK("exec", "box", "nproc"), "2\n")

	// All or nothing, and the field is named.
	before := limits(e, "box", "memory.max", "cpu.max", "pids.max", "io.weight", "cpuset.cpus")
	for _, tc := range []struct{ resources, want string }{
		{`{"memory":{"limit":33554432},"cpu":{"quota":20000},"pids":{"limit":9},"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}`, "blockIO.throttleReadBpsDevice: the guest has no device 8:0"},
		{`{"pids":{"limit":9},"blockIO":{"weight":1000},"cpu":{"cpus":"1,3"}}`, `cpu.cpus: "1,3": the VM has only the CPUs 0-2`},
		{`{"pids":{"limit":9},"cpu":{"quota":20000,"mems":"1"}}`, `cpu.mems: "1": the VM has only the memory nodes 0`},
		{`{"cpu":{"quota":1000,"shares":1024}}`, "cpu.quota: set cpu.max"}, // the burst is more
		{`{"pids":{"limit":9},"hugepageLimits":[{"pageSize":"4MB","limit":1}]}`, "hugepageLimits: the guest's kernel has no writable hugetlb.4MB.max"},
		{`{"pids":{"limit":9},"rdma":{"mlx5_0":{"hcaHandles":1}}}`, "rdma: the guest has no device mlx5_0"},
		{`{"unified":{"memory.high":"lots"}}`, `unified["memory.high"]: set memory.high to "lots"`},
		{`{"memory":{"limit":4096,"checkBeforeUpdate":true}}`, "memory.limit: rejecting memory limit 4096 <= usage "},
		{`{"memory":{"limit":-5}}`, "memory.limit: -5 is less than -1"},
	} {
		r := e.RunInput(strings.NewReader(tc.resources), "update", "-r", "-", "box")
		assert.Equal(t, r.Code, 1, tc.resources)
		assert.Assert(t, cmp.Contains(r.Stderr, "runv: update box: "))
		assert.Assert(t, cmp.Contains(r.Stderr, tc.want))
		assert.Equal(t, strings.Count(r.Stderr, "\n"), 1, "one line: %q", r.Stderr)
		assert.Equal(t, limits(e, "box", "memory.max", "cpu.max", "pids.max", "io.weight", "cpuset.cpus"), before, tc.resources)
	}

	// Without swap above a limit of memory, and with oom.group, its breach ends the container, and
	// that is told of it.
	e.OK("update", "--memory", "16m", "--memory-swap", "16m", "box")
	r = e.Run("exec", "box", "dd", "if=/dev/zero", "of=/dev/shm/big", "bs=1M", "count=40")
	assert.Equal(t, r.Code, 137, r.Stderr)
	e.AwaitStatus("box", specs.StateStopped)
	r = e.Run("update", "--memory", "64m", "box")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "container not running"))
	harness.Eventually(t, "the end is on record", func() bool {
		events := e.OK("events", "box")
		return regexp.MustCompile(`(?m)^{"type":"oom","id":"box"`).MatchString(events) &&
			regexp.MustCompile(`"exit","id":"box","data":{[^}]*"pid":\d+,"status":137}`).MatchString(events)
	})
}

// TestResourcesOfTheHostsDevices are refused by the guest, by name, and the creation leaves nothing.
func TestResourcesOfTheHostsDevices(t *testing.T) {
	e := harness.New(t)
	r := e.Run("run", "--bundle", e.Bundle([]string{"true"}, func(s *specs.Spec) {
		disk := specs.LinuxThrottleDevice{Rate: 1 << 20}
		disk.Major = 8
		s.Linux.Resources.BlockIO = &specs.LinuxBlockIO{ThrottleWriteBpsDevice: []specs.LinuxThrottleDevice{disk}}
	}), "box")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "linux.resources.blockIO.throttleWriteBpsDevice: the guest has no device 8:0"))
	e.CheckNothingLeft()
}

// TestUpdateLetsTheVMGrow plugs processors and memory into a running VM by limits that are more than
// it has, and tells what it cannot have.
func TestUpdateLetsTheVMGrow(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"}, func(s *specs.Spec) {
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: new(int64(128 << 20))}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	size := func() (cpus, mebibytes int) {
		out := e.OK("exec", "box", "sh", "-c", "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo")
		_, err := fmt.Sscan(out, &cpus, &mebibytes)
		assert.NilError(t, err, "%s", out)
		return cpus, mebibytes
	}
	cpus, mebibytes := size()
	assert.Equal(t, cpus, 1)
	assert.Assert(t, mebibytes < 256, "%d", mebibytes)

	most := runtime.NumCPU()
	u := update(t, e, "--memory", "600M", "--memory-swap", "600M", "--cpu-quota", fmt.Sprint(100000*most), "--cpu-period", "100000", "box")
	assert.Equal(t, u.VM.VCPUs, most)
	assert.Assert(t, u.VM.MemoryBytes >= 728<<20, "%d", u.VM.MemoryBytes)
	assert.Equal(t, u.InEffect["memory.max"], fmt.Sprint(600<<20))
	assert.Equal(t, len(u.Warnings), 0, "%q", u.Warnings)
	cpus, mebibytes = size()
	assert.Equal(t, cpus, most)
	assert.Assert(t, mebibytes > 600, "%d", mebibytes)
	// A program uses what no VM of the first size has.
	e.OK("exec", "box", "dd", "if=/dev/zero", "of=/dev/null", "bs=400M", "count=1")

	u = update(t, e, "--cpu-quota", fmt.Sprint(100000*(most+1)), "box")
	assert.Equal(t, u.VM.VCPUs, most)
	assert.Assert(t, cmp.Len(u.Warnings, 1))
	assert.Assert(t, cmp.Contains(u.Warnings[0], fmt.Sprintf("%d vcpus are more than the %d that the VM can have", most+1, most)))

	// Less makes the container's cgroup smaller, not the VM, and the old wish is not told again.
	u = update(t, e, "--memory", "64M", "--memory-swap", "64M", "box")
	assert.Equal(t, u.InEffect["memory.max"], fmt.Sprint(64<<20))
	assert.Assert(t, u.VM.MemoryBytes >= 728<<20, "%d", u.VM.MemoryBytes)
	assert.Equal(t, len(u.Warnings), 0, "%q", u.Warnings)
	e.OK("delete", "--force", "box")
	e.CheckNothingLeft()
}
