package standin

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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/unixsock"
)

// SocketName is the name of the socket in the pod's directory.
const SocketName = "standin.sock"

const (
	helloTimeout     = 5 * time.Second
	unclaimedTimeout = 10 * time.Second
	sendTimeout      = 5 * time.Second
	// maxClients bounds connections that no request has claimed.
	maxClients = 64
)

// Listener is the supervisor's end of the socket.
type Listener struct {
	listener  *net.UnixListener
	unclaimed time.Duration  // life of a client that nobody asks for
	done      chan struct{}  // closed by Close
	running   sync.WaitGroup // accept loop, greetings

	mu       sync.Mutex
	closed   bool
	greeting map[*net.UnixConn]bool
	arrived  map[Token]*arrival   // said hello, no Await yet
	awaited  map[Token]chan *Peer // Await waits; buffered
}

// arrival is a client that nobody has asked for yet.
type arrival struct {
	peer *Peer
	drop *time.Timer
}

// Listen creates the socket in dir and serves it until Close. The socket's
// file stays after that: it goes with the directory.
func Listen(dir string) (*Listener, error) { return listen(dir, unclaimedTimeout) }

func listen(dir string, unclaimed time.Duration) (*Listener, error) {
	ul, err := unixsock.Listen(dir, SocketName, "unixpacket")
	if err != nil {
		return nil, err
	}
	l := &Listener{
		listener:  ul,
		unclaimed: unclaimed,
		done:      make(chan struct{}),
		greeting:  make(map[*net.UnixConn]bool),
		arrived:   make(map[Token]*arrival),
		awaited:   make(map[Token]chan *Peer),
	}
	l.running.Go(l.accept)
	return l, nil
}

// Close stops listening, drops clients that were not claimed and ends every
// Await with net.ErrClosed. Peers stay. Later calls do nothing.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.done)
	for conn := range l.greeting {
		_ = conn.Close()
	}
	for token, a := range l.arrived {
		a.drop.Stop()
		delete(l.arrived, token)
		a.peer.refuse("the supervisor is ending")
	}
	l.mu.Unlock()
	err := l.listener.Close()
	l.running.Wait()
	return err
}

// Await blocks until the client with this token is there, tells it so and returns it. Clients may
// come before or after; a client that comes first waits for 10 s. errdefs.ErrAlreadyExists when
// somebody else awaits the token, net.ErrClosed after Close.
func (l *Listener) Await(ctx context.Context, token Token) (*Peer, error) {
	p, err := l.await(ctx, token)
	if err != nil {
		return nil, fmt.Errorf("await stand-in: %w", err)
	}
	if err := p.send(reply{kind: kindOK}); err != nil {
		p.CloseStdio()
		_ = p.Close()
		return nil, fmt.Errorf("await stand-in: pid %d has gone: %w", p.PID, err)
	}
	return p, nil
}

func (l *Listener) await(ctx context.Context, token Token) (*Peer, error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, net.ErrClosed
	}
	if a := l.arrived[token]; a != nil {
		a.drop.Stop()
		delete(l.arrived, token)
		l.mu.Unlock()
		return a.peer, nil
	}
	if l.awaited[token] != nil {
		l.mu.Unlock()
		return nil, fmt.Errorf("token in use: %w", errdefs.ErrAlreadyExists)
	}
	come := make(chan *Peer, 1)
	l.awaited[token] = come
	l.mu.Unlock()

	var err error
	select {
	case p := <-come:
		return p, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-l.done:
		err = net.ErrClosed
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.awaited, token)
	select {
	case p := <-come: // it came in this very moment
		p.refuse("nobody waits for this stand-in any more")
	default:
	}
	return nil, err
}

// accept takes connections until Close.
func (l *Listener) accept() {
	for {
		conn, err := l.listener.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors, or the client has gone again.
			select {
			case <-l.done:
				return
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		l.mu.Lock()
		full := l.closed || len(l.greeting)+len(l.arrived) >= maxClients
		if !full {
			l.greeting[conn] = true
		}
		l.mu.Unlock()
		if full {
			(&Peer{conn: conn}).refuse("too many stand-ins wait")
			continue
		}
		l.running.Go(func() { l.greet(conn) })
	}
}

// greet reads a client's hello and hands it to whoever awaits it.
func (l *Listener) greet(conn *net.UnixConn) {
	p, token, err := receiveHello(conn)
	if err != nil {
		p = &Peer{conn: conn}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.greeting, conn)
	switch {
	case err != nil:
		p.refuse(err.Error())
	case l.closed:
		p.refuse("the supervisor is ending")
	case l.awaited[token] != nil:
		l.awaited[token] <- p
		delete(l.awaited, token)
	case l.arrived[token] != nil:
		p.refuse("token in use")
	default:
		a := &arrival{peer: p}
		a.drop = time.AfterFunc(l.unclaimed, func() { l.expire(token, a) })
		l.arrived[token] = a
	}
}

// expire drops a client that nobody claimed in time.
func (l *Listener) expire(token Token, a *arrival) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.arrived[token] != a {
		return
	}
	delete(l.arrived, token)
	a.peer.refuse("no request came for this stand-in")
}

