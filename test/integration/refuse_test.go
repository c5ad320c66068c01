package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// TestBadInputIsRefusedByName gives bundles and ids that cannot work: each is
// refused in one line that names what is wrong, with status 1, and leaves nothing.
func TestBadInputIsRefusedByName(t *testing.T) {
	e := harness.New(t)
	good := e.Bundle([]string{"true"})
	edited := func(edit func(*specs.Spec)) string { return e.Bundle([]string{"true"}, edit) }
	raw := func(text string) string {
		dir := e.Bundle([]string{"true"})
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600))
		return dir
	}
	empty := t.TempDir()
	for _, tc := range []struct {
		name   string
		id     string
		bundle string
		want   string
	}{
		{"no config.json", "web", empty, "config.json"},
		{"no bundle", "web", filepath.Join(empty, "none"), "none"},
		{"invalid JSON", "web", raw("{\n  \"ociVersion\": 1.0,,\n}"), "config.json: line 2"},
		{"unknown version", "web", edited(func(s *specs.Spec) { s.Version = "9.0.0" }), "ociVersion"},
		{"missing rootfs", "web", edited(func(s *specs.Spec) { s.Root.Path = "nowhere" }), "root.path"},
		{"empty args", "web", edited(func(s *specs.Spec) { s.Process.Args = nil }), "process.args"},
		{"relative cwd", "web", edited(func(s *specs.Spec) { s.Process.Cwd = "tmp" }), "process.cwd"},
		{"namespace path", "web", edited(func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces[:0:0], specs.LinuxNamespace{Type: "mount"},
				specs.LinuxNamespace{Type: "pid", Path: "/proc/1/ns/pid"}, specs.LinuxNamespace{Type: "network"})
			s.Hostname = ""
		}), "linux.namespaces[1].path: /proc/1/ns/pid is not a namespace of a container of runv"},
		{"hooks", "web", edited(func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/true"}, {Path: "bin/true"}}}
		}), "hooks.createRuntime[1].path"},
		{"seccomp's notify", "web", edited(func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow,
				Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}},
			}
		}), "linux.seccomp.syscalls[0].action"},
		{"seccomp's operator", "web", edited(func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow,
				Syscalls: []specs.LinuxSyscall{{
					Names: []string{"mkdir"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "=="}},
				}},
			}
		}), "linux.seccomp.syscalls[0].args[0].op"},
		{"bind source", "web", edited(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Source: "/no/such", Type: "bind", Options: []string{"bind"}})
		}), "mounts[7].source"},
		{"id with a slash", "a/b", good, "a/b"},
		{"id of dots", "..", good, ".."},
		{"empty id", "", good, "id"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, verb := range []string{"create", "run"} {
				r := e.Run(verb, "--bundle", tc.bundle, tc.id)
				assert.Equal(t, r.Code, 1, r.Stderr)
				assert.Assert(t, cmp.Contains(r.Stderr, tc.want))
				assert.Equal(t, strings.Count(r.Stderr, "\n"), 1, "one line: %q", r.Stderr)
			}
		})
	}
	_, err := os.Stat(filepath.Join(e.Root, "containers"))
	assert.Assert(t, os.IsNotExist(err), "nothing was created")
}

// TestMissingProgram fails at create, at once, with the words that callers match.
func TestMissingProgram(t *testing.T) {
	e := harness.New(t)
	missing := e.Bundle([]string{"nosuch"})
	r := e.Run("run", "--bundle", missing, "web")
	assert.Equal(t, r.Code, 127)
	assert.Assert(t, cmp.Contains(r.Stderr, `exec: "nosuch": executable file not found in $PATH`))
	plain := e.Bundle([]string{"/etc/passwd"})
	assert.NilError(t, os.Chmod(filepath.Join(plain, "rootfs", "etc", "passwd"), 0o644))
	r = e.Run("create", "--bundle", plain, "web")
	assert.Equal(t, r.Code, 126)
	assert.Assert(t, cmp.Contains(r.Stderr, `exec: "/etc/passwd": permission denied`))
	e.CheckNothingLeft()
}

// TestErrorsGoToTheLogAsCallersReadThem is what containerd's and podman's parsers need.
func TestErrorsGoToTheLogAsCallersReadThem(t *testing.T) {
	e := harness.New(t)
	log := filepath.Join(e.Dir, "log.json")
	e.Extra = []string{"--log", log, "--log-format", "json"}
	r := e.Run("run", "--bundle", e.Bundle([]string{"nosuch"}), "web")
	assert.Equal(t, r.Code, 127)
	data, err := os.ReadFile(log)
	assert.NilError(t, err)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	var entry struct{ Level, Msg, Time string }
	assert.NilError(t, json.Unmarshal([]byte(lines[len(lines)-1]), &entry))
	assert.Equal(t, entry.Level, "error")
	assert.Assert(t, cmp.Contains(entry.Msg, "executable file not found"))
	assert.Assert(t, entry.Time != "")
}

