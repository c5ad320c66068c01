package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/console"
	"runv/internal/unixsock"
)

const (
	// readyTimeout is how long Start waits for the daemon to say that it waits for
	// the VMM. It is no error when it says nothing: the socket listens anyway.
	readyTimeout = 5 * time.Second
	readyLine    = "Waiting for vhost-user socket connection"

	// lingerTimeout bounds what the daemon's processes take to die of SIGKILL.
	lingerTimeout = 5 * time.Second

	tailLines = 5 // of what it said last, in errors
)

// daemon is a virtiofsd process, which becomes two when the VMM connects: one
// waits for the other, which serves in namespaces of its own.
type daemon struct {
	ready chan struct{} // closed when it said that it waits
	done  chan struct{} // closed when it has ended, or will never start

	mu       sync.Mutex
	pid      int // 0: not running
	stopping bool
	err      error // why it ended
}

func newDaemon() *daemon {
	return &daemon{ready: make(chan struct{}), done: make(chan struct{})}
}

// never closes done for a daemon that did not start.
func (d *daemon) never() {
	select {
	case <-d.done:
	default:
		close(d.done)
	}
}

// start runs the daemon until stop.
func (d *daemon) start(ctx context.Context, program Daemon, cfg ShareConfig) error {
	socket, err := listenBlocking(filepath.Dir(cfg.Dir))
	if err != nil {
		return err
	}
	defer socket.Close()
	log, err := console.New(cfg.LogFile)
	if err != nil {
		return err
	}
	const socketFD = 3
	cmd := exec.Command(program.Path, program.arguments(serving{dir: cfg.Dir, socketFD: socketFD, files: fileLimit()})...)
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.ExtraFiles = []*os.File{socket}
	cmd.Stdout = &watch{log: log, want: readyLine, seen: d.ready}
	cmd.Stderr = cmd.Stdout
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = time.Second // its second process may hold stderr a little longer

	launch := cfg.Launch
	if launch == nil {
		launch = (*exec.Cmd).Start
	}
	started := make(chan error, 1)
	go func() {
		// The kernel sends the parent's death signal when this thread ends.
		runtime.LockOSThread()
		d.run(cmd, launch, log, started)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", program.Path, err)
	}
	timeout := time.NewTimer(readyTimeout)
	defer timeout.Stop()
	select {
	case <-d.ready:
	case <-timeout.C:
		cfg.Log.Warn("virtiofsd does not say that it is ready", "path", program.Path)
	case <-d.done:
		if err := d.ended(); err != nil {
			return err
		}
		return errors.New("virtiofsd ended at once")
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), d.stop(context.WithoutCancel(ctx)))
	}
	cfg.Log.Debug("virtiofsd runs", slog.String("path", program.Path), slog.Int("pid", cmd.Process.Pid))
	return nil
}

// run is the one place that waits for the process.
func (d *daemon) run(cmd *exec.Cmd, launch func(*exec.Cmd) error, log *console.Log, started chan<- error) {
	defer log.Close()
	err := launch(cmd)
	if err != nil {
		d.never()
		started <- err
		return
	}
	d.mu.Lock()
	d.pid = cmd.Process.Pid
	d.mu.Unlock()
	started <- nil
	err = cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it ended well, only its output is still open somewhere
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pid = 0
	if err != nil && !d.stopping {
		d.err = fmt.Errorf("virtiofsd ended: %w", err)
		if tail := log.Tail(tailLines); len(tail) > 0 {
			d.err = fmt.Errorf("%w; it said last: %s", d.err, strings.Join(tail, " | "))
		}
	}
	close(d.done)
}

func (d *daemon) ended() error {
	select {
	case <-d.done:
	default:
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// processes lists the process and its children.
func (d *daemon) processes() []int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pid == 0 {
		return nil
	}
	return append([]int{d.pid}, children(d.pid)...)
}

// stop kills the daemon and returns when its processes are gone. Idempotent.
func (d *daemon) stop(ctx context.Context) error {
	d.mu.Lock()
	d.stopping = true
	pids := []int{}
	if d.pid != 0 { // not reaped, for run needs mu for that: the numbers are still theirs
		pids = append(children(d.pid), d.pid)
	}
	var handles []int
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			handles = append(handles, fd)
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
	}
	d.mu.Unlock()
	defer func() {
		for _, fd := range handles {
			_ = unix.Close(fd)
		}
	}()
	if len(pids) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lingerTimeout)
	defer cancel()
	select {
	case <-d.done:
	case <-ctx.Done():
		return fmt.Errorf("wait for end of virtiofsd %d: %w", pids[len(pids)-1], context.Cause(ctx))
	}
	deadline, _ := ctx.Deadline()
	for _, fd := range handles {
		if err := awaitExit(fd, time.Until(deadline)); err != nil {
			return fmt.Errorf("wait for end of virtiofsd: %w", err)
		}
	}
	return nil
}

// awaitExit blocks until the process of a pidfd has exited.
func awaitExit(pidfd int, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		left := max(time.Until(deadline), 0)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return os.ErrDeadlineExceeded
		default:
			return nil
		}
	}
}

// children are the child processes of a process's first thread.
func children(pid int) []int {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	var pids []int
	for field := range bytes.FieldsSeq(data) {
		if child, err := strconv.Atoi(string(field)); err == nil {
			pids = append(pids, child)
		}
	}
	return pids
}

// listenBlocking makes the daemon's listening socket in dir. The daemon expects a
// descriptor that blocks.
func listenBlocking(dir string) (*os.File, error) {
	l, err := unixsock.Listen(dir, socketName, "unix")
	if err != nil {
		return nil, err
	}
	defer l.Close() // the file is a duplicate
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// watch is a log that tells when a text was written to it.
type watch struct {
	log  *console.Log
	want string
	seen chan struct{} // closed then
	done bool
}

// Write never fails.
func (w *watch) Write(p []byte) (int, error) {
	n, err := w.log.Write(p)
	if !w.done {
		for _, line := range w.log.Tail(tailLines) {
			if strings.Contains(line, w.want) {
				w.done = true
				close(w.seen)
				break
			}
		}
	}
	return n, err
}
