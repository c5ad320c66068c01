package stdio

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// way is how a file can be read or written without getting stuck.
type way int

const (
	// direct: no wait worth ending (regular files, /dev/null).
	direct way = iota
	// reopened: the file is a non-blocking description of our own (pipes,
	// terminals), and Go's poller waits.
	reopened
	// socket: cannot be reopened, but takes MSG_DONTWAIT.
	socket
	// polled: wait until ready, then do a blocking call (a pty's master, devices).
	// Another reader of the same file may be faster: then Close returns, but the
	// call stays until there is data again.
	polled
	// faulty: every call fails, as the program's own would on one machine.
	faulty
)

// Source is a caller's file to read from. Methods may be called from several
// goroutines, Read from one at a time.
type Source struct {
	file  *os.File
	conn  syscall.RawConn // of file
	way   way
	tty   bool
	ready *readiness // for socket and polled
	fault error      // of faulty
	null  bool
}

// NewSource takes over f, of whatever kind; the caller must not use it any more, not even after an
// error. A file that nobody can read from is no error, see Fault. Close closes it.
func NewSource(f *os.File) (*Source, error) {
	o, err := open(f, unix.O_RDONLY, unix.EPOLLIN|unix.EPOLLRDHUP)
	if err != nil {
		return nil, fmt.Errorf("open %s for reading: %w", f.Name(), err)
	}
	return &Source{file: o.file, conn: o.conn, way: o.way, tty: o.tty, ready: o.ready, fault: o.fault, null: o.null}, nil
}

// Fault tells why nobody can read from the file: it is open for writing only, say, or a directory. Read fails
// with it. nil when there is no such reason.
func (s *Source) Fault() error { return s.fault }

// IsNull tells whether the file is /dev/null.
func (s *Source) IsNull() bool { return s.null }

// Read blocks until there is at least one byte, the input ended (io.EOF), or
// Close was called (os.ErrClosed).
func (s *Source) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	switch s.way {
	case faulty:
		return 0, s.fault
	case socket:
		return s.recv(p)
	case polled:
		if err := s.ready.wait(func() bool { return isReady(s.conn, unix.POLLIN) }); err != nil {
			return 0, err
		}
	}
	n, err := s.file.Read(p)
	// A terminal whose other side is gone says EIO; for the reader that is the end.
	if s.tty && errors.Is(err, unix.EIO) {
		err = io.EOF
	}
	return n, closedError(err)
}

