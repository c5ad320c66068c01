package network_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/network"
)

// Of struct virtio_net_hdr, which precedes each frame.
const (
	headerSize = 10
	needsCsum  = 1
	gsoNone    = 0
	gsoTCPv4   = 1
)

type header struct {
	flags, gso          byte
	size, segment       uint16
	csumStart, csumOffs uint16
}

func (h header) bytes() []byte {
	b := []byte{h.flags, h.gso}
	for _, v := range []uint16{h.size, h.segment, h.csumStart, h.csumOffs} {
		b = binary.NativeEndian.AppendUint16(b, v)
	}
	return b
}

func parseHeader(b []byte) header {
	n := binary.NativeEndian.Uint16
	return header{b[0], b[1], n(b[2:]), n(b[4:]), n(b[6:]), n(b[8:])}
}

var (
	guestMAC = []byte{2, 0, 0, 0, 0, 1}
	guestIP  = []byte{10, 1, 0, 2}
	peerIP   = []byte{10, 1, 0, 1}
)

// ipv4 makes a frame from the guest to the peer, without the transport's checksum but with the part of it that hardware
// that fills it in wants.
func ipv4(to []byte, protocol byte, transport []byte, csumOffset int) []byte {
	f := slices.Concat(to, guestMAC, []byte{8, 0})
	ip := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(transport)))
	ip = slices.Concat(ip, guestIP, peerIP)
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip))
	pseudo := slices.Concat(guestIP, peerIP, []byte{0, protocol})
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(transport)))
	binary.BigEndian.PutUint16(transport[csumOffset:], sum(pseudo))
	return slices.Concat(f, ip, transport)
}

