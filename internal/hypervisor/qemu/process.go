package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// process is a child that dies with this process.
type process struct {
	cmd     *exec.Cmd
	started time.Time
	exited  chan struct{} // closed when it has been reaped
	err     error         // of the wait, after exited
}

// startProcess starts cmd and the goroutine that waits for it. The kernel ties a
// parent death signal to the thread that forked, so that goroutine keeps its
// thread to itself from the fork to the child's end; the thread then ends with it,
// as what was set on it for the child's sake must not come back to other goroutines. It is not the process's first
// thread, which does not end and is what others see of the process. launch is hypervisor.Config's.
func startProcess(cmd *exec.Cmd, launch func(*exec.Cmd) error) (*process, error) {
	if launch == nil {
		launch = (*exec.Cmd).Start
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	started := make(chan error, 1)
	go p.run(launch, started)
	return p, <-started
}

// run starts the process, tells how that went, and waits for its end.
func (p *process) run(launch func(*exec.Cmd) error, started chan<- error) {
	runtime.LockOSThread() // never unlocked
	if unix.Gettid() == unix.Getpid() {
		go p.run(launch, started) // elsewhere, or once more
		runtime.UnlockOSThread()
		return
	}
	err := restrictThread()
	if err == nil {
		p.started = time.Now()
		err = launch(p.cmd)
	}
	started <- err
	if err != nil {
		return
	}
	p.err = p.cmd.Wait()
	close(p.exited)
}

// restrictThread sets what the child inherits from the calling thread.
func restrictThread() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // a umask of its own
		return fmt.Errorf("unshare umask: %w", err)
	}
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// kill is idempotent and does not wait.
func (p *process) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// status describes the end of the process, after exited.
func (p *process) status() string {
	if p.cmd.ProcessState != nil {
		return p.cmd.ProcessState.String()
	}
	return p.err.Error()
}
