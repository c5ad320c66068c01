package standin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/unixsock"
)

// acceptTimeout is how long a supervisor may take to accept a client. It drops those that
// nobody claims before that, so this is for one that hangs.
const acceptTimeout = 2 * unclaimedTimeout

// ErrGone is the error of Wait when the supervisor ended the connection, or itself,
// without telling a status. The process counts as killed: status 137.
var ErrGone = errors.New("supervisor has gone")

// RefusedError is the error of Wait when the supervisor does not want this client.
type RefusedError struct{ Text string }

// Error implements error.
func (e *RefusedError) Error() string { return "stand-in refused: " + e.Text }

// Stdio is what a client brings for its process. The files stay the caller's.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File // nil for none
	// Terminal says that the process has a terminal. Stdin is the one that serves for all three; Stdout
	// and Stderr are not looked at.
	Terminal bool
	// Foreground says that the caller stays and reads and writes the files for the process, as runc without
	// --detach does. With a terminal Stdin and Stdout then are whatever files the caller has; the terminal's size is
	// told with Resize.
	Foreground bool
}

// Client stands for a process at the supervisor. Methods may be called concurrently.
type Client struct {
	conn *net.UnixConn
}

// Connect connects to the supervisor in the pod's directory and says hello. It does
// not wait until the supervisor knows the token: Wait does. ctx bounds Connect
// only. The caller closes the client.
func Connect(ctx context.Context, podDir string, token Token, stdio Stdio) (*Client, error) {
	h := hello{token: token}
	files := [maxFiles]*os.File{stdio.Stdin, stdio.Stdout, stdio.Stderr}
	if stdio.Foreground {
		h.flags |= flagForeground
	}
	if stdio.Terminal {
		h.flags |= flagTerminal
		files[2] = nil
	}
	if stdio.Terminal && !stdio.Foreground {
		if stdio.Stdin == nil {
			return nil, fmt.Errorf("connect stand-in: terminal without a file: %w", errdefs.ErrInvalidArgument)
		}
		files = [maxFiles]*os.File{stdio.Stdin, stdio.Stdin}
		var err error
		if h.width, h.height, err = windowSize(stdio.Stdin); err != nil {
			return nil, fmt.Errorf("connect stand-in: read size of terminal: %w", err)
		}
	}
	conn, err := unixsock.Dial(ctx, podDir, SocketName, "unixpacket")
	if err != nil {
		return nil, err
	}
	if err := sendHello(ctx, conn, h, files); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("connect stand-in: %w", err)
	}
	return &Client{conn: conn}, nil
}

func sendHello(ctx context.Context, conn *net.UnixConn, h hello, files [maxFiles]*os.File) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetWriteDeadline(deadline); err != nil {
			return err
		}
	}
	var fds []int
	for i, f := range files {
		if f != nil {
			h.present |= 1 << i
			fds = append(fds, int(f.Fd()))
		}
	}
	_, _, err := conn.WriteMsgUnix(h.encode(), unix.UnixRights(fds...), nil)
	runtime.KeepAlive(files)
	if err != nil && !errors.Is(err, unix.EPIPE) { // refused before it was read: Wait tells why
		return err
	}
	return conn.SetWriteDeadline(time.Time{})
}

// Signal forwards a signal, 1 to 64, to the process.
func (c *Client) Signal(n int) error {
	if n < 1 || n > maxSignal {
		return fmt.Errorf("forward signal %d: %w", n, errdefs.ErrInvalidArgument)
	}
	return c.send(request{signal: uint8(n)})
}

// Resize tells the size of the terminal in characters; each at most 65535.
func (c *Client) Resize(width, height uint32) error {
	if width > 1<<16-1 || height > 1<<16-1 {
		return fmt.Errorf("resize terminal to %dx%d: %w", width, height, errdefs.ErrInvalidArgument)
	}
	return c.send(request{width: uint16(width), height: uint16(height)})
}

func (c *Client) send(r request) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, err := c.conn.Write(r.encode())
	return err
}

// Wait blocks until the process has exited and returns its status, 0 to 255. The error is
// ErrGone, a *RefusedError, ctx's, or a timeout when the supervisor neither accepts nor refuses
// the client for 20 s. Call it once.
func (c *Client) Wait(ctx context.Context) (uint32, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(acceptTimeout)); err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.Close() })
	defer stop()
	buf := make([]byte, maxMessage+1)
	for {
		n, err := receive(c.conn, buf)
		if err != nil {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			if ended(err) {
				return 0, ErrGone
			}
			return 0, fmt.Errorf("wait for process: %w", err)
		}
		r, err := decodeReply(buf[:n])
		switch {
		case err != nil:
			return 0, fmt.Errorf("wait for process: %w", err)
		case r.kind == kindError:
			return 0, &RefusedError{Text: r.text}
		case r.kind == kindExit:
			return uint32(r.status), nil
		}
		_ = c.conn.SetReadDeadline(time.Time{}) // fails on a closed connection; so does the next Read
	}
}

// Close ends the connection; a supervisor that has told no status yet kills the
// process. Later calls do nothing.
func (c *Client) Close() error {
	if err := c.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// windowSize asks a terminal.
func windowSize(f *os.File) (width, height uint16, err error) {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0, err
	}
	return ws.Col, ws.Row, nil
}