func sum(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func udp(from, to uint16, payload []byte) []byte {
	var b []byte
	for _, v := range []uint16{from, to, uint16(8 + len(payload)), 0} {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return append(b, payload...)
}

func tcp(payload []byte) []byte {
	b := []byte{0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, 0x10, 0xff, 0xff, 0, 0, 0, 0}
	return append(b, payload...)
}

// next reads frames until one matches.
func next(t *testing.T, file *os.File, match func(frame []byte) bool) (header, []byte) {
	t.Helper()
	buf := make([]byte, 1<<17)
	for deadline := time.Now().Add(10 * time.Second); ; {
		fds := []unix.PollFd{{Fd: int32(file.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(0, time.Until(deadline).Milliseconds())))
		if err == unix.EINTR {
			continue
		}
		assert.NilError(t, err)
		assert.Assert(t, n > 0, "no such frame")
		n, err = unix.Read(int(file.Fd()), buf)
		assert.NilError(t, err)
		if n > headerSize && match(buf[headerSize:n]) {
			return parseHeader(buf), buf[headerSize:n]
		}
	}
}

func send(t *testing.T, file *os.File, h header, frame []byte) {
	t.Helper()
	n, err := unix.Write(int(file.Fd()), append(h.bytes(), frame...))
	assert.NilError(t, err)
	assert.Equal(t, n, headerSize+len(frame))
}

// sniff opens a packet socket on an interface, with headers as a tap has.
func sniff(t *testing.T, ns *network.Namespace, name string) *os.File {
	t.Helper()
	link, err := handle(t, ns).LinkByName(name)
	assert.NilError(t, err)
	var file *os.File
	assert.NilError(t, ns.Do(func() error {
		all := uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
		if err != nil {
			return err
		}
		file = os.NewFile(uintptr(fd), name)
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index})
	}))
	t.Cleanup(func() { file.Close() })
	return file
}

func macOf(t *testing.T, ns *network.Namespace, name string) []byte {
	t.Helper()
	link, err := handle(t, ns).LinkByName(name)
	assert.NilError(t, err)
	return link.Attrs().HardwareAddr
}

// tapOf is the guest's end of an interface, with the offloads that a VMM asks for.
func tapOf(t *testing.T, r *rig, name string) *os.File {
	t.Helper()
	nic, ok := r.vm.card(r.guest.find(name).GetDeviceMac())
	assert.Assert(t, ok)
	const csum, tso4, tso6, ecn = 1, 2, 4, 8 // TUN_F_*
	assert.NilError(t, unix.IoctlSetInt(int(nic.Taps[0].Fd()), unix.TUNSETOFFLOAD, csum|tso4|tso6|ecn))
	return nic.Taps[0]
}

func listenUDP(t *testing.T, ns *network.Namespace, address string) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	assert.NilError(t, ns.Do(func() error {
		a, err := net.ResolveUDPAddr("udp", address)
		if err != nil {
			return err
		}
		conn, err = net.ListenUDP("udp", a)
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	assert.NilError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	return conn
}

// ask sends something to an address.
func ask(t *testing.T, ns *network.Namespace, ip string) {
	t.Helper()
	assert.NilError(t, ns.Do(func() error {
		c, err := net.Dial("udp", net.JoinHostPort(ip, "9"))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("anything"))
		return err
	}))
}

func TestPacketsPass(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	r := start(t, ns, nil)
	tap := tapOf(t, r, "eth0")
	conn := listenUDP(t, peer, "10.1.0.1:7000")
	peerMAC := macOf(t, peer, "out")

	// The peer asks who has the guest's address. The guest answers, and nobody else does.
	_, err := conn.WriteTo([]byte("to the guest"), &net.UDPAddr{IP: guestIP, Port: 9})
	assert.NilError(t, err)
	_, request := next(t, tap, func(f []byte) bool { return bytes.Equal(f[12:14], []byte{8, 6}) })
	assert.Assert(t, bytes.Equal(request[38:42], guestIP))
	out, err := try(peer, "ip neigh show 10.1.0.2")
	assert.NilError(t, err)
	assert.Assert(t, !bytes.Contains([]byte(out), []byte("lladdr")), out)
	reply := slices.Concat(peerMAC, guestMAC, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 2}, guestMAC, guestIP, peerMAC, peerIP)
	send(t, tap, header{}, reply)
	h, _ := next(t, tap, func(f []byte) bool { return bytes.Contains(f, []byte("to the guest")) })
	assert.Equal(t, h.flags&needsCsum, byte(needsCsum), "the checksum was not left to the guest")

	send(t, tap, header{flags: needsCsum, csumStart: 34, csumOffs: 6}, ipv4(peerMAC, unix.IPPROTO_UDP, udp(9, 7000, []byte("from the guest")), 6))
	buf := make([]byte, 64)
	n, from, err := conn.ReadFromUDP(buf)
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:n]), "from the guest")
	assert.Equal(t, from.String(), "10.1.0.2:9")
}

func TestLargeSegmentsPassWhole(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	r := start(t, ns, nil)
	tap, wire := tapOf(t, r, "eth0"), sniff(t, peer, "out")
	segments := header{flags: needsCsum, gso: gsoTCPv4, size: 54, segment: 1400, csumStart: 34, csumOffs: 16}
	frame := ipv4(macOf(t, peer, "out"), unix.IPPROTO_TCP, tcp(bytes.Repeat([]byte("segments"), 7500)), 16)

	send(t, tap, segments, frame)
	h, got := next(t, wire, func(f []byte) bool { return len(f) > 2000 })
	assert.Assert(t, bytes.Equal(got, frame))
	assert.Equal(t, h.segment, uint16(1400))

	back := slices.Concat(guestMAC, frame[6:])
	send(t, wire, segments, back)
	h, got = next(t, tap, func(f []byte) bool { return len(f) > 2000 })
	assert.Assert(t, bytes.Equal(got, back))
	assert.Equal(t, h.gso, byte(gsoTCPv4))
	assert.Equal(t, h.segment, uint16(1400))
}