func (s *Source) recv(p []byte) (n int, err error) {
	waitErr := s.ready.wait(func() bool {
		err = control(s.conn, func(fd int) (err error) {
			n, _, err = unix.Recvfrom(fd, p, unix.MSG_DONTWAIT)
			return err
		})
		return !errors.Is(err, unix.EAGAIN)
	})
	switch {
	case waitErr != nil:
		return 0, waitErr
	case err != nil:
		return 0, closedError(err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Close ends a Read that waits and closes the file. Later calls do nothing.
func (s *Source) Close() error {
	return closeBoth(s.ready, s.file)
}

// Sink is a caller's file to write to. Methods may be called from several
// goroutines, Write from one at a time.
type Sink struct {
	file  *os.File
	conn  syscall.RawConn // of file
	way   way
	ready *readiness // for socket and polled
	fault error      // of faulty
	null  bool
}

// NewSink takes over f, of whatever kind; the caller must not use it any more, not even after an
// error. A file that nobody can write to is no error, see Fault. Close closes it.
func NewSink(f *os.File) (*Sink, error) {
	o, err := open(f, unix.O_WRONLY, unix.EPOLLOUT)
	if err != nil {
		return nil, fmt.Errorf("open %s for writing: %w", f.Name(), err)
	}
	return &Sink{file: o.file, conn: o.conn, way: o.way, ready: o.ready, fault: o.fault, null: o.null}, nil
}

// Fault tells why nobody can write to the file: it is open for reading only, say. Write fails with
// it. nil when there is no such reason.
func (s *Sink) Fault() error { return s.fault }

// IsNull tells whether the file is /dev/null.
func (s *Sink) IsNull() bool { return s.null }

// Write blocks until all of p is written, the file broke (unix.EPIPE when
// nobody reads any more; there is never a SIGPIPE), or Close was called
// (os.ErrClosed).
func (s *Sink) Write(p []byte) (int, error) {
	var one func([]byte) (int, error)
	switch s.way {
	case faulty:
		return 0, s.fault
	case socket:
		one = s.send
	case polled:
		one = s.writeSome
	default:
		n, err := s.file.Write(p)
		return n, closedError(err)
	}
	done := 0
	for done < len(p) {
		n, err := one(p[done:])
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (s *Sink) send(p []byte) (n int, err error) {
	waitErr := s.ready.wait(func() bool {
		err = control(s.conn, func(fd int) (err error) {
			n, err = unix.SendmsgN(fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			return err
		})
		return !errors.Is(err, unix.EAGAIN)
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return max(n, 0), closedError(err)
}

// writeSome writes no more than what a file that is ready takes without
// blocking: 256 bytes is when a terminal calls itself ready.
func (s *Sink) writeSome(p []byte) (int, error) {
	if err := s.ready.wait(func() bool { return isReady(s.conn, unix.POLLOUT) }); err != nil {
		return 0, err
	}
	n, err := s.file.Write(p[:min(len(p), 256)])
	return n, closedError(err)
}

// Close ends a Write that waits and closes the file. Later calls do nothing.
func (s *Sink) Close() error {
	return closeBoth(s.ready, s.file)
}

// opened is a caller's file made fit for waiting.
type opened struct {
	file  *os.File
	conn  syscall.RawConn
	way   way
	tty   bool
	ready *readiness
	fault error
	null  bool // the file is /dev/null
}

// open consumes f. mode is unix.O_RDONLY or unix.O_WRONLY, events what
// epoll waits for if f cannot be reopened.
func open(f *os.File, mode int, events uint32) (o opened, err error) {
	o.file = f
	defer func() {
		if err != nil {
			_ = o.file.Close()
		}
	}()
	if o.conn, err = f.SyscallConn(); err != nil {
		return o, err
	}
	var st unix.Stat_t
	if err = control(o.conn, func(fd int) error {
		o.fault = faultOf(fd, mode)
		_, notTTY := unix.IoctlGetTermios(fd, unix.TCGETS)
		o.tty = notTTY == nil
		return unix.Fstat(fd, &st)
	}); err != nil {
		return o, err
	}
	o.null = st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
	if o.fault == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		o.fault = unix.EISDIR
	}
	if o.fault != nil {
		o.way = faulty
		return o, nil
	}

	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFREG || kind == unix.S_IFBLK:
		o.way = direct
		return o, nil
	case kind == unix.S_IFSOCK:
		o.way = socket
	case kind == unix.S_IFIFO || o.tty && unix.Major(st.Rdev) != ttyAuxMajor:
		own, reopenErr := reopen(o.conn, mode)
		if reopenErr == nil {
			_ = f.Close()
			o.file, o.way = own, reopened
			o.conn, err = own.SyscallConn()
			return o, err
		}
		o.way = polled // no reader at the moment, or no permission
	default:
		o.way = polled
	}
	o.ready, err = newReadiness(o.conn, events)
	if errors.Is(err, unix.EPERM) { // has no poll, like /dev/null
		o.way, err = direct, nil
	}
	return o, err
}

// faultOf tells why the kernel would refuse to read from a descriptor or to write to it, whatever there is to
// read. It touches nothing: to move no bytes is refused for the same reasons, and never blocks.
func faultOf(fd, mode int) error {
	move := unix.Readv
	if mode == unix.O_WRONLY {
		move = unix.Writev
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	switch {
	case err != nil: // no socket
		_, err = move(fd, nil)
	case kind != unix.SOCK_DGRAM || mode == unix.O_WRONLY: // a datagram may come from anybody
		_, err = unix.Getpeername(fd)
	}
	for _, fault := range []error{unix.EBADF, unix.EINVAL, unix.ENOTCONN} {
		if errors.Is(err, fault) {
			return fault
		}
	}
	return nil
}

// ttyAuxMajor is the device number of /dev/tty, /dev/console and /dev/ptmx:
// opened again they are another terminal than before.
const ttyAuxMajor = 5

// reopen makes a non-blocking description of the same file.
func reopen(conn syscall.RawConn, mode int) (*os.File, error) {
	var own int
	err := control(conn, func(fd int) (err error) {
		path := fmt.Sprintf("/proc/self/fd/%d", fd)
		own, err = unix.Open(path, mode|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(own), "stdio"), nil
}

// readiness waits for a file by way of an epoll instance that holds just that file:
// the instance is ours, so Go's poller can wait for it and Close can end the
// wait, while the file's own flags stay as they are.
type readiness struct {
	epoll *os.File
	conn  syscall.RawConn
}

// newReadiness returns unix.EPERM if the file cannot be waited for.
func newReadiness(file syscall.RawConn, events uint32) (*readiness, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	err = control(file, func(fd int) error {
		return unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
	})
	if err == nil {
		err = unix.SetNonblock(epfd, true) // or else Go would not poll it
	}
	if err != nil {
		_ = unix.Close(epfd)
		return nil, err
	}
	r := &readiness{epoll: os.NewFile(uintptr(epfd), "epoll")}
	if r.conn, err = r.epoll.SyscallConn(); err != nil {
		_ = r.epoll.Close()
		return nil, err
	}
	return r, nil
}

// wait calls try, again whenever the file became ready, until it returns true.
// os.ErrClosed after close.
func (r *readiness) wait(try func() bool) error {
	if err := r.conn.Read(func(uintptr) bool { return try() }); err != nil {
		return os.ErrClosed // without deadlines there is no other error
	}
	return nil
}

func closeBoth(r *readiness, f *os.File) error {
	if r != nil {
		_ = r.epoll.Close()
	}
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// isReady also says true when polling fails: the call that follows tells why.
func isReady(conn syscall.RawConn, events int16) bool {
	n := 0
	err := control(conn, func(fd int) (err error) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, 0)
		return err
	})
	return n != 0 || err != nil
}

// control runs do with conn's descriptor, again when a signal interrupted it.
func control(conn syscall.RawConn, do func(fd int) error) error {
	var err error
	ctlErr := conn.Control(func(fd uintptr) {
		for {
			if err = do(int(fd)); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if ctlErr != nil { // only a closed file has no descriptor
		return os.ErrClosed
	}
	return err
}

// closedError turns what the os package says of a closed file into os.ErrClosed itself.
func closedError(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return os.ErrClosed
	}
	return err
}
