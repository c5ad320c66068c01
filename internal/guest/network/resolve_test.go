package network_test

import (
	"io"
	"net"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/network"
)

// redirects remembers what was redirected.
type redirects struct{ ports []uint16 }

func (r *redirects) add(_ [4]byte, _, to uint16) error {
	r.ports = append(r.ports, to)
	return nil
}

// Every network has the name server at the same port, for what redirects it is one for all.
func TestResolve(t *testing.T) {
	b := newBench(t)
	r := &redirects{}
	b.Redirect = r.add
	ip := net.IP{127, 0, 0, 11}
	streams := map[string]net.Conn{}
	for _, id := range []string{"a", "b", "a"} {
		_, err := b.Apply(t.Context(), &agentv1.ApplyNetworkRequest{Id: id})
		assert.NilError(t, err)
		host, guest := net.Pipe()
		assert.NilError(t, b.Resolve(id, ip, guest))
		if old := streams[id]; old != nil {
			_, err := old.Read(make([]byte, 1))
			assert.ErrorContains(t, err, "EOF", "the one before is ended")
			assert.NilError(t, old.Close())
		}
		streams[id] = host
	}
	assert.Equal(t, len(r.ports), 1)

	for id, stream := range streams {
		netns, err := b.Open(id)
		assert.NilError(t, err)
		assert.NilError(t, network.Inside(netns, func() error {
			client, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: ip, Port: int(r.ports[0])})
			assert.NilError(t, err)
			defer client.Close()
			_, err = client.Write([]byte("query"))
			assert.NilError(t, err)
			frame := make([]byte, 12)
			_, err = stream.Read(frame)
			assert.NilError(t, err)
			assert.Equal(t, string(frame[7:]), "query")
			return nil
		}))
		assert.NilError(t, netns.Close())
		b.Release(id)
	}
	for id, stream := range streams {
		assert.NilError(t, b.Remove(t.Context(), id))
		_, err := stream.Read(make([]byte, 1))
		assert.ErrorContains(t, err, "EOF")
	}
}

// The name server goes with the network into another namespace.
func TestResolveMoves(t *testing.T) {
	b := newBench(t)
	r := &redirects{}
	b.Redirect = r.add
	b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a"})
	host, guest := net.Pipe()
	ip := net.IP{127, 0, 0, 11}
	assert.NilError(t, b.Resolve("a", ip, guest))
	for range 2 {
		netns, err := network.NewNetNS()
		assert.NilError(t, err)
		defer netns.Close()
		assert.NilError(t, b.Adopt(t.Context(), "a", netns))
		assert.NilError(t, network.Inside(netns, func() error {
			for _, over := range []string{"udp4", "tcp4"} {
				client, err := net.Dial(over, (&net.UDPAddr{IP: ip, Port: int(r.ports[0])}).String())
				assert.NilError(t, err)
				query := "query"
				if over == "tcp4" {
					query = "\x00\x05query"
				}
				_, err = client.Write([]byte(query))
				assert.NilError(t, err)
				frame := make([]byte, 12)
				_, err = io.ReadFull(host, frame)
				assert.NilError(t, err)
				assert.Equal(t, string(frame[7:]), "query")
				assert.NilError(t, client.Close())
			}
			return nil
		}))
	}
	assert.NilError(t, b.Remove(t.Context(), "a"))
	_, err := host.Read(make([]byte, 1))
	assert.ErrorContains(t, err, "EOF")
}

func TestResolveRefuses(t *testing.T) {
	b := newBench(t)
	r := &redirects{}
	b.Redirect = r.add
	host, guest := net.Pipe()
	defer host.Close()
	defer guest.Close()
	_, err := b.Apply(t.Context(), &agentv1.ApplyNetworkRequest{Id: "a"})
	assert.NilError(t, err)
	for _, ip := range []net.IP{nil, {10, 0, 0, 1}, net.IPv6loopback, net.ParseIP("127.0.0.1")} {
		assert.Assert(t, errdefs.IsInvalidArgument(b.Resolve("a", ip, guest)), "%v", ip)
	}
	assert.Assert(t, errdefs.IsNotFound(b.Resolve("c", net.IP{127, 0, 0, 11}, guest)))

	// A port that is known is the only one.
	assert.NilError(t, b.Resolve("a", net.IP{127, 0, 0, 11}, guest))
	_, err = b.Apply(t.Context(), &agentv1.ApplyNetworkRequest{Id: "b"})
	assert.NilError(t, err)
	netns, err := b.Open("b")
	assert.NilError(t, err)
	defer b.Release("b")
	defer netns.Close()
	fd := -1
	assert.NilError(t, network.Inside(netns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Port: int(r.ports[0])})
	}))
	defer unix.Close(fd)
	other, guest2 := net.Pipe()
	defer other.Close()
	defer guest2.Close()
	assert.Assert(t, errdefs.IsAlreadyExists(b.Resolve("b", net.IP{127, 0, 0, 11}, guest2)))
}
