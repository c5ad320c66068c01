// Package faults breaks runv in every way that the outside can, with real VMs, and
// checks what its users then see: an error that says why, or an exit, within seconds, and
// nothing left after delete --force.
package faults

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/image/initramfs"
	"runv/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// patience is how long the news of a fault may take. It is generous for a loaded machine: what
// it tells apart is seconds and never.
const patience = 30 * time.Second

// guestDir copies the guest's files by links; the test may replace some.
func guestDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"vmlinux", "initrd.cpio", "guest.json"} {
		assert.NilError(t, os.Symlink(filepath.Join(harness.TreeRoot(), "build", "guest", name), filepath.Join(dir, name)))
	}
	return dir
}

// evilGuest is a guest directory whose agent is evilguest in this mode.
func evilGuest(t *testing.T, mode string) string {
	t.Helper()
	dir := guestDir(t)
	program := filepath.Join(t.TempDir(), "evilguest")
	build := exec.Command("go", "build", "-o", program, "runv/test/faults/evilguest")
	build.Dir = harness.TreeRoot()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	code, err := os.ReadFile(program)
	assert.NilError(t, err)
	// The kernel unpacks archives one after the other: the second one's /init replaces the first's.
	var a initramfs.Archive
	assert.NilError(t, a.File("init", 0o755, code))
	assert.NilError(t, a.File("evil", 0o644, []byte(mode)))
	original, err := os.ReadFile(filepath.Join(dir, "initrd.cpio"))
	assert.NilError(t, err)
	path := filepath.Join(dir, "initrd.cpio")
	assert.NilError(t, os.Remove(path))
	f, err := os.Create(path)
	assert.NilError(t, err)
	defer f.Close()
	_, err = f.Write(original)
	assert.NilError(t, err)
	_, err = a.WriteTo(f)
	assert.NilError(t, err)
	return dir
}

// failsToRun checks that a run fails within patience, in one line that says all of want,
// and leaves nothing even without delete.
func failsToRun(t *testing.T, e *harness.Env, want ...string) {
	t.Helper()
	bundle := e.Bundle([]string{"true"})
	r := e.Run("run", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 1, r.Stderr)
	for _, text := range want {
		assert.Assert(t, cmp.Contains(r.Stderr, text))
	}
	assert.Equal(t, strings.Count(r.Stderr, "\n"), 1, "one line: %q", r.Stderr)
	assert.Assert(t, r.Took < patience, "it took %s", r.Took)
	e.CheckNothingLeft()
}

func TestQEMUIsMissing(t *testing.T) {
	e := harness.New(t)
	e.Setenv = map[string]string{"RUNV_QEMU": "/no/such/qemu"}
	failsToRun(t, e, "start VM", "/no/such/qemu")
}

func TestKernelIsMissing(t *testing.T) {
	e := harness.New(t)
	dir := guestDir(t)
	assert.NilError(t, os.Remove(filepath.Join(dir, "vmlinux")))
	e.Extra = []string{"--guest-dir", dir}
	failsToRun(t, e, dir, "vmlinux")
}

func TestKernelIsNone(t *testing.T) {
	e := harness.New(t)
	dir := guestDir(t)
	assert.NilError(t, os.Remove(filepath.Join(dir, "vmlinux")))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "vmlinux"), []byte("no kernel"), 0o644))
	e.Extra = []string{"--guest-dir", dir}
	failsToRun(t, e, "start VM")
}

func TestGuestTurnsAgainstTheHost(t *testing.T) {
	for mode, want := range map[string][]string{
		"panicking":           {"start VM", "console", "Attempted to kill init"},
		"off":                 {"start VM", "powered itself off", "evilguest: I am off"},
		"silent":              {"start VM", "agent did not answer in 15s", "console", "evilguest: I am silent"},
		"garbage-first":       {"start VM", "no hello"},
		"garbage-after-hello": {"start VM", "console", "evilguest: I am garbage-after-hello"},
		"huge-message":        {"start VM", "console", "evilguest: I am huge-message"},
	} {
		t.Run(mode, func(t *testing.T) {
			e := harness.New(t)
			e.Extra = []string{"--guest-dir", evilGuest(t, mode)}
			if mode == "silent" {
				e.Setenv = map[string]string{"RUNV_BOOT_TIMEOUT": "15s"}
			}
			failsToRun(t, e, want...)
		})
	}
}

// running starts a container that runs until something happens to it, in the foreground.
func running(t *testing.T, e *harness.Env) (run *exec.Cmd, ended chan int) {
	t.Helper()
	bundle := e.Bundle([]string{"sleep", "100000"})
	run = e.Command("run", "--bundle", bundle, "web")
	run.Stderr = &bytes.Buffer{}
	assert.NilError(t, run.Start())
	ended = make(chan int, 1)
	go func() { ended <- harness.ExitCode(run.Wait()) }()
	harness.Eventually(t, "web runs", func() bool {
		return strings.Contains(e.Run("state", "web").Stdout, `"running"`)
	})
	return run, ended
}

