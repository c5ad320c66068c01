package hook_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/hook"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sh is a hook that runs a script, with $0 for a file name.
func sh(script, file string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script, file}}
}

func run(t *testing.T, state string, hooks ...specs.Hook) error {
	t.Helper()
	return hook.Run(t.Context(), hook.Prestart, hooks, hook.Surroundings{Dir: t.TempDir(), State: []byte(state)})
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	return string(data)
}

func TestWhatAHookGets(t *testing.T) {
	t.Setenv("OURS", "must not get there")
	dir := t.TempDir()
	state := strings.Repeat("state ", 50_000) // more than a pipe holds
	file := filepath.Join(dir, "out")
	// exec -a is no part of every shell: argv[0] is seen in /proc.
	h := sh(`cat >"$0"; pwd >"$0.pwd"; tr '\0' '\n' </proc/$$/environ >"$0.env"; tr '\0' '\n' </proc/$$/cmdline >"$0.args"
		ls /proc/$$/fd >"$0.fds"`, file)
	h.Args[0], h.Env = "a name", []string{"A=1", "A=2", "PATH=/usr/bin:/bin", "NO_VALUE"}
	assert.NilError(t, hook.Run(t.Context(), hook.Prestart, []specs.Hook{h}, hook.Surroundings{Dir: dir, State: []byte(state), Env: []string{"NOT=mine"}}))
	assert.Equal(t, read(t, file), state)
	assert.Equal(t, read(t, file+".pwd"), dir+"\n")
	assert.Equal(t, read(t, file+".env"), "A=1\nA=2\nPATH=/usr/bin:/bin\nNO_VALUE\n")
	assert.Equal(t, strings.Split(read(t, file+".args"), "\n")[0], "a name")
	for fd := range strings.FieldsSeq(read(t, file+".fds")) {
		n, err := strconv.Atoi(fd)
		assert.NilError(t, err)
		assert.Assert(t, n < 3 || n >= 10, "descriptor %d", n) // a shell keeps its own from 10 on
	}

	bare := specs.Hook{Path: "/usr/bin/env"}
	script := filepath.Join(dir, "script")
	assert.NilError(t, os.WriteFile(script, []byte("#!/bin/sh\ntr '\\0' '\\n' </proc/$$/environ >"+file+"\n"), 0o755))
	bare.Path = script
	assert.NilError(t, hook.Run(t.Context(), hook.Prestart, []specs.Hook{bare}, hook.Surroundings{Dir: filepath.Join(dir, "gone")}))
	assert.Equal(t, strings.TrimSpace(read(t, file)), "") // no environment at all: not ours
	assert.NilError(t, hook.Run(t.Context(), hook.Prestart, []specs.Hook{bare}, hook.Surroundings{Env: []string{"CALLER=yes"}}))
	assert.Equal(t, strings.TrimSpace(read(t, file)), "CALLER=yes")
}

func TestOrderAndFirstFailure(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	err := run(t, "", sh(`echo 0 >>"$0"`, file), sh(`echo 1 >>"$0"; echo out; echo sorry >&2; exit 3`, file), sh(`echo 2 >>"$0"`, file))
	assert.Error(t, err, "hooks.prestart[1] /bin/sh: exit status 3: out sorry")
	assert.Equal(t, read(t, file), "0\n1\n")

	assert.NilError(t, os.Remove(file))
	err = hook.RunAll(t.Context(), hook.Poststop, []specs.Hook{
		sh(`echo 0 >>"$0"; exit 1`, file), sh(`echo 1 >>"$0"`, file), sh(`echo 2 >>"$0"; kill -9 $$`, file),
	}, hook.Surroundings{})
	assert.Error(t, err, "hooks.poststop[0] /bin/sh: exit status 1\nhooks.poststop[2] /bin/sh: signal: killed")
	assert.Equal(t, read(t, file), "0\n1\n2\n")
}

func TestCannotBeStarted(t *testing.T) {
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "data"), nil, 0o644))
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "no such file or directory",
		filepath.Join(dir, "data"): "permission denied",
		dir:                        "permission denied",
	} {
		err := run(t, "", specs.Hook{Path: path})
		assert.Error(t, err, "hooks.prestart[0] "+path+": "+want)
	}
}

