// Package stdio carries a process's input and output between its pipes or
// terminal and streams of the agent channel.
//
// internal/guest/container owns one IO per process. The package starts no
// processes and knows no RPC. Each direction has a stream, hence flow control, of
// its own: a reader who is slow stalls only the process that writes.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// IO is the input and output of one process.
type IO struct {
	streams Streams
	plain   bool        // the terminal passes newlines on as they are
	child   []*os.File  // the process's descriptors, until CloseChild
	pipes   [3]*os.File // our ends, by descriptor; nil: none
	ptmx    *os.File    // master of the terminal; nil: none
	peer    int         // a slave descriptor of ours until the process has exited; -1: none

	out [3]*copier // index 1 and 2 are used
	wg  sync.WaitGroup

	mu      sync.Mutex
	started bool
	exited  bool
}

// Streams are the streams of a process, by descriptor; nil means none.
type Streams [3]net.Conn

// Numbers are the numbers of the streams, by descriptor; 0 means none.
type Numbers [3]uint32

// Claim takes the streams from the agent channel; claim is transport.Session's Claim.
// The caller closes them, or leaves that to New.
func Claim(ctx context.Context, claim func(context.Context, uint32) (net.Conn, error), numbers Numbers) (s Streams, err error) {
	for fd, number := range numbers {
		if number == 0 {
			continue
		}
		if s[fd], err = claim(ctx, number); err != nil {
			s.Close()
			return Streams{}, err
		}
	}
	return s, nil
}

// Close closes the streams and ends reads and writes that wait on them. Idempotent.
func (s Streams) Close() {
	for _, st := range s {
		if st != nil {
			abort(st)
		}
	}
}

// Options say what a process's descriptors are like, besides their streams.
type Options struct {
	Terminal bool // all three are a terminal, which comes with SetTerminal
	// PlainNewlines makes the terminal pass a newline on without a carriage return.
	PlainNewlines bool
	// Faulty has a bit for each descriptor without a stream that cannot be read from or written to.
	Faulty uint32
}

// New makes pipes for the streams; a process with a terminal gets none.
// The streams are closed by Close, and if New fails. The caller calls Close.
func New(streams Streams, opts Options) (_ *IO, err error) {
	s := &IO{streams: streams, plain: opts.PlainNewlines, peer: -1}
	defer func() {
		if err != nil {
			s.CloseChild()
			s.Close()
		}
	}()
	if opts.Terminal && streams[2] != nil {
		return nil, errors.New("a process with a terminal has no stderr stream")
	}
	for fd := range s.streams {
		if s.streams[fd] != nil && !opts.Terminal {
			err = s.makePipe(fd)
		} else {
			err = s.openNull(fd, opts.Faulty&(1<<fd) != 0)
		}
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// openNull makes the process's descriptor fd /dev/null. A faulty one is open for the other direction only, so that the
// process's calls fail.
func (s *IO) openNull(fd int, faulty bool) error {
	mode := os.O_RDWR
	switch {
	case faulty && fd == 0:
		mode = os.O_WRONLY
	case faulty:
		mode = os.O_RDONLY
	}
	null, err := os.OpenFile(os.DevNull, mode, 0)
	if err != nil {
		return err
	}
	s.child = append(s.child, null)
	return nil
}

// makePipe makes the process's descriptor fd an end of a new pipe.
func (s *IO) makePipe(fd int) error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	// A container may have used up what users may have in large pipes; then it gets a
	// usual one.
	_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, bufferSize)
	ours, theirs := p[0], p[1]
	if fd == 0 {
		ours, theirs = p[1], p[0]
	}
	err := unix.SetNonblock(ours, true) // before NewFile, which looks at it
	s.pipes[fd] = os.NewFile(uintptr(ours), "pipe")
	s.child = append(s.child, os.NewFile(uintptr(theirs), "pipe"))
	return err
}

// Child returns the process's descriptors 0, 1 and 2.
func (s *IO) Child() []*os.File { return s.child }

// Chown gives the process's pipes an owner, so that it can open its /dev/stdout and the like.
func (s *IO) Chown(uid, gid int) error {
	for fd, pipe := range s.pipes {
		if pipe == nil {
			continue
		}
		if err := unix.Fchown(int(s.child[fd].Fd()), uid, gid); err != nil {
			return fmt.Errorf("chown stdio: %w", err)
		}
	}
	return nil
}