func TestAnyMTU(t *testing.T) {
	for _, mtu := range []int{68, 1400, 9000, 65535} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			ns := newNamespace(t)
			peer := pair(t, ns)
			run(t, ns, fmt.Sprintf("ip link set eth0 mtu %d", mtu))
			run(t, peer, fmt.Sprintf("ip link set out mtu %d", mtu))
			r := start(t, ns, nil)
			assert.Equal(t, r.guest.find("eth0").Mtu, uint32(mtu))
			tap, wire := tapOf(t, r, "eth0"), sniff(t, peer, "out")
			// The largest that there are, which nobody cuts.
			frame := ipv4(macOf(t, peer, "out"), unix.IPPROTO_UDP, udp(9, 7000, make([]byte, mtu-28)), 6)
			send(t, tap, header{}, frame)
			_, got := next(t, wire, func(f []byte) bool { return len(f) >= mtu })
			assert.Assert(t, bytes.Equal(got, frame))
			back := slices.Concat(guestMAC, frame[6:])
			send(t, wire, header{}, back)
			_, got = next(t, tap, func(f []byte) bool { return len(f) >= mtu })
			assert.Assert(t, bytes.Equal(got, back))
		})
	}
}

func TestQueues(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	r := start(t, ns, func(c *network.Config) { c.Queues = 4 })
	nic, ok := r.vm.card(r.guest.find("eth0").GetDeviceMac())
	assert.Assert(t, ok)
	assert.Equal(t, len(nic.Taps), 4)
}

func TestHostPorts(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	run(t, ns, "sysctl -q net.ipv4.ip_local_reserved_ports=1000-1010 net.ipv4.ip_local_port_range='40000 50000'")
	before := state(t, ns)
	ports := func() string {
		out, err := try(ns, "sysctl -n net.ipv4.ip_local_port_range")
		assert.NilError(t, err)
		return strings.Join(strings.Fields(out), " ")
	}
	var needed atomic.Bool
	r := start(t, ns, func(c *network.Config) { c.HostPorts = func() (bool, error) { return needed.Load(), nil } })
	assert.DeepEqual(t, r.guest.request().Sysctls, map[string]string{
		"net.ipv4.ip_local_reserved_ports": "1000-1010", "net.ipv4.ip_local_port_range": "40000 50000",
	})
	needed.Store(true)
	assert.NilError(t, r.Sync(t.Context()))
	assert.DeepEqual(t, r.guest.request().Sysctls, map[string]string{"net.ipv4.ip_local_reserved_ports": "1000-1010,65024-65535"})
	for _, ip := range []string{"10.1.0.1", "[fd00:1::1]"} {
		// The namespace's kernel finds the peer, whose answers reach it.
		server := listenUDP(t, peer, ip+":53")
		var client net.Conn
		assert.NilError(t, ns.Do(func() (err error) {
			client, err = net.Dial("udp", ip+":53")
			return err
		}))
		defer client.Close()
		assert.NilError(t, client.SetDeadline(time.Now().Add(10*time.Second)))
		_, err := client.Write([]byte("question"))
		assert.NilError(t, err)
		buf := make([]byte, 64)
		_, from, err := server.ReadFromUDP(buf)
		assert.NilError(t, err)
		assert.Assert(t, from.Port >= 65024, from)
		_, err = server.WriteTo([]byte("answer"), from)
		assert.NilError(t, err)
		n, err := client.Read(buf)
		assert.NilError(t, err)
		assert.Equal(t, string(buf[:n]), "answer")

		var listener net.Listener
		assert.NilError(t, peer.Do(func() (err error) {
			listener, err = net.Listen("tcp", ip+":53")
			return err
		}))
		defer listener.Close()
		assert.NilError(t, ns.Do(func() error {
			// Not by Dial, which would connect on another thread once there are two addresses.
			c, err := (&net.Dialer{Timeout: 10 * time.Second}).Dial("tcp", ip+":53")
			if err == nil {
				c.Close()
			}
			return err
		}))
	}
	// The guest gets the others.
	tap := tapOf(t, r, "eth0")
	run(t, peer, "ip neigh replace 10.1.0.2 lladdr 02:00:00:00:00:01 dev out")
	_, err := listenUDP(t, peer, "10.1.0.1:7000").WriteTo([]byte("to the guest"), &net.UDPAddr{IP: guestIP, Port: 65023})
	assert.NilError(t, err)
	next(t, tap, func(f []byte) bool { return bytes.Contains(f, []byte("to the guest")) })

	assert.Equal(t, ports(), "65024 65535")
	run(t, ns, "sysctl -q net.ipv4.ip_local_port_range='3000 4000'")
	assert.NilError(t, r.Sync(t.Context()))
	assert.Equal(t, ports(), "65024 65535")
	assert.NilError(t, r.Close(t.Context()))
	assert.Equal(t, ports(), "40000 50000")
	assert.Equal(t, state(t, ns), before)

	killed := newRig(t, ns, func(c *network.Config) { c.HostPorts = func() (bool, error) { return true, nil } })
	assert.NilError(t, killed.Prepare(t.Context(), nil))
	assert.Equal(t, ports(), "65024 65535")
	assert.NilError(t, network.Clean(killed.records[len(killed.records)-1]))
	assert.NilError(t, killed.CloseSockets())
	assert.Equal(t, ports(), "40000 50000")
	assert.Equal(t, state(t, ns), before)
}

