package standin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/caller"
	"runv/internal/unixsock"
)

// StartOptions describe a stand-in.
type StartOptions struct {
	// Executable is a program that calls Main when its first argument is
	// "standin". Empty: the running one.
	Executable string
	// PodDir is the absolute path of the directory with the supervisor's socket.
	PodDir string
	Token  Token
	// Stdin, Stdout and Stderr are inherited; nil for none. They stay the caller's.
	Stdin, Stdout, Stderr *os.File
	// Terminal says that the process has a terminal: the one that Stdin is, or
	// one whose master is sent to ConsoleSocket.
	Terminal bool
	// Foreground is as in Stdio: with a terminal Stdin and Stdout are any files.
	Foreground bool
	// ConsoleSocket is the path of a unix socket that gets the master of a new
	// pseudo terminal, whose slave becomes the stand-in's controlling terminal.
	// The files above are not used then.
	ConsoleSocket string
	// Setsid makes the stand-in a session leader, out of reach of the keyboard's
	// signals. Always so with ConsoleSocket.
	Setsid bool
	// NetNS is the network namespace that the stand-in lives in; it stays the caller's. nil: the
	// caller's own, or with NewNetNS one that is the stand-in's.
	NetNS    *os.File
	NewNetNS bool
	// NewMountNS gives the stand-in a mount namespace of its own, for ShowRoot.
	NewMountNS bool
}

// Process is a started stand-in, a child of the caller.
type Process struct {
	PID int

	process *os.Process
}

// Start starts a stand-in and returns when it has connected to the supervisor; it ends by itself
// if no request claims its token within 10 s. After an error nothing is left.
// Start takes at most 10 s and sets close-on-exec on all descriptors of the calling process
// from 3 on: what a caller of runv left open is not for the stand-in, which may live long.
func Start(ctx context.Context, opts StartOptions) (*Process, error) {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	p, err := start(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("start stand-in: %w", err)
	}
	return p, nil
}

func start(ctx context.Context, opts StartOptions) (_ *Process, err error) {
	if !filepath.IsAbs(opts.PodDir) {
		return nil, fmt.Errorf("relative directory %q: %w", opts.PodDir, errdefs.ErrInvalidArgument)
	}
	if opts.ConsoleSocket != "" && !opts.Terminal {
		return nil, fmt.Errorf("console socket without a terminal: %w", errdefs.ErrInvalidArgument)
	}
	attr := os.ProcAttr{Dir: "/", Env: environment(), Sys: &unix.SysProcAttr{Setsid: opts.Setsid}}
	s := setup{token: opts.Token}
	if opts.Terminal {
		s.flags |= flagTerminal
	}
	if opts.Foreground {
		s.flags |= flagForeground
	}
	var master *os.File
	switch {
	case opts.ConsoleSocket != "":
		var slave *os.File
		if master, slave, err = openPty(); err != nil {
			return nil, err
		}
		defer master.Close()
		defer slave.Close()
		attr.Files = []*os.File{slave, slave, slave}
		attr.Sys = &unix.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
		s.present = presentStdin | presentStdout
	case opts.Terminal && !opts.Foreground:
		if opts.Stdin == nil {
			return nil, fmt.Errorf("terminal without a file: %w", errdefs.ErrInvalidArgument)
		}
		attr.Files = []*os.File{opts.Stdin, opts.Stdin, opts.Stdin}
		s.present = presentStdin | presentStdout
	default:
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		defer null.Close()
		for i, f := range []*os.File{opts.Stdin, opts.Stdout, opts.Stderr} {
			if f == nil {
				f = null
			} else {
				s.present |= 1 << i
			}
			attr.Files = append(attr.Files, f)
		}
	}

	conn, process, err := spawn(opts, &attr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer func() {
		if err != nil {
			_ = process.Kill()
			_, _ = process.Wait()
		}
	}()
	if err = handshake(ctx, conn, s); err != nil {
		return nil, err
	}
	// Only now: whoever gets the master may resize at once, and the stand-in hears it.
	if master != nil {
		if err = sendMaster(ctx, opts.ConsoleSocket, master); err != nil {
			return nil, err
		}
	}
	return &Process{PID: process.Pid, process: process}, nil
}

// environment keeps the stand-in small: one thread for Go code, little garbage.
// The caller's own variables are no business of a process that lives on.
func environment() []string {
	return []string{"GOMAXPROCS=1", "GOGC=10", "GOMEMLIMIT=6MiB", "GOTRACEBACK=none"}
}

// spawn starts the process with the other end of conn as descriptor 3.
func spawn(opts StartOptions, attr *os.ProcAttr) (conn *net.UnixConn, p *os.Process, err error) {
	executable := opts.Executable
	if executable == "" {
		executable = "/proc/self/exe"
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "setup"), os.NewFile(uintptr(fds[1]), "setup")
	defer ours.Close()
	defer theirs.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, err
	}
	attr.Files = append(attr.Files, theirs)
	// Kernels before 5.11 do not know this; then a stray descriptor is inherited, no more.
	_ = unix.CloseRange(setupFD, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	if opts.NewMountNS {
		attr.Sys.Cloneflags |= unix.CLONE_NEWNS
	}
	err = caller.Leave(func() error {
		return inNetNS(opts, attr, func() (err error) {
			p, err = os.StartProcess(executable, []string{"runv", "standin", opts.PodDir}, attr)
			return err
		})
	})
	if err != nil {
		_ = c.Close()
		return nil, nil, err
	}
	return c.(*net.UnixConn), p, nil
}

// inNetNS calls start so that what it starts is born in the network namespace that the options say. The thread is one
// that ends with what it does.
func inNetNS(opts StartOptions, attr *os.ProcAttr, start func() error) error {
	if opts.NetNS == nil {
		if opts.NewNetNS {
			attr.Sys.Cloneflags |= unix.CLONE_NEWNET
		}
		return start()
	}
	if err := unix.Setns(int(opts.NetNS.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return start()
}

// handshake sends the setup and waits for the answer.
func handshake(ctx context.Context, conn *net.UnixConn, s setup) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 4096)
	_, err := conn.Write(s.encode())
	n := 0
	if err == nil {
		n, err = conn.Read(buf)
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("wait for setup: %w", context.Cause(ctx))
	case errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE):
		return errors.New("it ended during its setup")
	case err != nil:
		return fmt.Errorf("wait for setup: %w", err)
	case n == 1 && buf[0] == 0:
		return nil
	}
	return errors.New(printable(string(buf[:n])))
}

