package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// hookCall is one run of a hook as it has told it.
type hookCall struct {
	Phase string
	Cwd   string
	NetNS string // of the state's pid, as the hook sees it
	Mount string // namespace of the hook
	Env   string
	State specs.State
}

// hookScript tells of a call in one line of a log, and fails for the phase that is named.
const hookScript = `#!/bin/sh
state=$(cat)
pid=$(echo "$state" | sed -n 's/.*"pid":\([0-9]*\).*/\1/p')
echo "{\"Phase\":\"$1\",\"Cwd\":\"$PWD\",\"NetNS\":\"$(readlink /proc/$pid/ns/net)\",\"Mount\":\"$(readlink /proc/self/ns/mnt)\",\"Env\":\"$(env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= | sort | tr '\n' ' ')\",\"State\":$state}" >>"$2"
if [ "$1" = "$3" ]; then echo "no $1" >&2; exit 5; fi
exit 0
`

const hookEnv = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// hooked is a bundle with a hook in each phase; log is where those of the host write, and in the
// root file system /log is that of the others. fail is the phase whose hook fails.
func hooked(t *testing.T, e *harness.Env, fail string, args []string, edit ...func(*specs.Spec)) (bundle, log string) {
	t.Helper()
	script := filepath.Join(e.Dir, "hook.sh")
	assert.NilError(t, os.WriteFile(script, []byte(hookScript), 0o755))
	bundle = e.Bundle(args)
	log = filepath.Join(bundle, "log")
	assert.NilError(t, os.WriteFile(filepath.Join(bundle, "rootfs", "hook.sh"), []byte(hookScript), 0o755))
	hook := func(path, log, phase string) []specs.Hook {
		return []specs.Hook{{Path: path, Args: []string{"hook", phase, log, fail}, Env: []string{hookEnv, "A=b"}}}
	}
	e.EditSpec(bundle, func(s *specs.Spec) {
		s.Annotations = map[string]string{"org.example.color": "blue"}
		s.Hooks = &specs.Hooks{
			Prestart:        hook(script, log, "prestart"), //nolint:staticcheck // deprecated, and used
			CreateRuntime:   hook(script, log, "createRuntime"),
			CreateContainer: hook("/hook.sh", "/log", "createContainer"),
			StartContainer:  hook("/hook.sh", "/log", "startContainer"),
			Poststart:       hook(script, log, "poststart"),
			Poststop:        hook(script, log, "poststop"),
		}
	})
	for _, f := range edit {
		e.EditSpec(bundle, f)
	}
	return bundle, log
}

// calls reads a log, which need not exist.
func calls(t *testing.T, path string) (all []hookCall) {
	t.Helper()
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	assert.NilError(t, err)
	for line := range strings.Lines(string(data)) {
		var c hookCall
		assert.NilError(t, json.Unmarshal([]byte(line), &c), "%s", line)
		all = append(all, c)
	}
	return all
}

func phases(all []hookCall) string {
	var names []string
	for _, c := range all {
		names = append(names, c.Phase+":"+string(c.State.Status))
	}
	return strings.Join(names, " ")
}