// CloseChild closes the process's descriptors here, once it has copies of its own.
func (s *IO) CloseChild() {
	for _, f := range s.child {
		f.Close()
	}
	s.child = nil
}

// SetTerminal hands over the master of the process's terminal. Before Start.
func (s *IO) SetTerminal(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("set up terminal: %w", err)
	}
	s.ptmx = os.NewFile(uintptr(fd), "ptmx")
	// Without a slave of ours the terminal would seem to have ended whenever the
	// process closes its last one, though it may open it again.
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return fmt.Errorf("open terminal: %w", errno)
	}
	s.peer = int(peer)
	if !s.plain {
		return nil
	}
	t, err := unix.IoctlGetTermios(s.peer, unix.TCGETS)
	if err == nil {
		t.Oflag &^= unix.ONLCR
		err = unix.IoctlSetTermios(s.peer, unix.TCSETS, t)
	}
	if err != nil {
		return fmt.Errorf("set up terminal: %w", err)
	}
	return nil
}

// Resize sets the window size of the terminal.
func (s *IO) Resize(width, height uint16) error {
	if s.ptmx == nil {
		return errors.New("process has no terminal")
	}
	rc, err := s.ptmx.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height})
	})
	return errors.Join(cerr, err)
}

// Start starts to copy.
func (s *IO) Start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.pipes[0]
	if s.ptmx != nil {
		in = s.ptmx
		s.out[1] = newCopier(s.ptmx, s.streams[1], true)
	}
	for fd := 1; fd <= 2; fd++ {
		if s.pipes[fd] != nil {
			s.out[fd] = newCopier(s.pipes[fd], s.streams[fd], false)
		}
		if s.out[fd] != nil {
			s.wg.Go(s.out[fd].run)
		}
	}
	if s.streams[0] != nil && in != nil {
		s.wg.Go(func() { copyInput(in, s.streams[0], s.ptmx == nil) })
	}
	s.started = true
	if s.exited {
		s.drain()
	}
}

// Exited tells that the process has been reaped. What it wrote is in the pipes
// or the terminal now; Drained is about that.
func (s *IO) Exited() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exited {
		return
	}
	s.exited = true
	if s.peer >= 0 {
		unix.Close(s.peer)
		s.peer = -1
	}
	if s.started {
		s.drain()
	}
}

func (s *IO) drain() {
	for _, c := range s.out {
		if c != nil {
			c.drain()
		}
	}
}

// Drained waits until all that the process had written before Exited was sent,
// and returns how many bytes of stdout and stderr that were. Other processes
// may hold the same pipes: what they write later is still copied.
func (s *IO) Drained() (stdout, stderr uint64) {
	var counts [3]uint64
	for fd, c := range s.out {
		if c != nil {
			<-c.drained
			counts[fd] = c.count
		}
	}
	// The host learns that nobody will read its input by the end of the stream.
	if s.streams[0] != nil && (s.pipes[0] == nil || !hasReader(s.pipes[0])) {
		abort(s.streams[0])
	}
	return counts[1], counts[2]
}

// hasReader tells whether any process can still read from the pipe.
func hasReader(pipe *os.File) bool {
	rc, err := pipe.SyscallConn()
	if err != nil {
		return false
	}
	reader := false
	err = rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(p, 0)
		reader = err == nil && p[0].Revents&unix.POLLERR == 0
	})
	return err == nil && reader
}

// Wait returns when all copying has ended.
func (s *IO) Wait() { s.wg.Wait() }

// Close ends all copying and closes everything. Idempotent.
func (s *IO) Close() {
	s.streams.Close()
	for _, p := range s.pipes {
		if p != nil {
			p.Close()
		}
	}
	if s.ptmx != nil {
		s.ptmx.Close()
	}
	s.Exited()
	s.wg.Wait()
}

// abort closes a stream and ends reads and writes that wait on it, which a close
// alone does not.
func abort(st net.Conn) {
	_ = st.SetDeadline(past)
	_ = st.Close()
}

var past = time.Unix(1, 0)
