// Package launch is the agent's end of the conversation with a stage: it starts one,
// tells it what to do, and learns what came of it. internal/guest/container uses it.
// The other end is internal/guest/stage, which is linked into a program of its
// own and so must not need this package.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/guest/stage"
)

// Stage is a stage that is to be started, or was.
type Stage struct {
	conn *net.UnixConn
	args []string

	mu      sync.Mutex // guards inherit once the stage is started: Close may be called twice at a time
	inherit []*os.File // what the stage gets besides 0, 1 and 2, until CloseInherit
}

// New prepares a stage that does cfg. The caller calls Close.
func New(cfg *stage.Config) (_ *Stage, err error) {
	s := &Stage{args: []string{stage.Name}}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	s.inherit = append(s.inherit, os.NewFile(uintptr(fds[1]), "stage"))
	ours := os.NewFile(uintptr(fds[0]), "agent")
	conn, err := net.FileConn(ours)
	if err := errors.Join(err, ours.Close()); err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	s.conn = conn.(*net.UnixConn)

	fd, err := unix.MemfdCreate("config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memfd: %w", err)
	}
	mem := os.NewFile(uintptr(fd), "config")
	s.inherit = append(s.inherit, mem)
	if _, err := mem.WriteAt(cfg.Encode(), 0); err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return s, nil
}

// Target gives the stage of an exec what it shall join: the pidfd of the container's init, which
// stays the caller's. Before it is anything else the stage enters the namespaces, CLONE_NEW*, that
// only a process with a single thread can enter; 0: none.
func (s *Stage) Target(pidfd *os.File, enter int) error {
	if err := s.giveCopy(targetIndex, pidfd); err != nil {
		return err
	}
	if enter != 0 {
		s.args = append(s.args, stage.EnterArgument(firstFD+targetIndex, enter))
	}
	return nil
}

// Devices gives the stage a file system of device nodes, which is the stage's from now on.
func (s *Stage) Devices(f *os.File) { s.give(devicesIndex, f) }

// Enter makes the stage enter namespaces, CLONE_NEW*, of target, a namespace or a pidfd, before it is
// anything else. Target stays the caller's. Calls of Enter and Make take effect in their order.
func (s *Stage) Enter(target *os.File, namespaces int) error {
	index := max(len(s.inherit), devicesIndex+1)
	if err := s.giveCopy(index, target); err != nil {
		return err
	}
	s.args = append(s.args, stage.EnterArgument(firstFD+index, namespaces))
	return nil
}

// Make makes the stage make namespaces, CLONE_NEW*, before it is anything else. With a pid namespace
// the stage is then another process than the one that Fork has started; see Made.
func (s *Stage) Make(namespaces int) { s.args = append(s.args, stage.MakeArgument(namespaces)) }

// What is where in Stage.inherit, in the order of the stage's descriptors, which begin at firstFD.
const (
	firstFD      = 3
	targetIndex  = 2
	devicesIndex = 3
)

func (s *Stage) give(index int, f *os.File) {
	for len(s.inherit) <= index {
		s.inherit = append(s.inherit, nil)
	}
	s.inherit[index] = f
}

func (s *Stage) giveCopy(index int, f *os.File) error {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("copy descriptor: %w", err)
	}
	s.give(index, os.NewFile(uintptr(fd), f.Name()))
	return nil
}

// Fork starts the stage with these descriptors 0, 1 and 2 and returns its pid. It
// waits for nothing but the execve of the stage.
func (s *Stage) Fork(exe string, stdio []*os.File, attr *syscall.SysProcAttr) (pid int, err error) {
	var files []uintptr
	for _, f := range append(append([]*os.File{}, stdio...), s.inherit...) {
		fd := noFile
		if f != nil {
			fd = f.Fd()
		}
		files = append(files, fd)
	}
	// A stage lives for milliseconds: it needs no garbage collector, and few threads, as each
	// counts for the container's limit of processes.
	return syscall.ForkExec(exe, s.args, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"GOGC=off", "GOMAXPROCS=1"},
		Files: files,
		Sys:   attr,
	})
}