// Peer is a connected client: a stand-in, or a command line in the foreground.
type Peer struct {
	// PID is the client's process, as the kernel tells.
	PID int
	// The process's stdio; nil if it has none. The files are the caller's, to
	// hand over or to close, see CloseStdio. With a terminal Stderr is nil.
	Stdin, Stdout, Stderr *os.File
	Terminal              bool
	// Foreground says that the files are not to be seen by the process as they are: the caller reads and writes them
	// for it. A terminal then is the guest's alone, and Stdin and Stdout are any files.
	Foreground bool
	// Width and Height are the terminal's size in characters, 0 if unknown.
	Width, Height uint32

	conn *net.UnixConn
}

// Serve calls onSignal (1 to 64) and onResize, one at a time in the order in which the client sent,
// until the connection ends. It returns nil when the client has gone or Close was called, ctx's
// error when ctx ended, and an error after a message that is not allowed. Call it once.
func (p *Peer) Serve(ctx context.Context, onSignal func(n int), onResize func(width, height uint32)) error {
	stop := context.AfterFunc(ctx, func() { _ = p.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, maxMessage)
	for {
		n, err := receive(p.conn, buf)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if ended(err) {
				return nil
			}
			return fmt.Errorf("receive from stand-in %d: %w", p.PID, err)
		}
		r, err := decodeRequest(buf[:n])
		switch {
		case err != nil:
			return fmt.Errorf("receive from stand-in %d: %w", p.PID, err)
		case r.signal != 0:
			onSignal(int(r.signal))
		case p.Terminal:
			onResize(uint32(r.width), uint32(r.height))
		default:
			return fmt.Errorf("receive from stand-in %d: resize without a terminal", p.PID)
		}
	}
}

// Exit tells the client the status of the process, 0 to 255. The client ends then.
func (p *Peer) Exit(status uint32) error {
	if status > 255 {
		return fmt.Errorf("send exit status %d: %w", status, errdefs.ErrInvalidArgument)
	}
	if err := p.send(reply{kind: kindExit, status: uint8(status)}); err != nil {
		return fmt.Errorf("send exit status to stand-in %d: %w", p.PID, err)
	}
	return nil
}

// Close ends the connection: a client that has got no status takes its process for killed.
// It leaves the stdio alone. Later calls do nothing.
func (p *Peer) Close() error {
	if err := p.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// CloseStdio closes the files, for when they were not handed over to anybody.
func (p *Peer) CloseStdio() {
	for _, f := range []*os.File{p.Stdin, p.Stdout, p.Stderr} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// refuse tells the client why and lets it go.
func (p *Peer) refuse(why string) {
	// Whether it hears that is its own affair; there is room for a first message
	// in any socket, so this does not block.
	_ = p.send(reply{kind: kindError, text: why})
	_ = p.conn.Close()
	p.CloseStdio()
}

func (p *Peer) send(r reply) error {
	// A client that reads nothing (stopped by a signal, perhaps) must not hold us up.
	if err := p.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, err := p.conn.Write(r.encode())
	return err
}

// receiveHello reads the first message of a connection. It checks who speaks.
func receiveHello(conn *net.UnixConn) (p *Peer, token Token, err error) {
	cred, err := unixsock.Peer(conn)
	if err != nil {
		return nil, token, err
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return nil, token, fmt.Errorf("user %d may not use this socket", cred.Uid)
	}
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return nil, token, err
	}
	buf := make([]byte, maxMessage)
	// Room for one file more than allowed, so that too many are noticed.
	oob := make([]byte, unix.CmsgSpace((maxFiles+1)*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, token, fmt.Errorf("read hello: %w", err)
	}
	files, err := receivedFiles(oob[:oobn])
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
		}
	}()
	if err != nil {
		return nil, token, fmt.Errorf("read hello: %w", err)
	}
	if flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		err = errors.New("read hello: message too long")
		return nil, token, err
	}
	h, err := decodeHello(buf[:n])
	if err != nil {
		return nil, token, err
	}
	p = &Peer{
		PID:        int(cred.Pid),
		Terminal:   h.flags&flagTerminal != 0,
		Foreground: h.flags&flagForeground != 0,
		Width:      uint32(h.width),
		Height:     uint32(h.height),
		conn:       conn,
	}
	rest := files
	for i, dst := range []**os.File{&p.Stdin, &p.Stdout, &p.Stderr} {
		if h.present&(1<<i) == 0 {
			continue
		}
		if len(rest) == 0 {
			err = errors.New("read hello: a file is missing")
			return nil, token, err
		}
		*dst, rest = rest[0], rest[1:]
	}
	if len(rest) > 0 {
		err = errors.New("read hello: too many files")
		return nil, token, err
	}
	err = conn.SetReadDeadline(time.Time{})
	return p, h.token, err
}

// receivedFiles takes the files out of a control message, all of them even with an error.
func receivedFiles(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, rightsErr := unix.ParseUnixRights(&m)
		if rightsErr != nil {
			err = rightsErr
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("stdio %d", len(files))))
		}
	}
	return files, err
}

// receive reads one message. A socket that was closed with messages unread gives its peer
// ECONNRESET first; what it had sent before, an exit status perhaps, is there still.
func receive(conn *net.UnixConn, buf []byte) (int, error) {
	n, err := conn.Read(buf)
	if errors.Is(err, syscall.ECONNRESET) {
		n, err = conn.Read(buf)
	}
	return n, err
}

// ended tells whether err is just the end of a connection.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