// Wait blocks until the stand-in has ended and returns its status, 128+n after
// signal n. Call it once, or never for one that outlives the caller.
func (p *Process) Wait() (status uint32, err error) {
	state, err := p.process.Wait()
	if err != nil {
		return 0, fmt.Errorf("wait for stand-in %d: %w", p.PID, err)
	}
	ws, ok := state.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + uint32(ws.Signal()), nil
	}
	return uint32(state.ExitCode()), nil
}

// Signal sends a signal to the stand-in, os.ErrProcessDone when it was awaited.
func (p *Process) Signal(n unix.Signal) error { return p.process.Signal(n) }

// openPty makes a pseudo terminal whose slave passes everything as it is: the
// terminal with a line discipline is the one in the guest.
func openPty() (master, slave *os.File, err error) {
	// The name is what callers know from runc.
	master, err = os.OpenFile("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open terminal: %w", err)
	}
	defer func() {
		if err != nil {
			_ = master.Close()
		}
	}()
	fd := int(master.Fd())
	if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("unlock terminal: %w", err)
	}
	// Not by a path below /dev/pts: that may belong to another instance of devpts.
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		err = errno
		return nil, nil, fmt.Errorf("open other end of terminal: %w", err)
	}
	slave = os.NewFile(peer, "terminal")
	if err = makeRaw(int(peer)); err != nil {
		_ = slave.Close()
		return nil, nil, fmt.Errorf("make terminal raw: %w", err)
	}
	return master, slave, nil
}

// makeRaw is cfmakeraw of termios(3).
func makeRaw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}

// sendMaster sends a pty's master to a console socket as runc does: its name as the data,
// the descriptor beside it.
func sendMaster(ctx context.Context, socket string, master *os.File) error {
	conn, err := unixsock.Dial(ctx, filepath.Dir(socket), filepath.Base(socket), "unix")
	if err != nil {
		return fmt.Errorf("console socket: %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetWriteDeadline(deadline); err != nil {
			return fmt.Errorf("console socket: %w", err)
		}
	}
	if _, _, err := conn.WriteMsgUnix([]byte(master.Name()), unix.UnixRights(int(master.Fd())), nil); err != nil {
		return fmt.Errorf("console socket: send terminal: %w", err)
	}
	return nil
}
