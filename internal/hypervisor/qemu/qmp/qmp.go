// Package qmp speaks the QEMU Machine Protocol: JSON messages, one a line, over a
// unix stream socket.
//
// It belongs to the qemu driver and knows no command but qmp_capabilities.
// QEMU runs the guest and is confined and not trusted: a line longer than
// 1 MiB or one that is not QMP ends the connection, replies to calls that
// nobody waits for are dropped, and no number of events can make the client
// keep more than one line in memory.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxLine is the longest line that is accepted, in bytes. The longest answer that
// the driver asks for has some kilobytes.
const maxLine = 1 << 20

// ErrClosed is what a call gets when the connection has ended; the cause is
// wrapped beside it where there is one.
var ErrClosed = errors.New("qmp connection is closed")

// Client is one QMP connection. Its methods may be called concurrently.
type Client struct {
	conn    *net.UnixConn
	onEvent func(Event)
	version string
	writing chan struct{} // holds a token while somebody writes; a message and its fd are one write
	done    chan struct{} // closed when the reader has ended

	mu      sync.Mutex // guards what follows; never held while reading or writing
	lastID  uint64
	pending map[string]chan<- reply // calls that wait, by id
	err     error                   // why it ended
}

// New takes over conn, waits for QEMU's greeting and negotiates. ctx bounds only
// that. On error conn is closed.
//
// onEvent, which may be nil, gets every event in order, from one goroutine;
// while it runs no reply is delivered, so it must not block and not call Execute.
// It is not called any more after Close has returned.
func New(ctx context.Context, conn *net.UnixConn, onEvent func(Event)) (*Client, error) {
	c := &Client{
		conn:    conn,
		onEvent: onEvent,
		writing: make(chan struct{}, 1),
		done:    make(chan struct{}),
		pending: map[string]chan<- reply{},
	}
	lines := bufio.NewReaderSize(conn, 4096)
	if err := c.greet(ctx, lines); err != nil {
		conn.Close()
		return nil, err
	}
	go c.read(lines)
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Version is QEMU's version, such as "7.2.22 (Debian 1:7.2+dfsg-7)".
func (c *Client) Version() string { return c.version }

// Done is closed when the connection has ended, by Close or by QEMU.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection and returns when no goroutine of the client runs any
// more. Calls under way get ErrClosed. It is idempotent.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	<-c.done
	return nil
}

// Execute calls a command and decodes what it returns into result, when that is
// not nil. Errors: *Error when QEMU refuses, ErrClosed when the connection
// has ended, ctx's error when it ends first; in the last case QEMU may still
// carry the command out.
func (c *Client) Execute(ctx context.Context, command string, arguments, result any) error {
	return c.call(ctx, command, arguments, nil, result)
}

// SendFile gives QEMU a duplicate of file under a name, for commands that take
// a named file descriptor. QEMU closes its copy when such a command uses
// it, or with the connection, or by closefd.
func (c *Client) SendFile(ctx context.Context, name string, file *os.File) error {
	return c.call(ctx, "getfd", map[string]string{"fdname": name}, file, nil)
}

func (c *Client) call(ctx context.Context, command string, arguments any, file *os.File, result any) error {
	answer := make(chan reply, 1)
	id, err := c.register(answer)
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	defer c.forget(id)
	request := struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{command, arguments, id}
	line, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("qmp %s: %v", command, err)
	}
	if err := c.write(ctx, append(line, '\n'), file); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	var r reply
	select {
	case r = <-answer:
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: %w", command, context.Cause(ctx))
	case <-c.done:
		select {
		case r = <-answer: // the reply was the last thing QEMU said
		default:
			return fmt.Errorf("qmp %s: %w", command, c.cause())
		}
	}
	if r.err != nil {
		r.err.Command = command
		return r.err
	}
	if result != nil {
		if err := json.Unmarshal(r.result, result); err != nil {
			return fmt.Errorf("qmp %s: parse result: %v", command, err)
		}
	}
	return nil
}

