package network

import (
	"fmt"
	"net"
	"os"

	"github.com/containerd/errdefs"

	"runv/internal/guest/fault"
	"runv/internal/resolver"
)

// dns is the port of name servers.
const dns = 53

// attempts is how often a port is looked for that is free for UDP and TCP.
const attempts = 16

// Resolve serves DNS at port 53 of a loopback address in the network, with what the host answers on the
// stream, until the stream ends or the network is removed or Resolve is called again for it. The
// stream is the caller's to close when it fails. Errors: errdefs.ErrInvalidArgument,
// errdefs.ErrNotFound, and errdefs.ErrAlreadyExists when a program has the port that stands for 53.
func (s *Set) Resolve(id string, ip net.IP, stream net.Conn) error {
	if err := s.resolve(id, ip, stream); err != nil {
		return fmt.Errorf("network %s: serve DNS: %w", id, err)
	}
	return nil
}

func (s *Set) resolve(id string, ip net.IP, stream net.Conn) error {
	if len(ip) != net.IPv4len || !ip.IsLoopback() {
		return fault.New(errdefs.ErrInvalidArgument, "ip: %x is no loopback address of IPv4", []byte(ip))
	}
	n, err := s.get(id)
	if err != nil {
		return err
	}
	netns, _ := n.state()
	if netns == nil {
		return notFound(id)
	}
	n.setNames(nil) // it may have the port
	s.serving.Lock()
	defer s.serving.Unlock()
	port, known := s.ports[[4]byte(ip)]
	var udp net.PacketConn
	var tcp net.Listener
	err = inside(netns, func() error {
		udp, tcp, err = listen(ip, int(port))
		return err
	})
	if err != nil {
		return err
	}
	if !known {
		port = uint16(udp.LocalAddr().(*net.UDPAddr).Port)
		if err := s.Redirect([4]byte(ip), dns, port); err != nil {
			udp.Close()
			tcp.Close()
			return err
		}
		s.ports[[4]byte(ip)] = port
	}
	m := &movable{udp: udp, tcp: tcp}
	n.setNames(&names{ip: ip, port: int(port), sockets: m, stream: stream})
	go resolver.Serve(stream, movableUDP{udp, m}, movableTCP{m})
	return nil
}

// names is a name server.
type names struct {
	ip      net.IP
	port    int
	sockets *movable
	stream  net.Conn
}

func (n *names) end() {
	_ = n.stream.Close() // the host ends it once we have
	_ = n.sockets.close()
}

// move makes the server listen in another namespace.
func (n *names) move(netns *os.File) error {
	var udp net.PacketConn
	var tcp net.Listener
	err := inside(netns, func() (err error) {
		udp, tcp, err = listen(n.ip, n.port)
		return err
	})
	if err != nil {
		return fmt.Errorf("serve DNS: %w", err)
	}
	n.sockets.move(udp, tcp)
	return nil
}

// listen opens sockets at a port of an address for UDP and TCP; 0: one that is free for both.
func listen(ip net.IP, port int) (udp net.PacketConn, tcp net.Listener, err error) {
	for range attempts {
		if udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: ip, Port: port}); err != nil {
			break
		}
		at := udp.LocalAddr().(*net.UDPAddr).Port
		if tcp, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: ip, Port: at}); err == nil {
			return udp, tcp, nil
		}
		udp.Close()
		if port != 0 {
			break
		}
	}
	return nil, nil, fault.New(errdefs.ErrAlreadyExists, "%v", err)
}

// setNames ends what serves DNS and remembers how to end what does it now; nil: nothing.
func (n *network) setNames(next *names) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.names != nil {
		n.names.end()
	}
	n.names = next
}