func TestHooks(t *testing.T) {
	e := harness.New(t)
	bundle, log := hooked(t, e, "", []string{"sh", "-c", "cat /log | wc -l; sleep 1000"})
	guestLog := filepath.Join(bundle, "rootfs", "log")
	out, err := os.Create(filepath.Join(e.Dir, "out"))
	assert.NilError(t, err)
	defer out.Close()
	create := e.Command("create", "--bundle", bundle, "web")
	create.Stdout = out
	r := harness.Finish(create)
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Equal(t, phases(calls(t, log)), "prestart:creating createRuntime:creating")
	assert.Equal(t, phases(calls(t, guestLog)), "createContainer:creating")
	pid := e.State("web").Pid

	e.OK("start", "web")
	assert.Equal(t, phases(calls(t, log)), "prestart:creating createRuntime:creating poststart:running")
	assert.Equal(t, phases(calls(t, guestLog)), "createContainer:creating startContainer:created")
	assert.Equal(t, e.State("web").Status, specs.StateRunning)
	harness.Eventually(t, "the program sees what the hooks did", func() bool {
		data, err := os.ReadFile(out.Name())
		assert.NilError(t, err)
		return string(data) == "2\n"
	})

	e.OK("kill", "web", "KILL")
	e.AwaitStatus("web", specs.StateStopped)
	assert.Equal(t, len(calls(t, log)), 3, "poststop is for delete")
	e.OK("delete", "web")
	all := calls(t, log)
	assert.Equal(t, phases(all), "prestart:creating createRuntime:creating poststart:running poststop:stopped")
	e.OK("delete", "--force", "web")
	assert.Equal(t, len(calls(t, log)), 4, "once")

	net, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", os.Getpid()))
	assert.NilError(t, err)
	mounts, err := os.Readlink("/proc/self/ns/mnt")
	assert.NilError(t, err)
	for _, c := range all {
		assert.Equal(t, c.State.ID, "web")
		assert.Equal(t, c.State.Version, specs.Version)
		assert.Equal(t, c.State.Bundle, bundle)
		assert.DeepEqual(t, c.State.Annotations, map[string]string{"org.example.color": "blue"})
		assert.Equal(t, c.Cwd, bundle)
		assert.Equal(t, c.Env, "A=b "+hookEnv+" ")
		assert.Equal(t, c.Mount, mounts, "hooks run in the mount namespace of the host")
		if c.Phase == "poststop" {
			assert.Equal(t, c.State.Pid, 0)
			continue
		}
		assert.Equal(t, c.State.Pid, pid)
		assert.Assert(t, c.NetNS != "", "the stand-in's network namespace can be found: it is now %s", net)
	}
	for _, c := range calls(t, guestLog) {
		assert.Equal(t, c.State.ID, "web")
		assert.Equal(t, c.State.Pid, 1)
		assert.Equal(t, c.State.Bundle, bundle)
		assert.DeepEqual(t, c.State.Annotations, map[string]string{"org.example.color": "blue"})
		assert.Equal(t, c.Cwd, "/")
		assert.Equal(t, c.Env, "A=b "+hookEnv+" ")
	}
	e.CheckNothingLeft()
}

// TestHooksAsRunc runs the same bundle under both runcs and compares what the hooks of the host see. runc
// before 1.3 runs poststart at create, with status created.
func TestHooksAsRunc(t *testing.T) {
	e := harness.New(t)
	id := "web" + ownSuffix("any")
	life := func(log string, run func(args ...string) (int, string), bundle string) map[string]string {
		code, text := run("create", "--bundle", bundle, id)
		assert.Equal(t, code, 0, text)
		code, text = run("start", id)
		assert.Equal(t, code, 0, text)
		harness.Eventually(t, "it ends", func() bool {
			_, text := run("state", id)
			return strings.Contains(text, `"stopped"`)
		})
		code, text = run("delete", id)
		assert.Equal(t, code, 0, text)
		seen := map[string]string{}
		for _, c := range calls(t, log) {
			c.State.Version, c.State.Bundle = "", ""
			if c.Phase == "poststart" {
				c.State.Status = specs.StateRunning
			}
			if c.Phase == "poststop" {
				c.Cwd = "" // runc's is that of whoever deletes
			}
			c.State.Pid = min(c.State.Pid, 1)
			seen[c.Phase] = fmt.Sprintf("%d. %s %+v env %s cwd %s net %t", len(seen), c.Mount, c.State, c.Env,
				strings.ReplaceAll(c.Cwd, bundle, "BUNDLE"), c.NetNS != "")
		}
		return seen
	}
	bundle, log := hooked(t, e, "", []string{"true"}, func(s *specs.Spec) {
		s.Hooks.CreateContainer, s.Hooks.StartContainer = nil, nil // runc resolves the path of createContainer on the host
	})
	ours := life(log, func(args ...string) (int, string) {
		r := e.Run(args...)
		return r.Code, r.Stdout + r.Stderr
	}, bundle)
	for _, runc := range e.Runcs() {
		assert.NilError(t, os.Remove(log))
		theirs := life(log, func(args ...string) (int, string) {
			r := runc.Run(args...)
			return r.Code, r.Stdout + r.Stderr
		}, bundle)
		assert.Check(t, cmp.DeepEqual(ours, theirs), runc.Name)
	}
}

