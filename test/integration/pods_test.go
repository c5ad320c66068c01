package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// sharing makes a specification share namespaces with a container, by the pid of its stand-in.
func sharing(pid int, kinds ...specs.LinuxNamespaceType) func(*specs.Spec) {
	return func(s *specs.Spec) {
		for _, kind := range kinds {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
			file := string(kind)
			if kind == specs.NetworkNamespace {
				file = "net"
			}
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: fmt.Sprintf("/proc/%d/ns/%s", pid, file)})
			if kind == specs.UTSNamespace {
				s.Hostname = ""
			}
		}
	}
}

// TestPod is three containers in one VM, as Podman and Docker make them.
func TestPod(t *testing.T) {
	e := harness.New(t)
	sleep := []string{"sleep", "100000"}
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, func(s *specs.Spec) { s.Hostname = "infra" }), "infra")
	infra := e.State("infra").Pid
	pod := sharing(infra, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace)
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, pod), "web")
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, sharing(e.State("web").Pid, specs.NetworkNamespace, specs.PIDNamespace)), "side")
	exec := func(id, script string) string {
		t.Helper()
		return e.OK("exec", id, "sh", "-c", script)
	}

	t.Run("one VM", func(t *testing.T) {
		boot := exec("infra", "cat /proc/sys/kernel/random/boot_id")
		for _, id := range []string{"web", "side"} {
			assert.Equal(t, exec(id, "cat /proc/sys/kernel/random/boot_id"), boot)
			assert.Equal(t, e.State(id).Annotations["dev.runv.pod"], e.State("infra").Annotations["dev.runv.pod"])
			assert.Assert(t, e.State(id).Pid != infra)
		}
		entries, err := os.ReadDir(filepath.Join(e.Root, "pods"))
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 1)
	})
	t.Run("namespaces", func(t *testing.T) {
		const links = "cd /proc/self/ns; for n in cgroup ipc mnt net pid uts; do readlink $n; done"
		of := map[string][]string{}
		for _, id := range []string{"infra", "web", "side"} {
			of[id] = strings.Fields(exec(id, links))
		}
		same := func(a, b string) (kinds string) {
			for i := range of[a] {
				if of[a][i] == of[b][i] {
					kinds += of[a][i][:strings.Index(of[a][i], ":")] + " "
				}
			}
			return kinds
		}
		assert.Equal(t, same("infra", "web"), "ipc net uts ")
		assert.Equal(t, same("web", "side"), "net pid ")
		assert.Equal(t, same("infra", "side"), "net ")
	})
	t.Run("names, ipc, processes, localhost", func(t *testing.T) {
		assert.Equal(t, exec("web", "hostname"), "infra\n")
		assert.Equal(t, exec("side", "hostname"), "runv\n")
		exec("web", "touch /dev/mqueue/of-web")
		assert.Equal(t, exec("infra", "ls /dev/mqueue"), "of-web\n")
		assert.Equal(t, exec("side", "ls /dev/mqueue"), "")
		assert.Assert(t, cmp.Contains(exec("side", "cat /proc/1/cmdline | tr '\\0' ' '; ps | grep -c 'sleep 100000'"), "sleep 100000"))
		exec("infra", "nc -l -p 8080 -e echo hello >/dev/null 2>&1 &")
		harness.Eventually(t, "infra listens", func() bool { return strings.Contains(exec("side", "cat /proc/net/tcp /proc/net/tcp6"), ":1F90") })
		assert.Equal(t, exec("side", "nc 127.0.0.1 8080 </dev/null"), "hello\n")
	})
	t.Run("each tells of itself", func(t *testing.T) {
		assert.Equal(t, e.OK("list", "-q"), "infra\nside\nweb\n")
		exec("web", "sleep 4242 >/dev/null 2>&1 &")
		assert.Assert(t, cmp.Contains(e.OK("ps", "web"), "sleep 4242"))
		for _, id := range []string{"infra", "side"} {
			assert.Assert(t, !strings.Contains(e.OK("ps", id), "4242"), id)
		}
		e.OK("pause", "web")
		assert.Equal(t, e.State("web").Status, specs.ContainerState("paused"))
		assert.Equal(t, exec("infra", "echo lives"), "lives\n")
		e.OK("resume", "web")
		for _, id := range []string{"infra", "side", "web"} {
			assert.Assert(t, cmp.Contains(e.OK("events", "--stats", id), `"id":"`+id+`"`))
		}
	})
	t.Run("refusals", func(t *testing.T) {
		for name, c := range map[string]struct {
			edit func(*specs.Spec)
			want string
		}{
			"a process of the host": {sharing(os.Getpid(), specs.PIDNamespace), fmt.Sprintf("/proc/%d/ns/pid is not a namespace of a container of runv", os.Getpid())},
			"nothing":               {sharing(1<<22-1, specs.IPCNamespace), "no such file or directory"},
			"no network": {func(s *specs.Spec) {
				s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.NetworkNamespace })
			}, "publish ports, or give the container a network of its own"},
			"a program that is missing": {func(s *specs.Spec) { pod(s); s.Process.Args = []string{"nonesuch"} }, "executable file not found in $PATH"},
			"too many CPUs": {func(s *specs.Spec) {
				pod(s)
				s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: new(int64(100000 * 4096))}
			}, "create bad: linux.resources.cpu.quota: the pod's containers need a VM of 4096 vCPUs"},
		} {
			r := e.Run("run", "-d", "--bundle", e.Bundle([]string{"true"}, c.edit), "bad")
			assert.Assert(t, r.Code != 0, name)
			assert.Assert(t, cmp.Contains(r.Stderr, c.want), name)
			assert.Equal(t, e.OK("list", "-q"), "infra\nside\nweb\n")
		}
	})
	t.Run("the pod outlives its first container", func(t *testing.T) {
		e.OK("delete", "--force", "infra")
		assert.Equal(t, exec("web", "hostname"), "infra\n")
		e.OK("run", "-d", "--bundle", e.Bundle(sleep, sharing(e.State("web").Pid, specs.IPCNamespace, specs.UTSNamespace)), "late")
		assert.Equal(t, exec("late", "hostname; ls /dev/mqueue"), "infra\nof-web\n")
		r := e.Run("run", "-d", "--bundle", e.Bundle(sleep, sharing(infra, specs.IPCNamespace)), "bad")
		assert.Assert(t, cmp.Contains(r.Stderr, "no such file or directory"))
	})
	t.Run("the end of a pid namespace's first process", func(t *testing.T) {
		e.OK("kill", "web", "KILL")
		e.AwaitStatus("side", specs.StateStopped)
		e.AwaitStatus("web", specs.StateStopped)
		assert.Equal(t, e.State("side").Annotations["dev.runv.exit-status"], "137")
		assert.Equal(t, e.State("late").Status, specs.StateRunning)
		e.OK("delete", "web")
		e.OK("delete", "side")
		e.OK("delete", "--force", "late")
	})
	e.CheckNothingLeft()
}

