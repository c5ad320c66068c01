package pod_test

import (
	"net"
	"net/netip"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/network"
	"runv/internal/pod"
)

func TestListens(t *testing.T) {
	ns, err := network.Open(netNS(t))
	assert.NilError(t, err)
	defer ns.Close()
	h, err := ns.Handle()
	assert.NilError(t, err)
	defer h.Close()
	lo, err := h.LinkByName("lo")
	assert.NilError(t, err)
	assert.NilError(t, h.LinkSetUp(lo))

	ip := netip.MustParseAddr("127.0.0.11")
	assert.NilError(t, ns.Do(func() error {
		other, err := net.ListenPacket("udp4", "127.0.0.1:0")
		assert.NilError(t, err)
		defer other.Close()
		there, err := pod.Listens(ip)
		assert.NilError(t, err)
		assert.Assert(t, !there)

		server, err := net.ListenPacket("udp4", "127.0.0.11:0")
		assert.NilError(t, err)
		defer server.Close()
		there, err = pod.Listens(ip)
		assert.NilError(t, err)
		assert.Assert(t, there)
		return nil
	}))
	there, err := pod.Listens(ip)
	assert.NilError(t, err)
	assert.Assert(t, !there, "that is another namespace")
}