// TestFailingHooks makes a hook of each phase fail: the command says which and why, and what it has
// begun is undone.
func TestFailingHooks(t *testing.T) {
	e := harness.New(t)
	for _, tc := range []struct {
		phase, path, verb string
		ran               string // hooks of the host
	}{
		{"prestart", "", "create", "prestart:creating poststop:stopped"},
		{"createRuntime", "", "create", "prestart:creating createRuntime:creating poststop:stopped"},
		{"createContainer", "/hook.sh", "create", "prestart:creating createRuntime:creating poststop:stopped"},
		{"startContainer", "/hook.sh", "start", "prestart:creating createRuntime:creating poststop:stopped"},
		{"poststart", "", "start", "prestart:creating createRuntime:creating poststart:running poststop:stopped"},
	} {
		t.Run(tc.phase, func(t *testing.T) {
			bundle, log := hooked(t, e, tc.phase, []string{"sleep", "1000"})
			if tc.path == "" {
				tc.path = filepath.Join(e.Dir, "hook.sh")
			}
			r := e.Run("create", "--bundle", bundle, "web")
			if tc.verb == "start" {
				assert.Equal(t, r.Code, 0, r.Stderr)
				r = e.Run("start", "web")
			}
			assert.Equal(t, r.Code, 1)
			assert.Assert(t, cmp.Contains(r.Stderr, fmt.Sprintf("%s web: hooks.%s[0] %s: exit status 5: no %s\n", tc.verb, tc.phase, tc.path, tc.phase)))
			if tc.verb == "start" {
				e.AwaitStatus("web", specs.StateStopped)
				e.OK("delete", "web")
			}
			assert.Equal(t, phases(calls(t, log)), tc.ran)
			e.CheckNothingLeft()
		})
	}
	t.Run("poststop", func(t *testing.T) {
		bundle, log := hooked(t, e, "poststop", []string{"true"})
		e.EditSpec(bundle, func(s *specs.Spec) { s.Hooks.Poststop = append(s.Hooks.Poststop, s.Hooks.Poststop[0]) })
		r := e.Run("run", "--bundle", bundle, "web")
		assert.Equal(t, r.Code, 0, r.Stderr)
		assert.Assert(t, strings.HasSuffix(phases(calls(t, log)), "poststart:running poststop:stopped poststop:stopped"), "failures do not keep others from running")
		e.CheckNothingLeft()
	})
	t.Run("missing", func(t *testing.T) {
		bundle, log := hooked(t, e, "", []string{"true"}, func(s *specs.Spec) {
			s.Hooks.CreateRuntime[0].Path = "/no/such"
		})
		r := e.Run("run", "--bundle", bundle, "web")
		assert.Equal(t, r.Code, 1)
		assert.Assert(t, cmp.Contains(r.Stderr, "create web: hooks.createRuntime[0] /no/such: no such file or directory"))
		assert.Equal(t, phases(calls(t, log)), "prestart:creating poststop:stopped")
		e.CheckNothingLeft()
	})
}

// hanging is a hook that writes its pid and never ends by itself.
func hanging(file string, timeout *int) []specs.Hook {
	return []specs.Hook{{
		Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 1000 & echo $! >" + file + ".tmp; mv " + file + ".tmp " + file + "; wait"},
		Env: []string{hookEnv}, Timeout: timeout,
	}}
}

func awaitPid(t *testing.T, file string) (pid int) {
	t.Helper()
	harness.Eventually(t, "the hook runs", func() bool {
		data, err := os.ReadFile(file)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(data)))
		return err == nil
	})
	return pid
}