// TestVolumesOfPod is about files that containers of a pod share: there is one of each, with one cache, as
// on one machine.
func TestVolumesOfPod(t *testing.T) {
	e := harness.New(t)
	volume := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(volume, "file"), nil, 0o666))
	bind := func(destination string, options ...string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
			s.Mounts = append(s.Mounts, specs.Mount{Destination: destination, Type: "bind", Source: volume, Options: append(options, "bind")})
		}
	}
	sleep := []string{"sleep", "100000"}
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, bind("/dev/shm")), "a")
	in := sharing(e.State("a").Pid, specs.IPCNamespace)
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, in, bind("/vol")), "b")
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, in, bind("/vol", "ro")), "c")
	exec := func(id, script string) string {
		t.Helper()
		return e.OK("exec", id, "sh", "-c", script)
	}
	inode := exec("a", "stat -c %d:%i /dev/shm/file")
	for _, id := range []string{"b", "c"} {
		assert.Equal(t, exec(id, "stat -c %d:%i /vol/file"), inode)
	}
	for i := range 5 { // at once, and not within the second that names of the host's may be cached
		want := fmt.Sprintln("round", i)
		exec([]string{"a", "b"}[i%2], fmt.Sprintf("cd /vol 2>/dev/null || cd /dev/shm; echo round %d > file", i))
		assert.Equal(t, exec("c", "cat /vol/file"), want)
		assert.Equal(t, exec("a", "cat /dev/shm/file"), want)
	}
	r := e.Run("exec", "c", "sh", "-c", "echo x > /vol/file")
	assert.Assert(t, cmp.Contains(r.Stderr, "Read-only file system"))
	e.OK("delete", "--force", "a")
	exec("b", "echo later > /vol/file")
	assert.Equal(t, exec("c", "cat /vol/file"), "later\n")
	data, err := os.ReadFile(filepath.Join(volume, "file"))
	assert.NilError(t, err)
	assert.Equal(t, string(data), "later\n")
}

