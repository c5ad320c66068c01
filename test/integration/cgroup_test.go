package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// cgroups are a process's, or with a task's path a thread's, by hierarchy.
func cgroups(t *testing.T, proc string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", proc, "cgroup"))
	assert.NilError(t, err)
	all := map[string]string{}
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		all[f[1]] = f[2]
	}
	return all
}

// hasController tells whether the host has a controller of cgroup v1, or v2 with it.
func hasController(t *testing.T, name string) bool {
	t.Helper()
	if _, v1 := cgroups(t, "self")[name]; v1 {
		return true
	}
	data, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	return strings.Contains(string(data), name)
}

// setting reads a file of a cgroup that v1 and v2 name differently.
func setting(t *testing.T, cgroup map[string]string, controller, v1, v2 string) string {
	t.Helper()
	path := filepath.Join("/sys/fs/cgroup", cgroup[""], v2)
	if own, ok := cgroup[controller]; ok {
		path = filepath.Join("/sys/fs/cgroup", controller, own, v1)
	}
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	return strings.TrimSpace(string(data))
}

// tasks lists the threads of a process, as paths below /proc.
func tasks(t *testing.T, pid int) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	assert.NilError(t, err)
	for _, e := range entries {
		all = append(all, fmt.Sprintf("%d/task/%s", pid, e.Name()))
	}
	return all
}

// checkMembers checks that the VM's processes with all their threads and the stand-in are in a
// cgroup, and nothing of the supervisor is. It returns the cgroup.
func checkMembers(t *testing.T, e *harness.Env, id string) map[string]string {
	t.Helper()
	pod, standIn := e.Pod(id), e.State(id).Pid
	group := cgroups(t, strconv.Itoa(standIn))
	assert.Equal(t, len(pod.VM), 2, "QEMU and the share server")
	for _, p := range pod.VM {
		for _, task := range tasks(t, p.PID) {
			assert.DeepEqual(t, cgroups(t, task), group)
		}
	}
	own := cgroups(t, "self")
	for _, task := range tasks(t, pod.Supervisor.PID) {
		assert.DeepEqual(t, cgroups(t, task), own)
	}
	return group
}

// TestCgroupAsRunc compares the cgroup of a bundle that names none and limits nothing with the runcs',
// and then sees to the end of a VM whose supervisor was killed.
func TestCgroupAsRunc(t *testing.T) {
	e := harness.New(t)
	id := "box" + ownSuffix("any")
	bundle := e.Bundle([]string{"sleep", "1000"})
	var theirs *harness.Runc
	var state specs.State
	var want map[string]string
	for i, runc := range e.Runcs() {
		if i > 0 {
			assert.Equal(t, theirs.Run("delete", "--force", id).Code, 0)
		}
		theirs = runc
		r := theirs.Run("run", "--detach", "--bundle", bundle, id)
		assert.Equal(t, r.Code, 0, "%s: %s", theirs.Name, r.Stderr)
		assert.NilError(t, json.Unmarshal([]byte(theirs.Run("state", id).Stdout), &state))
		got := cgroups(t, strconv.Itoa(state.Pid))
		assert.Assert(t, want == nil || maps.Equal(got, want), "%s: %v, not %v", theirs.Name, got, want)
		want = got
	}
	// Who has a container of this id already keeps his cgroup to himself.
	ours := e.Run("run", "--detach", "--bundle", bundle, id)
	assert.Equal(t, ours.Code, 0, "without limits the VM can do without: %s", ours.Stderr)
	assert.DeepEqual(t, cgroups(t, strconv.Itoa(e.Pod(id).VM[0].PID)), cgroups(t, "self"))
	assert.DeepEqual(t, cgroups(t, strconv.Itoa(state.Pid)), want)
	e.OK("delete", "--force", id)
	assert.Equal(t, theirs.Run("delete", "--force", id).Code, 0)

	e.OK("run", "--detach", "--bundle", bundle, id)
	group := checkMembers(t, e, id)
	if _, hybrid := want[""]; hybrid && len(want) > 1 {
		// runc forgets its caller's cgroup in the v2 hierarchy beside v1.
		delete(want, "")
		delete(group, "")
	}
	assert.DeepEqual(t, group, want)
	recorded := e.State(id).Annotations["dev.runv.cgroup"]
	assert.Assert(t, strings.HasSuffix(recorded, "/"+id), recorded)

	// A foreign process in the cgroup is nobody's to kill.
	foreign := exec.Command("sleep", "1000")
	assert.NilError(t, foreign.Start())
	defer func() { _ = foreign.Wait() }()
	defer func() { _ = foreign.Process.Kill() }()
	procs := filepath.Join(recorded, "cgroup.procs")
	assert.NilError(t, os.WriteFile(procs, []byte(strconv.Itoa(foreign.Process.Pid)), 0))
	assert.NilError(t, syscall.Kill(e.Pod(id).Supervisor.PID, syscall.SIGKILL))
	r := e.Run("delete", "--force", id)
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, fmt.Sprintf("rmdir %s: device or resource busy: 1 processes are in it, such as %d", recorded, foreign.Process.Pid)))
	assert.NilError(t, foreign.Process.Signal(syscall.Signal(0)), "it lives")
	assert.NilError(t, foreign.Process.Kill())
	_ = foreign.Wait()
	e.OK("delete", "--force", id)
	e.CheckNothingLeft()
}

