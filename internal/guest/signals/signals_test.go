package signals_test

import (
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/signals"
)

func TestWaits(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread := unix.Gettid()
	assert.Assert(t, !signals.Waits(thread))

	// A signal that the thread blocks waits, and is none to handle.
	var set, before unix.Sigset_t
	set.Val[0] = 1 << (unix.SIGUSR1 - 1)
	assert.NilError(t, unix.PthreadSigmask(unix.SIG_BLOCK, &set, &before))
	assert.NilError(t, unix.Tgkill(unix.Getpid(), thread, unix.SIGUSR1))
	assert.Assert(t, !signals.Waits(thread))
	signal.Ignore(syscall.SIGUSR1)
	defer signal.Reset(syscall.SIGUSR1)
	assert.NilError(t, unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))

	// One that is not blocked, of a process that cannot take it: it is stopped.
	cmd := exec.Command("sleep", "1000")
	assert.NilError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		assert.Assert(t, signals.Waits(cmd.Process.Pid)) // it is gone
	}()
	assert.NilError(t, cmd.Process.Signal(syscall.SIGSTOP))
	var ws unix.WaitStatus
	_, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WUNTRACED, nil)
	assert.NilError(t, err)
	assert.Assert(t, !signals.Waits(cmd.Process.Pid))
	assert.NilError(t, cmd.Process.Signal(syscall.SIGTERM))
	assert.Assert(t, signals.Waits(cmd.Process.Pid))
}