func awaitDead(t *testing.T, pid int) {
	t.Helper()
	harness.Eventually(t, "the hook's processes are killed", func() bool {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(data), ") Z ")
	})
}

func TestHangingHooks(t *testing.T) {
	e := harness.New(t)
	file := filepath.Join(e.Dir, "pid")
	with := func(t *testing.T, edit func(h *specs.Hooks)) (bundle, log string) {
		_ = os.Remove(file)
		return hooked(t, e, "", []string{"sleep", "1000"}, func(s *specs.Spec) { edit(s.Hooks) })
	}
	t.Run("timeout", func(t *testing.T) {
		bundle, log := with(t, func(h *specs.Hooks) { h.CreateRuntime = hanging(file, new(1)) })
		r := e.Run("create", "--bundle", bundle, "web")
		assert.Equal(t, r.Code, 1)
		assert.Assert(t, cmp.Contains(r.Stderr, "create web: hooks.createRuntime[0] /bin/sh: did not end within 1s\n"))
		awaitDead(t, awaitPid(t, file))
		assert.Equal(t, phases(calls(t, log)), "prestart:creating poststop:stopped")
		e.CheckNothingLeft()
	})
	t.Run("timeout in the guest", func(t *testing.T) {
		bundle, _ := with(t, func(h *specs.Hooks) { h.StartContainer = hanging("/pid", new(1)) })
		e.OK("create", "--bundle", bundle, "web")
		r := e.Run("start", "web")
		assert.Equal(t, r.Code, 1)
		assert.Assert(t, cmp.Contains(r.Stderr, "start web: hooks.startContainer[0] /bin/sh: did not end within 1s\n"))
		e.AwaitStatus("web", specs.StateStopped)
		e.OK("delete", "web")
		e.CheckNothingLeft()
	})
	t.Run("delete --force", func(t *testing.T) {
		bundle, log := with(t, func(h *specs.Hooks) { h.CreateRuntime = hanging(file, nil) })
		create := e.Command("create", "--bundle", bundle, "web")
		assert.NilError(t, create.Start())
		pid := awaitPid(t, file)
		e.OK("delete", "--force", "web")
		awaitDead(t, pid)
		assert.Equal(t, harness.ExitCode(create.Wait()), 1)
		assert.Equal(t, phases(calls(t, log)), "prestart:creating poststop:stopped")
		e.CheckNothingLeft()
	})
	t.Run("command is killed", func(t *testing.T) {
		bundle, log := with(t, func(h *specs.Hooks) { h.CreateRuntime = hanging(file, nil) })
		create := e.Command("create", "--bundle", bundle, "web")
		assert.NilError(t, create.Start())
		pid := awaitPid(t, file)
		assert.NilError(t, create.Process.Kill())
		_ = create.Wait()
		awaitDead(t, pid)
		e.CheckNothingLeft()
		assert.Equal(t, phases(calls(t, log)), "prestart:creating poststop:stopped")
	})
	t.Run("supervisor is killed", func(t *testing.T) {
		bundle, log := with(t, func(h *specs.Hooks) {
			h.CreateRuntime = hanging(file, nil)
			h.CreateRuntime[0].Args[2] = "echo $$ >" + file + ".tmp; mv " + file + ".tmp " + file + "; exec sleep 1000"
		})
		create := e.Command("create", "--bundle", bundle, "web")
		assert.NilError(t, create.Start())
		pid := awaitPid(t, file)
		assert.NilError(t, syscall.Kill(e.Pod("web").Supervisor.PID, syscall.SIGKILL))
		awaitDead(t, pid)
		assert.Equal(t, harness.ExitCode(create.Wait()), 1)
		assert.Equal(t, phases(calls(t, log)), "prestart:creating poststop:stopped", "by the command")
		e.CheckNothingLeft()
	})
	t.Run("poststart and delete --force", func(t *testing.T) {
		bundle, log := with(t, func(h *specs.Hooks) { h.Poststart = hanging(file, nil) })
		e.OK("create", "--bundle", bundle, "web")
		start := e.Command("start", "web")
		assert.NilError(t, start.Start())
		pid := awaitPid(t, file)
		assert.Equal(t, e.State("web").Status, specs.StateRunning)
		e.OK("delete", "--force", "web")
		awaitDead(t, pid)
		assert.Equal(t, harness.ExitCode(start.Wait()), 1)
		assert.Equal(t, phases(calls(t, log)), "prestart:creating createRuntime:creating poststop:stopped")
		e.CheckNothingLeft()
	})
}

