package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
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

// TestHooksAsRunc runs the same bundle under runc and compares what the hooks of the host see. runc
// before 1.3 runs poststart at create, with status created.
func TestHooksAsRunc(t *testing.T) {
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("no runc")
	}
	e := harness.New(t)
	life := func(log string, run func(args ...string) (int, string), bundle string) map[string]string {
		code, text := run("create", "--bundle", bundle, "web")
		assert.Equal(t, code, 0, text)
		code, text = run("start", "web")
		assert.Equal(t, code, 0, text)
		harness.Eventually(t, "it ends", func() bool {
			_, text := run("state", "web")
			return strings.Contains(text, `"stopped"`)
		})
		code, text = run("delete", "web")
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
	root := filepath.Join(e.Dir, "runc")
	theirs := life(log, func(args ...string) (int, string) {
		r := harness.Finish(exec.Command(runc, append([]string{"--root", root}, args...)...))
		return r.Code, r.Stdout + r.Stderr
	}, bundle)
	assert.NilError(t, os.Remove(log))
	ours := life(log, func(args ...string) (int, string) {
		r := e.Run(args...)
		return r.Code, r.Stdout + r.Stderr
	}, bundle)
	assert.DeepEqual(t, ours, theirs)
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
