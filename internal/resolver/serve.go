package resolver

import (
	"errors"
	"net"
	"sync"
	"time"
)

const (
	// maxPending bounds the queries that wait for their answers in the guest. More are dropped, as
	// on a network.
	maxPending = 256
	maxConns   = 64 // TCP connections of clients
	// idleTimeout ends a TCP connection on which nothing comes.
	idleTimeout = 30 * time.Second
	// sendTimeout bounds the sending of an answer to a client.
	sendTimeout = time.Second
	// acceptPause follows an error of accept: a want of descriptors or memory.
	acceptPause = 100 * time.Millisecond
)

// server is the guest's end.
type server struct {
	stream net.Conn
	udp    net.PacketConn
	tcp    net.Listener

	writing sync.Mutex // to the stream

	mu      sync.Mutex
	ended   bool
	last    uint32
	pending map[uint32]func(answer []byte)
	conns   map[net.Conn]bool
}

// Serve answers the queries that come to the two sockets by what the host says on the stream. It
// returns when the stream has ended, with all three closed.
func Serve(stream net.Conn, udp net.PacketConn, tcp net.Listener) {
	s := &server{stream: stream, udp: udp, tcp: tcp, pending: make(map[uint32]func([]byte)), conns: make(map[net.Conn]bool)}
	var running sync.WaitGroup
	running.Go(s.serveUDP)
	running.Go(func() { s.serveTCP(&running) })
	for {
		f, err := readFrame(stream)
		if err != nil {
			break
		}
		if deliver := s.take(f.number); deliver != nil && len(f.message) > 0 {
			deliver(f.message)
		}
	}
	s.end()
	running.Wait()
}

func (s *server) end() {
	_ = s.stream.Close()
	_ = s.udp.Close()
	_ = s.tcp.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	for c := range s.conns {
		_ = c.Close()
	}
}

func (s *server) take(number uint32) func([]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	deliver := s.pending[number]
	delete(s.pending, number)
	return deliver
}

// ask sends a query to the host. deliver gets the answer, if there is one.
func (s *server) ask(protocol byte, query []byte, deliver func(answer []byte)) {
	s.mu.Lock()
	if len(s.pending) >= maxPending {
		s.mu.Unlock()
		return
	}
	s.last++
	number := s.last
	s.pending[number] = deliver
	s.mu.Unlock()

	s.writing.Lock()
	defer s.writing.Unlock()
	if _, err := s.stream.Write(frame{protocol: protocol, number: number, message: query}.encode()); err != nil {
		s.take(number) // the reader ends, too
	}
}

func (s *server) serveUDP() {
	buf := make([]byte, maxFrame)
	for {
		n, client, err := s.udp.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Other errors are of earlier answers: a client that has gone.
		if err != nil || n < idSize {
			continue
		}
		s.ask(overUDP, buf[:n], func(answer []byte) { _, _ = s.udp.WriteTo(answer, client) })
	}
}

func (s *server) serveTCP(running *sync.WaitGroup) {
	for {
		conn, err := s.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			<-time.After(acceptPause)
			continue
		}
		if !s.admit(conn) {
			continue
		}
		running.Go(func() {
			defer s.dismiss(conn)
			s.serveConn(conn)
		})
	}
}

func (s *server) admit(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || len(s.conns) >= maxConns {
		_ = conn.Close()
		return false
	}
	s.conns[conn] = true
	return true
}

func (s *server) dismiss(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
	_ = conn.Close()
}

func (s *server) serveConn(conn net.Conn) {
	var writing sync.Mutex
	for conn.SetReadDeadline(time.Now().Add(idleTimeout)) == nil {
		query, err := readMessage(conn)
		if err != nil || len(query) < idSize {
			return
		}
		s.ask(overTCP, query, func(answer []byte) {
			writing.Lock()
			defer writing.Unlock()
			_ = conn.SetWriteDeadline(time.Now().Add(sendTimeout))
			if _, err := conn.Write(tcpMessage(answer)); err != nil {
				_ = conn.Close() // one that does not read holds up the others once only
			}
		})
	}
}