// madeTimeout bounds the wait for a stage to make namespaces: a few system calls.
const madeTimeout = 10 * time.Second

// Made waits until the stage has made namespaces as Make says, and returns the pid of the process that
// it is now, or 0 if it is the one that Fork has started. The error is the stage's when it could not. To
// be called after Fork, and CloseInherit is then.
func (s *Stage) Made() (pid int, err error) {
	s.CloseInherit()
	if err := s.conn.SetReadDeadline(time.Now().Add(madeTimeout)); err != nil {
		return 0, fmt.Errorf("wait for new namespaces: %w", err)
	}
	buf := make([]byte, maxReply)
	n, err := s.conn.Read(buf)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return 0, ErrEnded
	}
	if err := errors.Join(err, s.conn.SetReadDeadline(time.Time{})); err != nil {
		return 0, fmt.Errorf("wait for new namespaces: %w", err)
	}
	if pid, ok := stage.DecodeMade(buf[:n]); ok {
		return pid, nil
	}
	if err := stage.DecodeReply(buf[:n]); err != nil {
		return 0, err
	}
	return 0, ErrEnded
}

// noFile makes ForkExec leave a descriptor out.
const noFile = ^uintptr(0)

// CloseInherit closes the stage's files here. To be called after Fork, or else the end
// of the stage goes unnoticed.
func (s *Stage) CloseInherit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.inherit {
		if f != nil {
			f.Close()
		}
	}
	s.inherit = nil
}

// maxReply is the longest message of a stage, in bytes.
const maxReply = 16 << 10

// ErrEnded says that the stage has ended, or become the user's program.
var ErrEnded = errors.New("process ended during its setup")

// Ready waits until the stage is ready, and returns the master of the
// terminal if it made one, else -1. The stage's own error is returned with its
// kind; ErrEnded when it was killed.
func (s *Stage) Ready(ctx context.Context) (ptmx int, err error) {
	defer s.bound(ctx)()
	buf := make([]byte, maxReply)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := s.conn.ReadMsgUnix(buf, oob)
	if errors.Is(err, unix.ECONNRESET) {
		// A stage that has ended without reading all that was said to it. The kernel tells that
		// first, once, and then what the stage has said.
		n, oobn, _, _, err = s.conn.ReadMsgUnix(buf, oob)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), err == nil && n == 0:
		return -1, ErrEnded
	case err != nil:
		return -1, fmt.Errorf("wait for process setup: %w", err)
	}
	ptmx = receivedFD(oob[:oobn])
	err = stage.DecodeReply(buf[:n])
	if err != nil && ptmx >= 0 {
		unix.Close(ptmx)
		ptmx = -1
	}
	return ptmx, err
}

func receivedFD(oob []byte) int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) == 0 {
		return -1
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) == 0 {
		return -1
	}
	unix.CloseOnExec(fds[0])
	return fds[0]
}

// Start lets a stage that is ready execute the program, and waits until it has.
func (s *Stage) Start(ctx context.Context) error {
	if err := s.Proceed(); err != nil {
		return err
	}
	return s.Executed(ctx)
}

// Proceed lets a stage that waits go on.
func (s *Stage) Proceed() error {
	if _, err := s.conn.Write([]byte("go on")); err != nil {
		return ErrEnded
	}
	return nil
}

// Executed waits until the stage has become the program.
func (s *Stage) Executed(ctx context.Context) error {
	_, err := s.Ready(ctx)
	if errors.Is(err, ErrEnded) {
		return nil // the socket was closed by execve
	}
	return err
}

// bound ends reads when ctx ends, until the returned function is called.
func (s *Stage) bound(ctx context.Context) (release func()) {
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

// Close ends the conversation; a stage that waits for the start ends, too. Idempotent.
func (s *Stage) Close() {
	s.CloseInherit()
	if s.conn != nil {
		s.conn.Close()
	}
}