// gone waits until no process has the id that is written in file.
func gone(t *testing.T, file string) {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(read(t, file)))
	assert.NilError(t, err)
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(5 * time.Millisecond) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(data), ") Z ") { // who adopted it may not have reaped it
			return
		}
		assert.Assert(t, time.Now().Before(deadline), "process %d lives: %s", pid, data)
	}
}

func TestTimeoutKillsTheGroup(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	h := sh(`echo waiting; sleep 1000 & echo $! >"$0"; wait`, file)
	h.Timeout = new(1)
	began := time.Now()
	err := run(t, "", h)
	assert.Error(t, err, "hooks.prestart[0] /bin/sh: did not end within 1s: waiting")
	assert.Assert(t, time.Since(began) < 10*time.Second)
	gone(t, file)
}

func TestContextKillsTheGroup(t *testing.T) {
	dir := t.TempDir()
	fifo, file := filepath.Join(dir, "fifo"), filepath.Join(dir, "pid")
	assert.NilError(t, unix.Mkfifo(fifo, 0o600))
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() {
		f, err := os.Open(fifo) // until the hook runs
		if err == nil {
			f.Close()
		}
		cancel(errors.New("deleted"))
	}()
	err := hook.Run(ctx, hook.CreateRuntime, []specs.Hook{sh(`sleep 1000 & echo $! >"$0"; : >`+fifo+`; wait`, file), sh("true", "")}, hook.Surroundings{})
	assert.Error(t, err, "hooks.createRuntime[0] /bin/sh: deleted")
	gone(t, file)

	err = hook.Run(ctx, hook.CreateRuntime, []specs.Hook{sh("true", "")}, hook.Surroundings{})
	assert.Error(t, err, "hooks.createRuntime[0] /bin/sh: deleted")
}

func TestMuchOutput(t *testing.T) {
	assert.NilError(t, run(t, "", sh(`head -c 10000000 /dev/zero; head -c 10000000 /dev/zero >&2`, "")))
	err := run(t, "", sh(`yes word | head -c 10000000; echo; echo last words >&2; exit 1`, ""))
	assert.ErrorContains(t, err, "exit status 1: ")
	assert.Assert(t, strings.HasSuffix(err.Error(), "word last words"), err)
	assert.Assert(t, len(err.Error()) < 4<<10, "%d bytes", len(err.Error()))
}

func TestClosesItsFiles(t *testing.T) {
	state := strings.Repeat("x", 1<<20)
	assert.NilError(t, run(t, state, sh(`exec <&- >&- 2>&-; exit 0`, "")))
	assert.Error(t, run(t, state, sh(`exec <&- >&- 2>&-; exit 7`, "")), "hooks.prestart[0] /bin/sh: exit status 7")
}

// A hook may leave a daemon that keeps its output open.
func TestLeavesADaemon(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	began := time.Now()
	assert.NilError(t, run(t, "", sh(`sleep 1000 & echo $! >"$0"`, file)))
	pid, err := strconv.Atoi(strings.TrimSpace(read(t, file)))
	assert.NilError(t, err)
	assert.NilError(t, unix.Kill(pid, unix.SIGKILL), "it lives on")
	assert.ErrorContains(t, run(t, "", sh(`echo text; sleep 1000 & echo $! >"$0"; exit 1`, file)), "exit status 1: text")
	assert.Assert(t, time.Since(began) < 10*time.Second)
	pid, err = strconv.Atoi(strings.TrimSpace(read(t, file)))
	assert.NilError(t, err)
	assert.NilError(t, unix.Kill(pid, unix.SIGKILL))
}

func TestTimeouts(t *testing.T) {
	none, two, huge := specs.Hook{}, specs.Hook{Timeout: new(2)}, specs.Hook{Timeout: new(int(^uint(0) >> 1))}
	assert.Equal(t, hook.Timeouts(nil, time.Hour), time.Duration(0))
	assert.Equal(t, hook.Timeouts([]specs.Hook{none, two, none}, time.Minute), 2*time.Minute+2*time.Second)
	assert.Assert(t, hook.Timeouts([]specs.Hook{huge}, 0) > 24*time.Hour)
	huge.Path = "/bin/true"
	assert.NilError(t, run(t, "", huge))
}