// awaitEnd returns the status with which `runv run` has ended.
func awaitEnd(t *testing.T, ended chan int) int {
	t.Helper()
	select {
	case code := <-ended:
		return code
	case <-time.After(patience):
		t.Fatal("runv run does not end")
		return 0
	}
}

func kill(t *testing.T, pid int) {
	t.Helper()
	assert.NilError(t, syscall.Kill(pid, syscall.SIGKILL))
}

func TestKilledParts(t *testing.T) {
	for _, tc := range []struct {
		name string
		pid  func(e *harness.Env) int
		told string // by runv run
	}{
		{"QEMU", func(e *harness.Env) int { return e.Pod("web").VM[0].PID }, "VM ended: VMM ended after"},
		{"share server", func(e *harness.Env) int { return e.Pod("web").VM[1].PID }, "share ended: share server ended: signal: killed"},
		{"supervisor", func(e *harness.Env) int { return e.Pod("web").Supervisor.PID }, "supervisor has gone"},
		{"stand-in", func(e *harness.Env) int { return e.State("web").Pid }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := harness.New(t)
			run, ended := running(t, e)
			kill(t, tc.pid(e))
			assert.Equal(t, awaitEnd(t, ended), 137)
			assert.Assert(t, cmp.Contains(run.Stderr.(*bytes.Buffer).String(), tc.told))
			e.CheckNothingLeft()
		})
		t.Run(tc.name+" detached", func(t *testing.T) {
			e := harness.New(t)
			bundle := e.Bundle([]string{"sleep", "100000"})
			e.OK("run", "--detach", "--bundle", bundle, "web")
			kill(t, tc.pid(e))
			e.AwaitStatus("web", specs.StateStopped)
			assert.Assert(t, cmp.Contains(e.OK("list"), "stopped"))
			e.OK("delete", "web")
			e.CheckNothingLeft()
		})
	}
}

// TestKilledCommandLine kills `runv run` and `runv create` in every phase of their work.
func TestKilledCommandLine(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"})
	for _, after := range []time.Duration{5, 20, 50, 100, 300, 1000, 2000} {
		cmd := e.Command("create", "--bundle", bundle, "web")
		assert.NilError(t, cmd.Start())
		<-time.After(after * time.Millisecond) // wherever that is
		assert.NilError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		e.OK("delete", "--force", "web")
		e.CheckNothingLeft()
	}
}

// TestKilledSupervisorDuringCreate kills the supervisor in every phase of a start.
func TestKilledSupervisorDuringCreate(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"})
	for _, after := range []time.Duration{0, 20, 100, 500, 1500} {
		ended := make(chan harness.Result, 1)
		go func() { ended <- e.Run("create", "--bundle", bundle, "web") }()
		var pid int
		harness.Eventually(t, "the supervisor is there", func() bool {
			pods, _ := filepath.Glob(filepath.Join(e.Root, "containers", "web", "pod", "pod.json"))
			if len(pods) == 0 {
				return false
			}
			pid = e.Pod("web").Supervisor.PID
			return pid > 0
		})
		<-time.After(after * time.Millisecond)
		kill(t, pid)
		select {
		case r := <-ended:
			if r.Code == 0 {
				t.Logf("create was quicker than %dms", after)
			} else {
				assert.Equal(t, r.Code, 1, r.Stderr)
				assert.Assert(t, cmp.Contains(r.Stderr, "supervisor"))
			}
		case <-time.After(patience):
			t.Fatal("create does not end")
		}
		e.OK("delete", "--force", "web")
		e.CheckNothingLeft()
	}
}

// TestDamagedState force-deletes what the state files no longer describe.
func TestDamagedState(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"})
	for _, damage := range []string{"", "{", `{"version":99}`, "\x00\x01\x02"} {
		e.OK("run", "--detach", "--bundle", bundle, "web")
		assert.NilError(t, os.WriteFile(filepath.Join(e.Root, "containers", "web", "state.json"), []byte(damage), 0o600))
		r := e.Run("list")
		assert.Assert(t, cmp.Contains(r.Stdout+r.Stderr, "web"), "list tells of it")
		e.OK("delete", "--force", "web")
		e.CheckNothingLeft()
	}
}

// TestStoppedParts stops what a stuck host would: nothing hangs for ever.
func TestStoppedParts(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"})
	for name, pid := range map[string]func() int{
		"QEMU":       func() int { return e.Pod("web").VM[0].PID },
		"supervisor": func() int { return e.Pod("web").Supervisor.PID },
		"stand-in":   func() int { return e.State("web").Pid },
	} {
		e.OK("run", "--detach", "--bundle", bundle, "web")
		assert.NilError(t, syscall.Kill(pid(), syscall.SIGSTOP), name)
		began := time.Now()
		e.OK("delete", "--force", "web")
		assert.Assert(t, time.Since(began) < patience+patience, "%s: it took %s", name, time.Since(began))
		e.CheckNothingLeft()
	}
}
