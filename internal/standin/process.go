package standin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/caller"
)

// Between the starter and the stand-in is a socket pair, SOCK_SEQPACKET,
// descriptor 3 in the stand-in. The starter sends one setup message, the stand-in
// answers with one: empty text when it is ready, else why it is not.
// The token travels here and not in the arguments, which every user can read.
const (
	setupFD      = 3
	setupTimeout = 10 * time.Second

	// StatusKilled is the exit status of a stand-in that lost its supervisor.
	StatusKilled = 128 + int(unix.SIGKILL)
)

// setup tells a new stand-in what to do.
type setup struct {
	token   Token
	flags   uint8 // as in hello
	present uint8 // as in hello; the others are /dev/null
}

func (s setup) encode() []byte {
	return append(append([]byte{version}, s.token[:]...), s.flags, s.present)
}

func decodeSetup(b []byte) (s setup, err error) {
	if len(b) != 1+len(s.token)+2 || b[0] != version {
		return s, fmt.Errorf("decode setup: %d bytes", len(b))
	}
	rest := b[1+copy(s.token[:], b[1:]):]
	s.flags, s.present = rest[0], rest[1]
	return s, nil
}

// Main is the stand-in: the face `runv standin POD-DIR`, which Start starts and
// nobody else can. It returns the status to exit with. The caller has done
// nothing before: the less memory is touched, the better.
func Main(args []string) int {
	// Shown by ps and top; /proc/self/comm is the process's first thread.
	_ = os.WriteFile("/proc/self/comm", []byte("runv:standin"), 0)
	if len(args) != 1 {
		fmt.Fprintln(os.Stderr, "runv standin: started by runv itself only")
		return 1
	}
	caller.Forget()
	starter, err := openSetup()
	if err != nil {
		fmt.Fprintln(os.Stderr, "runv standin: started by runv itself only:", err)
		return 1
	}
	// From here on no signal that can be caught ends this process.
	signals := make(chan os.Signal, 2*maxSignal)
	signal.Notify(signals)

	ctx := context.Background() //nolint:forbidigo // a process's main function, and nothing but its end ends the work
	client, tty, err := begin(ctx, starter, args[0])
	if err != nil {
		_, _ = starter.Write([]byte(printable(err.Error())))
		return 1
	}
	_, err = starter.Write([]byte{0})
	_ = starter.Close()
	if err != nil { // the starter has gone, nobody will ask for this process
		return StatusKilled
	}
	go forward(client, signals, tty)
	status, err := client.Wait(ctx)
	if err != nil {
		return StatusKilled
	}
	return int(status)
}

// openSetup returns this end of the connection to the starter.
func openSetup() (*net.UnixConn, error) {
	f := os.NewFile(setupFD, "setup")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, errors.New("descriptor 3 is no unix socket")
	}
	return uc, uc.SetDeadline(time.Now().Add(setupTimeout))
}

// begin hands the inherited stdio to the supervisor and lets go of it. tty is
// the terminal, nil without one.
func begin(ctx context.Context, starter *net.UnixConn, podDir string) (c *Client, tty *os.File, err error) {
	buf := make([]byte, maxMessage)
	n, err := starter.Read(buf)
	if err != nil {
		return nil, nil, fmt.Errorf("read setup: %w", err)
	}
	s, err := decodeSetup(buf[:n])
	if err != nil {
		return nil, nil, err
	}
	stdio := Stdio{Terminal: s.flags&flagTerminal != 0, Foreground: s.flags&flagForeground != 0}
	for i, f := range []**os.File{&stdio.Stdin, &stdio.Stdout, &stdio.Stderr} {
		if s.present&(1<<i) != 0 {
			*f = []*os.File{os.Stdin, os.Stdout, os.Stderr}[i]
		}
	}
	if stdio.Terminal && !stdio.Foreground {
		// Needed after the descriptors 0 to 2 are gone, to ask for its size.
		fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, setupFD)
		if err != nil {
			return nil, nil, fmt.Errorf("duplicate terminal: %w", err)
		}
		tty = os.NewFile(uintptr(fd), "terminal")
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	if c, err = Connect(ctx, podDir, s.token, stdio); err != nil {
		return nil, nil, err
	}
	// The caller waits for the end of its pipes: the supervisor alone has them now.
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	for fd := 0; fd <= 2 && err == nil; fd++ {
		err = unix.Dup3(null, fd, 0)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("let go of stdio: %w", err)
	}
	return c, tty, unix.Close(null)
}

// forward passes signals on for as long as the process lives.
func forward(c *Client, signals <-chan os.Signal, tty *os.File) {
	for s := range signals {
		n, ok := s.(syscall.Signal)
		switch {
		case !ok, n == unix.SIGCHLD, n == unix.SIGPIPE,
			n == unix.SIGURG: // Go's scheduler sends it to itself
		case n == unix.SIGWINCH && tty != nil:
			if width, height, err := windowSize(tty); err == nil {
				_ = c.Resize(uint32(width), uint32(height))
			}
		default:
			// An error means that the connection broke: then Wait ends, too.
			_ = c.Signal(int(n))
		}
	}
}