// TestSupervisorOfPodIsKilled leaves containers that have stopped and can be deleted one by one.
func TestSupervisorOfPodIsKilled(t *testing.T) {
	e := harness.New(t)
	sleep := []string{"sleep", "100000"}
	e.OK("run", "-d", "--bundle", e.Bundle(sleep), "a")
	in := sharing(e.State("a").Pid, specs.IPCNamespace)
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, in), "b")
	e.OK("create", "--bundle", e.Bundle(sleep, in), "c")
	assert.NilError(t, unix.Kill(e.Pod("a").Supervisor.PID, unix.SIGKILL))
	for _, id := range []string{"a", "b", "c"} {
		e.AwaitStatus(id, specs.StateStopped)
	}
	for _, id := range []string{"a", "c", "b"} {
		e.OK("delete", id)
	}
	e.CheckNothingLeft()
}

// TestPodGrows adds containers with limits to a pod whose VM was made for less.
func TestPodGrows(t *testing.T) {
	e := harness.New(t)
	limit := func(bytes int64) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &bytes} }
	}
	total := func() (kib int) {
		t.Helper()
		_, err := fmt.Sscanf(e.OK("exec", "a", "cat", "/proc/meminfo"), "MemTotal: %d kB", &kib)
		assert.NilError(t, err)
		return kib
	}
	hostLimit := func() uint64 {
		t.Helper()
		var ev struct {
			Data struct {
				VMM struct {
					Memory struct {
						Usage struct{ Limit uint64 }
					}
				} `json:"vmm"`
			}
		}
		assert.NilError(t, json.Unmarshal([]byte(e.OK("events", "--stats", "a")), &ev))
		return ev.Data.VMM.Memory.Usage.Limit
	}
	sleep := []string{"sleep", "100000"}
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, limit(64<<20)), "a")
	small, first := total(), hostLimit()
	assert.Assert(t, small < 192<<10)
	in := sharing(e.State("a").Pid, specs.IPCNamespace)
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, in, limit(256<<20)), "b")
	assert.Assert(t, total() > small+200<<10, "%d KiB are not 256 MiB more than %d", total(), small)
	second := hostLimit()
	assert.Assert(t, second > first+250<<20, "%d, before %d", second, first)
	// The new memory can be used, up to the limit.
	assert.Equal(t, e.OK("exec", "b", "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=40 2>/dev/null; wc -c < /dev/shm/x"), "41943040\n")
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, in), "c")
	assert.Assert(t, hostLimit() > 1<<50, "one without a limit has none: %d", hostLimit())
	e.OK("delete", "--force", "c")
	e.OK("delete", "--force", "b")
	harness.Eventually(t, "the limit is that of one container and the VM's memory", func() bool {
		now := hostLimit()
		return now > first && now < 1<<40
	})
}
