package stdio

import (
	"errors"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// bufferSize is how much one copier reads at once, and what a pipe holds. A switch between
// the process and the agent is what costs most, so there shall be few.
const bufferSize = 256 << 10

// copier copies one output of a process to its stream.
type copier struct {
	src      *os.File
	dst      net.Conn // nil: discard
	terminal bool

	sent    uint64
	drained chan struct{} // closed when the process's output was sent
	count   uint64        // sent at that time
}

func newCopier(src *os.File, dst net.Conn, terminal bool) *copier {
	return &copier{src: src, dst: dst, terminal: terminal, drained: make(chan struct{})}
}

// drain makes run look whether the source is empty. Called once.
func (c *copier) drain() { _ = c.src.SetReadDeadline(past) }

// run copies until the source ends: when no process can write to it any more, or
// the host has closed the stream because nobody reads it any more.
func (c *copier) run() {
	if c.dst != nil && !c.terminal {
		dst := c.dst
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			// The host sends nothing: what comes is the end, and whoever writes to the
			// pipe shall notice. At the end of run this closes it a second time.
			_, _ = dst.Read(make([]byte, 1))
			_ = c.src.Close()
		}()
		defer func() {
			_ = dst.SetReadDeadline(past)
			<-watched
		}()
	}
	defer func() {
		c.markDrained()
		if c.dst != nil {
			_ = c.dst.Close()
		}
		if !c.terminal { // the terminal's master is for input and resizing, too
			_ = c.src.Close()
		}
	}()
	buf := make([]byte, bufferSize)
	for {
		n, err := c.src.Read(buf)
		if !c.send(buf[:n]) {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = c.empty(buf)
		}
		if err != nil {
			return // io.EOF, EIO of a terminal without slaves, os.ErrClosed
		}
	}
}

// empty sends what can be read without waiting, and then marks c as drained.
func (c *copier) empty(buf []byte) error {
	if err := c.src.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	rc, err := c.src.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var n int
		var rerr error
		err := rc.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), buf)
			return true
		})
		switch {
		case err != nil:
			return err
		case errors.Is(rerr, unix.EINTR):
		case errors.Is(rerr, unix.EAGAIN):
			c.markDrained()
			return nil
		case rerr != nil:
			return rerr
		case n == 0:
			return io.EOF
		case !c.send(buf[:n]):
			return io.ErrClosedPipe
		}
	}
}

// send sends p and tells whether copying makes sense any more: not for a pipe
// whose stream is closed, because the writers shall notice. A terminal goes on, since
// closing it would be a hang-up.
func (c *copier) send(p []byte) bool {
	if len(p) == 0 || c.dst == nil {
		return true
	}
	n, err := c.dst.Write(p)
	c.sent += uint64(n)
	if err == nil {
		return true
	}
	_ = c.dst.Close()
	c.dst = nil
	return c.terminal
}

func (c *copier) markDrained() {
	select {
	case <-c.drained:
	default:
		c.count = c.sent
		close(c.drained)
	}
}

// copyInput copies a stream to a process. The end of the stream closes a pipe; a
// terminal stays open, as its end is the user's to type.
func copyInput(dst *os.File, src net.Conn, closeDst bool) {
	buf := make([]byte, bufferSize)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				abort(src) // the host must not wait for a reader that is gone
				break
			}
		}
		if err != nil {
			_ = src.Close()
			break
		}
	}
	if closeDst {
		_ = dst.Close()
	}
}