// TestPoststopWithoutSupervisor deletes containers whose supervisor was killed: the command runs
// the hooks, once.
func TestPoststopWithoutSupervisor(t *testing.T) {
	e := harness.New(t)
	bundle, log := hooked(t, e, "", []string{"sleep", "1000"})
	e.OK("run", "--detach", "--bundle", bundle, "web")
	assert.NilError(t, syscall.Kill(e.Pod("web").Supervisor.PID, syscall.SIGKILL))
	e.AwaitStatus("web", specs.StateStopped)
	assert.NilError(t, os.WriteFile(filepath.Join(bundle, "config.json"), []byte("{}"), 0o600)) // what counts is what create has read
	began := time.Now()
	e.OK("delete", "web")
	assert.Equal(t, phases(calls(t, log)), "prestart:creating createRuntime:creating poststart:running poststop:stopped", "after %s", time.Since(began))
	e.OK("delete", "--force", "web")
	assert.Equal(t, len(calls(t, log)), 4)
	e.CheckNothingLeft()
}

// TestHooksHaveTheProgramsRights runs one script as the hooks of the container and as its program: they must not tell
// anything apart, but for the filter of system calls, which createContainer hooks come before, as under runc.
func TestHooksHaveTheProgramsRights(t *testing.T) {
	e := harness.New(t)
	const script = `#!/bin/sh
{
grep -E '^(Uid|Gid|Groups|Umask|Cap|NoNewPrivs|Seccomp|Cpus_allowed_list|SigBlk|SigIgn)' /proc/self/status
cat /proc/self/limits /proc/self/oom_score_adj /proc/self/coredump_filter /proc/self/cgroup
for ns in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$ns; done
read stat </proc/self/stat; set -- $1 ${stat##*) }; echo nice ${18} priority ${39} policy ${40}
ionice -p $$; uname -m; pwd; head -n 1 /proc/self/numa_maps | cut -d ' ' -f 2
env | grep -v -e ^SHLVL= -e ^_= | sort
mkdir /tmp/made; echo mkdir $?
sleep 0; ln -s x /tmp/link; echo ln $?; rm -f /tmp/link
} >/tmp/of-$1 2>&1
rm -rf /tmp/made
`
	bundle := e.Bundle([]string{"/show", "program"}, func(s *specs.Spec) {
		p := s.Process
		p.NoNewPrivileges = false // then the filter takes a right that the program does not have
		p.Env = []string{"PATH=/bin", "OF=process"}
		p.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{77}, Umask: new(uint32(0o027))}
		p.Cwd = "/tmp"
		p.OOMScoreAdj = new(400)
		p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 111, Hard: 222}, {Type: "RLIMIT_CORE", Soft: 1, Hard: 2}}
		p.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 5}
		p.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
		all := []string{"CAP_NET_BIND_SERVICE", "CAP_KILL"}
		p.Capabilities = &specs.LinuxCapabilities{
			Bounding: append([]string{"CAP_CHOWN"}, all...), Effective: all, Permitted: all, Inheritable: all, Ambient: []string{"CAP_KILL"},
		}
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0"}
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno},
			{Names: []string{"symlink", "symlinkat"}, Action: specs.ActKillProcess},
		}}
		s.Hooks = &specs.Hooks{
			CreateContainer: []specs.Hook{{Path: "/show", Args: []string{"show", "create"}}},
			StartContainer: []specs.Hook{
				{Path: "/show", Args: []string{"show", "start"}},
				{Path: "/bin/ln", Args: []string{"ln", "-s", "x", "/tmp/link"}},
			},
		}
	})
	root := filepath.Join(bundle, "rootfs")
	assert.NilError(t, os.WriteFile(filepath.Join(root, "show"), []byte(script), 0o755))
	assert.NilError(t, os.Chmod(filepath.Join(root, "tmp"), 0o777))
	told := func(who string) string {
		data, err := os.ReadFile(filepath.Join(root, "tmp", "of-"+who))
		assert.NilError(t, err)
		return string(data)
	}
	e.OK("create", "--bundle", bundle, "web")
	r := e.Run("start", "web")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "start web: hooks.startContainer[1] /bin/ln: signal: bad system call"))
	e.OK("delete", "--force", "web")
	e.EditSpec(bundle, func(s *specs.Spec) { s.Hooks.StartContainer = s.Hooks.StartContainer[:1] })
	r = e.Run("run", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Equal(t, told("start"), told("program"))
	for _, want := range []string{
		"OF=process\n", "HOME=/tmp\n", "mkdir 1\n", "ln 159\n", "Seccomp:\t2\n", "NoNewPrivs:\t0\n", "CapAmb:\t0000000000000020\n",
		"CapBnd:\t0000000000000421\n", "nice 5 priority 0 policy 3\n", "best-effort: prio 6\n", "i686\n", "\n/tmp\n", "Groups:\t77",
		"Umask:\t0027\n", "bind:0\n", "\n400\n",
	} {
		assert.Check(t, cmp.Contains(told("program"), want))
	}
	before := strings.NewReplacer("Seccomp:\t2", "Seccomp:\t0", "Seccomp_filters:\t1", "Seccomp_filters:\t0", "ln 159", "ln 0", "mkdir 1", "mkdir 0").Replace(told("program"))
	var rest []string
	for line := range strings.Lines(before) {
		if !strings.Contains(line, "mkdir:") && !strings.Contains(line, "Bad system call") {
			rest = append(rest, line)
		}
	}
	assert.Equal(t, told("create"), strings.Join(rest, ""))
}