func (c *Client) register(answer chan<- reply) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return "", c.err
	}
	c.lastID++
	id := strconv.FormatUint(c.lastID, 10)
	c.pending[id] = answer
	return id, nil
}

func (c *Client) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// write sends a line with at most one file descriptor. A line that was sent in
// part leaves the stream unusable, so any failure but waiting for the turn ends the connection.
func (c *Client) write(ctx context.Context, line []byte, file *os.File) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.cause()
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	stop := onDone(ctx, c.conn.SetWriteDeadline)
	defer stop()
	var rights []byte
	if file != nil {
		raw, err := file.SyscallConn()
		if err != nil {
			return err
		}
		// The descriptor must stay open until the kernel has taken its reference.
		var n int
		if cerr := raw.Control(func(fd uintptr) {
			rights = unix.UnixRights(int(fd))
			n, _, err = c.conn.WriteMsgUnix(line, rights, nil)
		}); cerr != nil {
			return cerr
		}
		if err != nil {
			return c.writeFailed(ctx, err)
		}
		line = line[n:]
	}
	if _, err := c.conn.Write(line); err != nil {
		return c.writeFailed(ctx, err)
	}
	return nil
}

func (c *Client) writeFailed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	c.fail(fmt.Errorf("%w: write: %v", ErrClosed, err))
	return err
}

// greet reads the first line.
func (c *Client) greet(ctx context.Context, lines *bufio.Reader) error {
	stop := onDone(ctx, c.conn.SetReadDeadline)
	line, err := readLine(lines)
	stop()
	if ctx.Err() != nil {
		return fmt.Errorf("qmp greeting: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("qmp greeting: %w: %v", ErrClosed, err)
	}
	m, err := decode(line)
	if err != nil {
		return fmt.Errorf("qmp greeting: %v", err)
	}
	if m.greeting == nil {
		return errors.New("qmp greeting: QEMU said something else first")
	}
	c.version = m.greeting.String()
	return nil
}

// read delivers messages until the connection ends.
func (c *Client) read(lines *bufio.Reader) {
	defer close(c.done)
	for {
		line, err := readLine(lines)
		if err == nil {
			var m message
			if m, err = decode(line); err == nil {
				c.deliver(m)
				continue
			}
		}
		c.fail(fmt.Errorf("%w: %v", ErrClosed, err))
		return
	}
}

func (c *Client) deliver(m message) {
	switch {
	case m.event != nil && c.onEvent != nil:
		c.onEvent(*m.event)
	case m.reply != nil:
		c.mu.Lock()
		answer := c.pending[m.reply.id]
		delete(c.pending, m.reply.id) // a second reply to the same call finds nobody
		c.mu.Unlock()
		if answer != nil {
			answer <- *m.reply // has room for one
		}
	}
}

// fail ends the connection with a cause; the first one stays.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.conn.Close()
}

func (c *Client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// readLine returns the next line without its end. The result is valid until the
// next call.
func readLine(r *bufio.Reader) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(long)+len(part) > maxLine {
			return nil, fmt.Errorf("line is longer than %d bytes", maxLine)
		}
		switch {
		case err == nil && long == nil:
			return bytes.TrimRight(part, "\r\n"), nil
		case err == nil:
			return bytes.TrimRight(append(long, part...), "\r\n"), nil
		case errors.Is(err, bufio.ErrBufferFull):
			long = append(long, part...)
		case errors.Is(err, io.EOF) && len(long)+len(part) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// onDone makes setDeadline interrupt I/O when ctx ends. The returned function
// takes that back.
func onDone(ctx context.Context, setDeadline func(time.Time) error) func() {
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(expired)
		_ = setDeadline(time.Unix(1, 0)) // fails only on a closed connection
	})
	return func() {
		if !stop() {
			<-expired
		}
		_ = setDeadline(time.Time{})
	}
}