// TestMounts checks what a container sees of the host's files.
func TestMounts(t *testing.T) {
	e := harness.New(t)
	dir := filepath.Join(e.Dir, "data")
	assert.NilError(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o755))
	for name, text := range map[string]string{"one": "1\n", "two": "2\n", "sub/three": "3\n"} {
		assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	bundle := e.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
		bind := func(source, dest string, options ...string) {
			s.Mounts = append(s.Mounts, specs.Mount{Source: source, Destination: dest, Type: "bind", Options: append(options, "rbind")})
		}
		bind(dir, "/rw")
		bind(dir, "/ro", "ro")
		bind(filepath.Join(dir, "one"), "/etc/single")
		bind(filepath.Join(dir, "two"), "/single-ro", "ro")
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/scratch", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m", "mode=1777"}})
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	sh := func(script string) harness.Result { return e.Run("exec", "box", "sh", "-c", script) }

	assert.Equal(t, sh("cat /rw/one /ro/sub/three /etc/single /single-ro").Stdout, "1\n3\n1\n2\n")
	assert.Equal(t, sh("echo from the guest > /rw/new").Code, 0)
	data, err := os.ReadFile(filepath.Join(dir, "new"))
	assert.NilError(t, err)
	assert.Equal(t, string(data), "from the guest\n")
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "late"), []byte("from the host\n"), 0o644))
	assert.Equal(t, sh("cat /rw/late").Stdout, "from the host\n")
	// What the guest has read and cached it sees change: in place, at equal length, and by another
	// file.
	for _, change := range []func() error{
		func() error { return os.WriteFile(filepath.Join(dir, "one"), []byte("x\n"), 0o644) },
		func() error { return os.Rename(filepath.Join(dir, "two"), filepath.Join(dir, "sub", "three")) },
	} {
		before := sh("cat /rw/one /rw/sub/three").Stdout
		assert.NilError(t, change())
		harness.Eventually(t, "the guest sees the change", func() bool { return sh("cat /rw/one /rw/sub/three").Stdout != before })
	}
	for _, script := range []string{"touch /ro/x", "echo x > /single-ro", "touch /ro/sub/x"} {
		r := sh(script)
		assert.Assert(t, r.Code != 0, script)
		assert.Assert(t, cmp.Contains(r.Stderr, "Read-only file system"))
	}
	// A file that is bound shows that file only, on its way through the share, too.
	all := sh("grep -r '^2$' /etc /proc/self/cwd/etc 2>/dev/null | wc -l")
	assert.Equal(t, strings.TrimSpace(all.Stdout), "0")
	assert.Assert(t, sh("dd if=/dev/zero of=/scratch/big bs=1M count=2").Code != 0, "the tmpfs is full at its size")
	assert.Equal(t, sh("stat -c %a /scratch").Stdout, "1777\n")
	e.OK("delete", "--force", "box")
	left, err := os.ReadDir(dir)
	assert.NilError(t, err)
	assert.Equal(t, len(left), 4, "deleting the container deletes none of its mounts' files")
}

// TestLimits checks that the guest enforces what the bundle limits, and that the VM's size follows.
func TestLimits(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", "while :; do sleep 1; done"}, func(s *specs.Spec) {
		memory, pids, period, quota := int64(64<<20), int64(20), uint64(100000), int64(150000)
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &memory}
		s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
		s.Linux.Resources.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	sh := func(script string) harness.Result { return e.Run("exec", "box", "sh", "-c", script) }
	assert.Equal(t, sh("nproc").Stdout, "2\n", "ceil(1.5) vcpus")
	r := sh("for i in $(seq 40); do sleep 5 & done")
	assert.Assert(t, cmp.Contains(r.Stderr, "fork"))
	harness.Eventually(t, "the others have ended", func() bool { return strings.Count(e.OK("ps", "box"), "sleep 5") == 0 })
	limits := sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max")
	assert.Equal(t, limits.Stdout, "67108864\n20\n150000 100000\n", limits.Stderr)
	r = sh("dd if=/dev/zero of=/dev/shm/big bs=1M count=100")
	assert.Equal(t, r.Code, 137, "killed for want of memory: %s", r.Stderr)
	assert.Equal(t, e.State("box").Status, specs.StateRunning)

	// What happened is on record when all is over.
	e.OK("kill", "box", "KILL")
	e.AwaitStatus("box", specs.StateStopped)
	harness.Eventually(t, "the events are recorded", func() bool {
		return regexp.MustCompile(`(?s)"create","id":"box".*"start".*"exec-added".*"exec-started".*"oom".*"exit","id":"box".*"status":137`).
			MatchString(e.OK("events", "box"))
	})
}