// TestEnvironmentOfHooks runs hooks of the host that have no environment of their own, under runc, too: they have that of the
// command that creates the container, or, for poststop, of the one that deletes it.
func TestEnvironmentOfHooks(t *testing.T) {
	e := harness.New(t)
	bundle, log := hooked(t, e, "", []string{"true"}, func(s *specs.Spec) {
		s.Hooks.CreateContainer, s.Hooks.StartContainer = nil, nil
		for _, list := range [][]specs.Hook{s.Hooks.Prestart, s.Hooks.CreateRuntime, s.Hooks.Poststart, s.Hooks.Poststop} { //nolint:staticcheck // deprecated, and used
			list[0].Env = nil
		}
	})
	life := func(of commandLine) (seen []string) {
		_ = os.Remove(log)
		for _, args := range [][]string{{"create", "--bundle", bundle, "web"}, {"start", "web"}, nil, {"delete", "web"}} {
			if args == nil {
				harness.Eventually(t, "it ends", func() bool {
					return strings.Contains(harness.Finish(of.command("state", "web")).Stdout, `"stopped"`)
				})
				continue
			}
			cmd := of.command(args...)
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "VERB=" + args[0]}
			r := harness.Finish(cmd)
			assert.Equal(t, r.Code, 0, r.Stderr)
		}
		for _, c := range calls(t, log) {
			seen = append(seen, c.Phase+": "+c.Env)
		}
		return seen
	}
	all := runtimes(e)
	seen := life(all[len(all)-1])
	path := "PATH=" + os.Getenv("PATH")
	assert.DeepEqual(t, seen, []string{
		"prestart: " + path + " VERB=create ", "createRuntime: " + path + " VERB=create ",
		"poststart: " + path + " VERB=create ", "poststop: " + path + " VERB=delete ",
	})
	for _, theirs := range all[:len(all)-1] {
		assert.Check(t, cmp.DeepEqual(life(theirs), seen), theirs.name)
	}
}
