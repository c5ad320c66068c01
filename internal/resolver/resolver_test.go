package resolver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"
	"gotest.tools/v3/assert"

	"runv/internal/resolver"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// nameServer answers "a.test" with 10.0.0.1, "large.test" over UDP with nothing but the word that the
// answer is too large, and over TCP with 1000 addresses. It does not answer "silent.test".
type nameServer struct {
	udp     net.PacketConn
	tcp     net.Listener
	running sync.WaitGroup
}

func newNameServer(t *testing.T) *nameServer {
	t.Helper()
	s := &nameServer{}
	s.udp, s.tcp = sockets(t)
	s.running.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, client, err := s.udp.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := respond(buf[:n], false); answer != nil {
				stray := append([]byte{^answer[0], answer[1]}, answer[2:]...)
				_, _ = s.udp.WriteTo(stray, client) // the answer to another query
				_, _ = s.udp.WriteTo(answer, client)
			}
		}
	})
	s.running.Go(func() {
		for {
			conn, err := s.tcp.Accept()
			if err != nil {
				return
			}
			s.running.Go(func() {
				defer conn.Close()
				var length [2]byte
				if _, err := io.ReadFull(conn, length[:]); err != nil {
					return
				}
				query := make([]byte, int(length[0])<<8|int(length[1]))
				if _, err := io.ReadFull(conn, query); err != nil {
					return
				}
				if answer := respond(query, true); answer != nil {
					_, _ = conn.Write(append([]byte{byte(len(answer) >> 8), byte(len(answer))}, answer...))
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = s.udp.Close()
		_ = s.tcp.Close()
		s.running.Wait()
	})
	return s
}

func (s *nameServer) dial(ctx context.Context, network string) (net.Conn, error) {
	addr := s.udp.LocalAddr().String()
	if network == "tcp" {
		addr = s.tcp.Addr().String()
	}
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

func respond(query []byte, tcp bool) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	m.Response, m.Additionals = true, nil
	q := m.Questions[0]
	count := 1
	switch {
	case q.Name.String() == "silent.test.":
		return nil
	case q.Name.String() == "large.test." && !tcp:
		m.Truncated = true
		count = 0
	case q.Name.String() == "large.test.":
		count = 1000
	}
	if q.Type != dnsmessage.TypeA {
		count = 0
	}
	for i := range count {
		m.Answers = append(m.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
			Body:   &dnsmessage.AResource{A: [4]byte{10, 0, byte((i + 1) >> 8), byte(i + 1)}},
		})
	}
	answer, err := m.Pack()
	if err != nil {
		return nil
	}
	return answer
}

func sockets(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	assert.NilError(t, err)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	return udp, tcp
}

// streamPair is two ends of a connection with buffers, as a stream has them.
func streamPair(t *testing.T) (host, guest net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	defer l.Close()
	host, err = net.Dial("tcp", l.Addr().String())
	assert.NilError(t, err)
	guest, err = l.Accept()
	assert.NilError(t, err)
	return host, guest
}

// start connects the two ends and returns how to look names up in the guest.
func start(t *testing.T, dial resolver.Dial) *net.Resolver {
	t.Helper()
	host, guest := streamPair(t)
	udp, tcp := sockets(t)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { resolver.Relay(ctx, host, dial) })
	running.Go(func() { resolver.Serve(guest, udp, tcp) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		addr := udp.LocalAddr().String()
		if network == "tcp" {
			addr = tcp.Addr().String()
		}
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}}
}

func TestLookups(t *testing.T) {
	r := start(t, newNameServer(t).dial)
	addrs, err := r.LookupNetIP(t.Context(), "ip4", "a.test.")
	assert.NilError(t, err)
	assert.Equal(t, fmt.Sprint(addrs), fmt.Sprint([]netip.Addr{netip.MustParseAddr("10.0.0.1")}))

	addrs, err = r.LookupNetIP(t.Context(), "ip4", "large.test.")
	assert.NilError(t, err)
	assert.Equal(t, len(addrs), 1000)

	// One that is not answered holds up none of the others.
	conn, err := r.Dial(t.Context(), "udp", "")
	assert.NilError(t, err)
	defer conn.Close()
	_, err = conn.Write(query(t, "silent.test."))
	assert.NilError(t, err)
	var others sync.WaitGroup
	for range 200 {
		others.Go(func() {
			_, err := r.LookupNetIP(t.Context(), "ip4", "a.test.")
			assert.Check(t, err)
		})
	}
	others.Wait()
}

func query(t *testing.T, name string) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 7},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	q, err := m.Pack()
	assert.NilError(t, err)
	return q
}

// Without a name server a query has no answer, and one that comes later is found.
func TestNameServerComesLater(t *testing.T) {
	s := newNameServer(t)
	var mu sync.Mutex
	there, refused := false, make(chan struct{})
	r := start(t, func(ctx context.Context, network string) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		if !there {
			close(refused)
			return nil, errors.New("nobody listens")
		}
		return s.dial(ctx, network)
	})
	conn, err := r.Dial(t.Context(), "tcp", "")
	assert.NilError(t, err)
	defer conn.Close()
	_, err = conn.Write(append([]byte{0, 24}, query(t, "a.test.")...))
	assert.NilError(t, err)
	<-refused
	mu.Lock()
	there = true
	mu.Unlock()
	_, err = r.LookupNetIP(t.Context(), "ip4", "a.test.")
	assert.NilError(t, err)
}

// What is no frame ends the conversation, and nothing else.
func TestHostileGuest(t *testing.T) {
	s := newNameServer(t)
	for _, text := range []string{
		"", "\x01", "\x03\x00\x00\x00\x01\x00\x02ab", "\x01\x00\x00\x00\x01\x00\x09short",
		"\x01\x00\x00\x00\x01\x00\x00" + "\x02\x00\x00\x00\x01\x00\x01x" + "\xff",
	} {
		host, guest := streamPair(t)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			resolver.Relay(t.Context(), host, s.dial)
		}()
		_, err := guest.Write([]byte(text))
		assert.NilError(t, err)
		_ = guest.(*net.TCPConn).CloseWrite() // the other end may be gone already
		_, _ = io.Copy(io.Discard, guest)
		<-ended
		assert.NilError(t, guest.Close())
	}
}

// A client that sends queries and reads no answers does not stop the others.
func TestClientThatDoesNotRead(t *testing.T) {
	s := newNameServer(t)
	host, guest := streamPair(t)
	udp, tcp := sockets(t)
	var running sync.WaitGroup
	running.Go(func() { resolver.Relay(t.Context(), host, s.dial) })
	running.Go(func() { resolver.Serve(guest, udp, tcp) })
	defer running.Wait()
	defer host.Close()

	q := query(t, "large.test.")
	lazy, err := net.Dial("tcp", tcp.Addr().String())
	assert.NilError(t, err)
	defer lazy.Close()
	for range 1000 {
		if _, err := lazy.Write(append([]byte{0, byte(len(q))}, q...)); err != nil {
			break // it was thrown out
		}
	}
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", udp.LocalAddr().String())
	}}
	_, err = r.LookupNetIP(t.Context(), "ip4", "a.test.")
	assert.NilError(t, err)
}
