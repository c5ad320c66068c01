// Package transport makes many byte streams out of the one between the host
// and the agent in the guest. Both ends use it: the host through
// internal/agentclient, the guest through internal/guest.
//
// The channel is a virtio-serial port. It knows no connections: it may hold
// bytes of an earlier conversation, and each end may appear later than the other.
// So a conversation begins with a handshake: the host sends a hello with a fresh
// nonce, the guest answers with the same nonce, and each skips what comes before.
// After it both speak yamux. The host opens all streams; the first is the control
// stream for RPC, the others carry stdio, each with a flow control of its own so
// that one that is not read stalls no other.
//
// The package knows no RPC and no containers. What the guest sends is not
// trusted: hello and frames are bounded, and a stream that it opens ends the session.
package transport

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// PortName is the name of the virtio-serial port that is the agent channel.
const PortName = "runv.agent"

// maxUnclaimed bounds the streams that the guest holds for a Claim to come.
const maxUnclaimed = 64

// Session is one conversation over the channel. It is safe for concurrent use.
type Session struct {
	mux     *yamux.Session
	control net.Conn

	mu        sync.Mutex
	unclaimed map[uint32]net.Conn
	waiting   map[uint32]chan net.Conn
	acceptErr error
	done      chan struct{} // closed when accept has ended; guest only
}

// Host begins a conversation as the host and returns when the guest has
// answered. It owns conn from then on, and closes it when it fails. ctx bounds
// the handshake only.
func Host(ctx context.Context, conn net.Conn) (*Session, error) {
	var nonce [nonceSize]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, errors.Join(fmt.Errorf("make nonce: %w", err), conn.Close())
	}
	// Closing is what interrupts a read on every kind of connection.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	err := hostHandshake(conn, nonce)
	if !stop() && ctx.Err() != nil {
		return nil, fmt.Errorf("agent handshake: %w", context.Cause(ctx))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("agent handshake: %w", err), conn.Close())
	}
	mux, err := yamux.Client(conn, muxConfig())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start mux: %w", err), conn.Close())
	}
	control, err := mux.Open()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open control stream: %w", err), mux.Close())
	}
	go refuseStreams(mux)
	return &Session{mux: mux, control: control}, nil
}

// refuseStreams ends a session whose guest opens a stream. Left alone, the mux would
// hold up to maxUnclaimed of them for somebody to accept, each with a window of data.
func refuseStreams(mux *yamux.Session) {
	_, _ = mux.AcceptStream() // an error is the session's end, too
	_ = mux.Close()
}

// Guest waits for the host's hello on port, answers it, and returns when the
// host has opened the control stream. It owns port from then on. It blocks
// until then: a guest has nothing else to do.
func Guest(port io.ReadWriteCloser) (*Session, error) {
	if err := guestHandshake(port); err != nil {
		return nil, errors.Join(fmt.Errorf("host handshake: %w", err), port.Close())
	}
	mux, err := yamux.Server(port, muxConfig())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start mux: %w", err), port.Close())
	}
	control, err := mux.Accept()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("accept control stream: %w", err), mux.Close())
	}
	s := &Session{
		mux:       mux,
		control:   control,
		unclaimed: make(map[uint32]net.Conn),
		waiting:   make(map[uint32]chan net.Conn),
		done:      make(chan struct{}),
	}
	go s.accept()
	return s, nil
}

func muxConfig() *yamux.Config {
	cfg := yamux.DefaultConfig()
	cfg.LogOutput = io.Discard
	cfg.AcceptBacklog = maxUnclaimed
	// A paused VM answers no keepalive, and must not be torn down for that.
	cfg.EnableKeepAlive = false
	// A write waits as long as the guest is paused or busy; whoever owns the
	// stream ends the wait by closing it or the session.
	cfg.ConnectionWriteTimeout = time.Hour
	cfg.StreamOpenTimeout = 0
	cfg.StreamCloseTimeout = 5 * time.Minute
	cfg.MaxStreamWindowSize = 512 << 10
	return cfg
}

// Control is the first stream, for RPC. It ends with the session.
func (s *Session) Control() net.Conn { return s.control }

// Open opens a stream to the guest. Its StreamID names it to the guest, which
// takes it with Claim. The caller closes it.
func (s *Session) Open() (*yamux.Stream, error) {
	st, err := s.mux.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	return st, nil
}

// Claim returns the stream that the host opened under this number, and waits
// for it until ctx ends. The caller closes it. Guest only.
func (s *Session) Claim(ctx context.Context, id uint32) (net.Conn, error) {
	s.mu.Lock()
	if conn, ok := s.unclaimed[id]; ok {
		delete(s.unclaimed, id)
		s.mu.Unlock()
		return conn, nil
	}
	if _, ok := s.waiting[id]; ok {
		s.mu.Unlock()
		return nil, fmt.Errorf("claim stream %d: claimed twice", id)
	}
	ch := make(chan net.Conn, 1)
	s.waiting[id] = ch
	s.mu.Unlock()

	var err error
	select {
	case conn := <-ch:
		return conn, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-s.done:
		err = s.acceptErr
	}
	s.mu.Lock()
	delete(s.waiting, id)
	s.mu.Unlock()
	select {
	case conn := <-ch: // it came meanwhile
		return conn, nil
	default:
		return nil, fmt.Errorf("claim stream %d: %w", id, err)
	}
}

// accept sorts the streams that the host opens until the session ends.
func (s *Session) accept() {
	defer close(s.done)
	for {
		st, err := s.mux.AcceptStream()
		if err != nil {
			s.acceptErr = err
			return
		}
		s.mu.Lock()
		ch, ok := s.waiting[st.StreamID()]
		switch {
		case ok:
			delete(s.waiting, st.StreamID())
			ch <- st
		case len(s.unclaimed) < maxUnclaimed:
			s.unclaimed[st.StreamID()] = st
		default:
			_ = st.Close()
		}
		s.mu.Unlock()
	}
}

// Done is closed when the session has ended, by either end or by an error.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Close ends the session, all its streams and the channel. Idempotent.
func (s *Session) Close() error { return s.mux.Close() }
