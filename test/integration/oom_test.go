package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// watchOOM watches a cgroup as containerd's shim and conmon do. told tells whether memory ran out in it since.
func watchOOM(t *testing.T, group map[string]string) (told func() bool) {
	t.Helper()
	own, v1 := group["memory"]
	if !v1 {
		return func() bool { return !strings.Contains(setting(t, group, "", "", "memory.events")+"\n", "oom_kill 0\n") }
	}
	dir := filepath.Join("/sys/fs/cgroup/memory", own)
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, unix.Close(fd)) })
	control, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	assert.NilError(t, err)
	defer control.Close()
	line := fmt.Sprintf("%d %d", fd, control.Fd())
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(line), 0))
	return func() bool {
		_, err := unix.Read(fd, make([]byte, 8))
		return err == nil
	}
}

// TestOOMInPod lets the second container of a pod have too little memory: engines see it in its cgroup, and not in the first's.
func TestOOMInPod(t *testing.T) {
	if !hasController(t, "memory") {
		t.Skip("the host's cgroups do not count memory")
	}
	parent := fmt.Sprintf("/runv-test-pod-%d", os.Getpid())
	dirs := func(name string) (found []string) {
		for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			more, _ := filepath.Glob(pattern + parent + name)
			found = append(found, more...)
		}
		return found
	}
	t.Cleanup(func() {
		for _, dir := range dirs("") {
			assert.Check(t, os.Remove(dir), "the parent is left, as by runc")
		}
	})
	e := harness.New(t)
	sleep := []string{"sleep", "100000"}
	e.OK("run", "--detach", "--bundle", e.Bundle(sleep, func(s *specs.Spec) { s.Linux.CgroupsPath = parent + "/infra" }), "infra")
	second := func(id string, args ...string) map[string]string {
		t.Helper()
		e.OK("create", "--bundle", e.Bundle(args, sharing(e.State("infra").Pid, specs.NetworkNamespace), func(s *specs.Spec) {
			s.Linux.CgroupsPath = parent + "/" + id
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: new(int64(64 << 20))}
		}), id)
		group := cgroups(t, strconv.Itoa(e.State(id).Pid))
		for hierarchy, at := range group {
			assert.Equal(t, at, parent+"/"+id, hierarchy)
		}
		return group
	}
	group := second("web", "dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1")
	told, others := watchOOM(t, group), watchOOM(t, checkMembers(t, e, "infra"))
	e.OK("start", "web")
	e.AwaitStatus("web", specs.StateStopped)
	assert.Equal(t, e.State("web").Annotations["dev.runv.exit-status"], "137")
	assert.Assert(t, told(), "the watchers of the container heard nothing before its end")
	assert.Assert(t, !others(), "the watchers of another heard it")
	assert.Assert(t, cmp.Contains(e.OK("events", "web"), `{"type":"oom","id":"web"`))
	journal, err := os.ReadFile(filepath.Join(e.PodDir("infra"), "events.log"))
	assert.NilError(t, err)
	assert.Equal(t, strings.Count(string(journal), `"oom"`), 1, "%s", journal)
	assert.Equal(t, e.OK("exec", "infra", "echo", "alive"), "alive\n")
	assert.Assert(t, cmp.Contains(e.OK("events", "--stats", "infra"), parent+"/infra"))

	assert.Assert(t, len(dirs("/web")) > 0, "as under runc it is there until the deletion")
	e.OK("delete", "web")
	assert.DeepEqual(t, dirs("/web"), []string(nil))
	second("db", sleep...)
	e.OK("delete", "--force", "db")
	assert.DeepEqual(t, dirs("/db"), []string(nil))
	assert.Assert(t, len(dirs("/infra")) > 0)

	// Two of one name are in one cgroup.
	e.OK("run", "--detach", "--bundle", e.Bundle(sleep, sharing(e.State("infra").Pid, specs.NetworkNamespace), func(s *specs.Spec) {
		s.Linux.CgroupsPath = parent + "/infra"
	}), "twin")
	assert.DeepEqual(t, cgroups(t, strconv.Itoa(e.State("twin").Pid)), cgroups(t, strconv.Itoa(e.State("infra").Pid)))

	second("log", sleep...)
	assert.NilError(t, syscall.Kill(e.Pod("log").Supervisor.PID, syscall.SIGKILL))
	e.OK("delete", "--force", "log")
	assert.DeepEqual(t, dirs("/log"), []string(nil))
	e.OK("delete", "--force", "twin")
	e.OK("delete", "--force", "infra")
	assert.DeepEqual(t, dirs("/infra"), []string(nil))
	e.CheckNothingLeft()
}
