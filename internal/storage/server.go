package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/console"
	"runv/internal/shareserver"
	"runv/internal/unixsock"
)

const (
	// readyTimeout is how long Start waits for the share server to serve.
	readyTimeout = 10 * time.Second

	// lingerTimeout bounds what the server takes to die of SIGKILL.
	lingerTimeout = 5 * time.Second

	// forgetTimeout bounds how long the server may take to close what it has open in a volume. It does that between
	// requests; one that waits for a dead file system of the host delays it.
	forgetTimeout = 2 * time.Second

	tailLines = 5 // of what it said last, in errors
)

// server is the process that serves a share (internal/shareserver).
type server struct {
	done chan struct{} // closed when it has ended, or will never start

	mu       sync.Mutex
	control  *shareserver.Client // nil before the start
	pid      int                 // 0: not running
	stopping bool
	err      error // why it ended
}

func newServer() *server { return &server{done: make(chan struct{})} }

// never closes done for a server that did not start.
func (s *server) never() {
	select {
	case <-s.done:
	default:
		close(s.done)
	}
}

// start runs the server until stop. It returns when the server waits for the VMM.
func (s *server) start(ctx context.Context, cfg ShareConfig) error {
	listener, err := listen(filepath.Dir(cfg.Dir))
	if err != nil {
		return err
	}
	defer listener.Close()
	ours, theirs, err := connPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	log, err := console.New(cfg.LogFile)
	if err != nil {
		_ = ours.Close()
		return err
	}
	cmd := shareserver.Command(cfg.Dir, listener, theirs)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = time.Second
	launch := cfg.Launch
	if launch == nil {
		launch = (*exec.Cmd).Start
	}
	started := make(chan error, 1)
	go func() {
		// The kernel sends the parent's death signal when this thread ends.
		runtime.LockOSThread()
		s.run(cmd, launch, log, started)
	}()
	if err := <-started; err != nil {
		_ = ours.Close()
		return fmt.Errorf("start share server: %w", err)
	}
	_ = theirs.Close() // so that the server's end is the only one
	control := shareserver.NewClient(ours)
	s.mu.Lock()
	s.control = control
	s.mu.Unlock()
	timeout := time.NewTimer(readyTimeout)
	defer timeout.Stop()
	select {
	case <-control.Ready():
	case <-timeout.C:
		return errors.Join(fmt.Errorf("share server was not ready in %v", readyTimeout), s.stop(context.WithoutCancel(ctx)))
	case <-s.done:
		_ = control.Close()
		if err := s.ended(); err != nil {
			return err
		}
		return errors.New("share server ended at once")
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), s.stop(context.WithoutCancel(ctx)))
	}
	cfg.Log.Debug("share server runs", slog.Int("pid", cmd.Process.Pid))
	return nil
}

// run is the one place that waits for the process.
func (s *server) run(cmd *exec.Cmd, launch func(*exec.Cmd) error, log *console.Log, started chan<- error) {
	defer log.Close()
	err := launch(cmd)
	if err != nil {
		s.never()
		started <- err
		return
	}
	s.mu.Lock()
	s.pid = cmd.Process.Pid
	s.mu.Unlock()
	started <- nil
	err = cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it ended well, only its output is still open somewhere
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pid = 0
	if err != nil && !s.stopping {
		s.err = fmt.Errorf("share server ended: %w", err)
		if tail := log.Tail(tailLines); len(tail) > 0 {
			s.err = fmt.Errorf("%w; it said last: %s", s.err, strings.Join(tail, " | "))
		}
	}
	close(s.done)
}

func (s *server) ended() error {
	select {
	case <-s.done:
	default:
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// process is the server's pid, 0 when it does not run.
func (s *server) process() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid
}

// forget makes the server close what it has open in a volume, so that the volume's mount can go.
func (s *server) forget(volume string) error {
	s.mu.Lock()
	control := s.control
	s.mu.Unlock()
	if control == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), forgetTimeout) //nolint:forbidigo // Remove undoes, whatever has ended
	defer cancel()
	return control.Forget(ctx, volume)
}

// client is the server's control socket, nil before the start.
func (s *server) client() *shareserver.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.control
}

// stop kills the server and returns when it is gone. Idempotent.
func (s *server) stop(ctx context.Context) error {
	s.mu.Lock()
	s.stopping = true
	pid, control := s.pid, s.control
	if pid != 0 { // not reaped, for run needs mu for that: the number is still its own
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	s.mu.Unlock()
	if control != nil {
		_ = control.Close()
	}
	if pid == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lingerTimeout)
	defer cancel()
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for end of share server %d: %w", pid, context.Cause(ctx))
	}
}

// listen makes the server's listening socket in dir.
func listen(dir string) (*os.File, error) {
	l, err := unixsock.Listen(dir, socketName, "unix")
	if err != nil {
		return nil, err
	}
	defer l.Close() // the file is a duplicate
	return l.File()
}

// connPair makes the two ends of the control socket.
func connPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make control socket: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "control")
	file := os.NewFile(uintptr(fds[0]), "control")
	defer file.Close()
	if ours, err = net.FileConn(file); err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("make control socket: %w", err)
	}
	return ours, theirs, nil
}
