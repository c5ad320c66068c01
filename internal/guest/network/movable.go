package network

import (
	"errors"
	"net"
	"sync"
)

// movable is a pair of sockets that a server keeps while the network moves into another namespace,
// which the sockets of the kernel cannot: others take their place.
type movable struct {
	mu     sync.Mutex // never held while reading or writing
	udp    net.PacketConn
	tcp    net.Listener
	closed bool
}

// move puts other sockets in place of those that there are, which it closes.
func (m *movable) move(udp net.PacketConn, tcp net.Listener) {
	m.mu.Lock()
	if !m.closed {
		m.udp, udp = udp, m.udp
		m.tcp, tcp = tcp, m.tcp
	}
	m.mu.Unlock()
	_ = udp.Close()
	_ = tcp.Close()
}

// close closes both.
func (m *movable) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return net.ErrClosed
	}
	m.closed = true
	return errors.Join(m.udp.Close(), m.tcp.Close())
}

func (m *movable) now() (net.PacketConn, net.Listener) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.udp, m.tcp
}

// movableUDP is the socket for UDP.
type movableUDP struct {
	net.PacketConn // at first; deadlines are not for one that moves
	m              *movable
}

// ReadFrom implements net.PacketConn.
func (u movableUDP) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		conn, _ := u.m.now()
		n, from, err := conn.ReadFrom(p)
		if next, _ := u.m.now(); err == nil || next == conn {
			return n, from, err
		}
	}
}

// WriteTo implements net.PacketConn.
func (u movableUDP) WriteTo(p []byte, to net.Addr) (int, error) {
	conn, _ := u.m.now()
	return conn.WriteTo(p, to)
}

// Close implements net.PacketConn. It closes both sockets.
func (u movableUDP) Close() error { return u.m.close() }

// movableTCP is the socket for TCP.
type movableTCP struct{ m *movable }

// Accept implements net.Listener.
func (t movableTCP) Accept() (net.Conn, error) {
	for {
		_, l := t.m.now()
		conn, err := l.Accept()
		if _, next := t.m.now(); err == nil || next == l {
			return conn, err
		}
	}
}

// Close implements net.Listener. It closes both sockets.
func (t movableTCP) Close() error { return t.m.close() }

// Addr implements net.Listener.
func (t movableTCP) Addr() net.Addr {
	_, l := t.m.now()
	return l.Addr()
}