// What the namespace's kernel needs to hear, it hears, while nobody but the guest answers.
func TestTheNamespacesKernelStillFindsNeighbours(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	r := start(t, ns, nil)
	for _, ip := range []string{"10.1.0.1", "fd00:1::1"} {
		ask(t, ns, ip)
		r.await(t, ip, func() bool {
			out, err := try(ns, "ip neigh show dev eth0")
			return err == nil && strings.Contains(out, ip+" lladdr ")
		})
	}
	// Duplicates are found, and not mirrored.
	run(t, peer, "ip addr add fd00:1::66/64 dev out nodad")
	run(t, ns, "ip addr add fd00:1::66/64 dev eth0")
	r.await(t, "address that another has", func() bool {
		out, err := try(ns, "ip addr show dev eth0 dadfailed")
		return err == nil && strings.Contains(out, "fd00:1::66")
	})
	r.await(t, "no such address", func() bool { return !r.hasAddress("eth0", "fd00:1::66") })
}

// Whatever carries Ethernet is mirrored: here a tap of somebody else's, such as slirp4netns, and a bridge.
func TestPacketsPassThroughOthers(t *testing.T) {
	both := func(t *testing.T, r *rig, name string, wire *os.File, peerMAC []byte) {
		t.Helper()
		tap := tapOf(t, r, name)
		frame := ipv4(peerMAC, unix.IPPROTO_UDP, udp(9, 7000, []byte("out")), 6)
		send(t, tap, header{}, frame)
		_, got := next(t, wire, func(f []byte) bool { return slices.Equal(f[:12], frame[:12]) })
		assert.Assert(t, bytes.Equal(got, frame))
		back := slices.Concat(guestMAC, peerMAC, frame[12:])
		send(t, wire, header{}, back)
		_, got = next(t, tap, func(f []byte) bool { return slices.Equal(f[:12], back[:12]) })
		assert.Assert(t, bytes.Equal(got, back))
	}
	t.Run("tap", func(t *testing.T) {
		ns := newNamespace(t)
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "tap0"
		other := &netlink.Tuntap{
			LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, NonPersist: true, Queues: 1,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
		}
		assert.NilError(t, ns.Do(func() error { return netlink.LinkAdd(other) }))
		defer other.Fds[0].Close()
		run(t, ns, "ip link set tap0 address 02:00:00:00:00:01 up")
		both(t, start(t, ns, nil), "tap0", other.Fds[0], []byte{2, 0, 0, 0, 0, 9})
	})
	t.Run("bridge", func(t *testing.T) {
		ns, peer := newNamespace(t), newNamespace(t)
		veth(t, ns, "port0", peer, "out")
		run(t, ns, "ip link add br0 address 02:00:00:00:00:01 type bridge; ip link set port0 master br0; ip link set port0 up; ip link set br0 up")
		run(t, peer, "ip link set out up")
		r := start(t, ns, nil)
		assert.DeepEqual(t, r.guest.names(), []string{"br0"})
		both(t, r, "br0", sniff(t, peer, "out"), macOf(t, peer, "out"))
	})
}