// TestCgroupOfBundle checks a cgroup that the bundle names, and the limits of its VM.
func TestCgroupOfBundle(t *testing.T) {
	if !hasController(t, "memory") || !hasController(t, "cpu") || !hasController(t, "pids") {
		t.Skip("the host's cgroups lack controllers")
	}
	e := harness.New(t)
	parent := fmt.Sprintf("/runv-test-parent-%d", os.Getpid())
	path := parent + "/box"
	t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			dirs, _ := filepath.Glob(pattern + parent)
			for _, dir := range dirs {
				assert.Check(t, os.Remove(dir), "the container's cgroup is gone, its parent is left, as by runc")
			}
		}
	})
	bundle := e.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
		s.Linux.CgroupsPath = path
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: new(int64(128 << 20)), Reservation: new(int64(64 << 20))}
		s.Linux.Resources.CPU = &specs.LinuxCPU{Shares: new(uint64(512)), Quota: new(int64(40000)), Period: new(uint64(50000))}
		s.Linux.Resources.Pids = &specs.LinuxPids{Limit: new(int64(20))}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	group := checkMembers(t, e, "box")
	for hierarchy, at := range group {
		assert.Equal(t, at, path, hierarchy)
	}
	const vm = (128 + 128/32 + 128) << 20
	const limit = vm + vm/64 + 256<<20
	assert.Equal(t, setting(t, group, "memory", "memory.limit_in_bytes", "memory.max"), strconv.Itoa(limit))
	assert.Equal(t, setting(t, group, "memory", "memory.soft_limit_in_bytes", "memory.low"), strconv.Itoa(limit-64<<20))
	assert.Equal(t, setting(t, group, "pids", "pids.max", "pids.max"), "512")
	if _, v1 := group["cpu"]; v1 {
		assert.Equal(t, setting(t, group, "cpu", "cpu.shares", ""), "512")
		assert.Equal(t, setting(t, group, "cpu", "cpu.cfs_quota_us", ""), "65000")
		assert.Equal(t, setting(t, group, "cpu", "cpu.cfs_period_us", ""), "50000")
	} else {
		assert.Equal(t, setting(t, group, "", "", "cpu.max"), "65000 50000")
	}

	// The stats tell the guest's from the host's.
	var ev struct {
		Data struct {
			Memory struct{ Usage struct{ Limit, Usage uint64 } }
			VMM    struct {
				Cgroup string
				CPU    struct{ Usage struct{ Total uint64 } }
				Memory struct {
					Usage           struct{ Limit, Usage uint64 }
					Guest, Overhead uint64
				}
				Threads  struct{ Current, Limit uint64 }
				OOMKills *uint64
			}
		}
	}
	assert.NilError(t, json.Unmarshal([]byte(e.OK("events", "--stats", "box")), &ev))
	d := ev.Data
	assert.Equal(t, d.Memory.Usage.Limit, uint64(128<<20))
	assert.Assert(t, strings.HasSuffix(d.VMM.Cgroup, path), d.VMM.Cgroup)
	assert.Equal(t, d.VMM.Memory.Usage.Limit, uint64(limit))
	assert.Assert(t, d.VMM.Memory.Guest > 32<<20 && d.VMM.Memory.Guest <= vm, "guest: %d", d.VMM.Memory.Guest)
	assert.Assert(t, d.VMM.Memory.Overhead > 16<<20, "overhead: %d", d.VMM.Memory.Overhead)
	assert.Assert(t, d.VMM.Memory.Usage.Usage > d.VMM.Memory.Guest && d.VMM.Memory.Usage.Usage <= limit, "%+v", d.VMM.Memory)
	assert.Assert(t, d.VMM.Memory.Usage.Usage > d.Memory.Usage.Usage)
	assert.Assert(t, d.VMM.CPU.Usage.Total > 100e6, "the VM has booted: %d ns", d.VMM.CPU.Usage.Total)
	assert.Assert(t, d.VMM.Threads.Current > 5 && d.VMM.Threads.Limit == 512, "%+v", d.VMM.Threads)
	assert.Assert(t, d.VMM.OOMKills != nil && *d.VMM.OOMKills == 0)

	// An update of the container is one of its VM.
	e.OK("update", "--cpu-quota", "20000", "--memory", "64M", "box")
	if _, v1 := group["cpu"]; v1 {
		assert.Equal(t, setting(t, group, "cpu", "cpu.cfs_quota_us", ""), "45000")
	} else {
		assert.Equal(t, setting(t, group, "", "", "cpu.max"), "45000 50000")
	}
	assert.Equal(t, setting(t, group, "memory", "memory.limit_in_bytes", "memory.max"), strconv.Itoa(limit), "the VM is as large as before")

	// Nobody else gets in, and what runs there does not suffer.
	other := e.Bundle([]string{"true"}, func(s *specs.Spec) { s.Linux.CgroupsPath = path })
	r := e.Run("run", "--bundle", other, "other")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Regexp(`create other: linux\.cgroupsPath: \S+`+path+` is not empty: [0-9]+ processes`, r.Stderr))
	assert.Equal(t, e.OK("exec", "box", "echo", "alive"), "alive\n")

	// As under runc, the cgroup of a container that has ended is there until its deletion.
	e.OK("kill", "box", "KILL")
	e.AwaitStatus("box", specs.StateStopped)
	assert.Equal(t, setting(t, group, "memory", "memory.limit_in_bytes", "memory.max"), strconv.Itoa(limit))
	e.OK("delete", "box")
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, _ := filepath.Glob(pattern + path)
		assert.DeepEqual(t, dirs, []string(nil))
	}
}

// TestCgroupsThatCannotBe names what is asked for in vain.
func TestCgroupsThatCannotBe(t *testing.T) {
	e := harness.New(t)
	for path, want := range map[string]string{
		"/":                          `linux.cgroupsPath: "/" is the root of all cgroups`,
		"../..":                      `linux.cgroupsPath: "../.." is the root of all cgroups`,
		"/a/" + "../../../../../../": "is the root of all cgroups",
	} {
		bundle := e.Bundle([]string{"true"}, func(s *specs.Spec) { s.Linux.CgroupsPath = path })
		r := e.Run("run", "--bundle", bundle, "box")
		assert.Equal(t, r.Code, 1)
		assert.Assert(t, cmp.Regexp(want, r.Stderr))
	}
	// Where no cgroup can be made, who asks for none gets along without.
	readOnly := func(limits *specs.LinuxMemory) harness.Result {
		bundle := e.Bundle([]string{"echo", "alive"}, func(s *specs.Spec) { s.Linux.Resources.Memory = limits })
		cmd := e.Command("run", "--bundle", bundle, "box")
		script := `for m in /sys/fs/cgroup /sys/fs/cgroup/*; do mountpoint -q $m && mount -o remount,bind,ro $m; done; exec "$@"`
		cmd.Args = append([]string{"unshare", "--mount", "sh", "-c", script, "sh"}, cmd.Args...)
		cmd.Path = "/usr/bin/unshare"
		return harness.Finish(cmd)
	}
	r := readOnly(&specs.LinuxMemory{Limit: new(int64(64 << 20))})
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Regexp("create box: linux.resources: mkdir .*: read-only file system", r.Stderr))
	r = readOnly(nil)
	assert.Equal(t, r.Stdout, "alive\n", r.Stderr)
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		return
	}
	bundle := e.Bundle([]string{"true"}, func(s *specs.Spec) { s.Linux.CgroupsPath = "system.slice:runv:box" })
	r = e.Run("--systemd-cgroup", "run", "--bundle", bundle, "box")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "--systemd-cgroup: systemd is not running on this host"))
}

// TestHostOOM lets the host's kernel kill a VMM that takes more than it may have.
func TestHostOOM(t *testing.T) {
	if !hasController(t, "memory") {
		t.Skip("the host's cgroups do not limit memory")
	}
	e := harness.New(t)
	e.Setenv = map[string]string{"RUNV_VMM_MEMORY": "16MiB"}
	bundle := e.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: new(int64(192 << 20))}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	const limit = 326 + 326/64 + 16 // the VM has a 32nd of the limit and 128 MiB more
	want := fmt.Sprintf("VM ended: killed by the host's kernel for want of memory: limit %d MiB of cgroup %s",
		limit, e.State("box").Annotations["dev.runv.cgroup"])
	r := e.Run("exec", "box", "sh", "-c", "head -c 186m /dev/zero | tail -c 186m >/dev/null; while :; do find / -xdev >/dev/null; md5sum /bin/busybox >/dev/null; done")
	assert.Assert(t, r.Code != 0, "%s", r.Stdout)
	e.AwaitStatus("box", specs.StateStopped)
	s := e.State("box")
	assert.Equal(t, s.Annotations["dev.runv.failure"], want)
	assert.Equal(t, s.Annotations["dev.runv.exit-status"], "137")
	assert.Assert(t, !strings.Contains(e.OK("events", "box"), `"oom"`), "no container has had too little")
}
