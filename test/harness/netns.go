package harness

import (
	"fmt"
	"net"
	"os"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/mountns"
)

// NetNS is a network namespace, with lo up.
type NetNS struct {
	*netlink.Handle
	Path string // valid for all processes, until Close

	t    testing.TB // nil: not of a test
	file *os.File
}

// OpenNetNS makes a network namespace, which goes with the last process that is in it. The caller closes it.
func OpenNetNS() (*NetNS, error) {
	n := &NetNS{}
	err := mountns.OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if n.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		n.Handle, err = netlink.NewHandle()
		return err
	})
	if err != nil {
		return nil, err
	}
	n.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
	lo, err := n.LinkByName("lo")
	if err == nil {
		err = n.LinkSetUp(lo)
	}
	return n, err
}

// Close lets go of the namespace.
func (n *NetNS) Close() error {
	n.Handle.Close()
	return n.file.Close()
}

// NewNetNS is OpenNetNS for a test.
func NewNetNS(t testing.TB) *NetNS {
	t.Helper()
	n, err := OpenNetNS()
	assert.NilError(t, err)
	n.t = t
	t.Cleanup(func() { assert.Check(t, n.Close()) })
	return n
}

// Do calls f on a thread in the namespace.
func (n *NetNS) Do(f func() error) error {
	return mountns.OnThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// File is the namespace's.
func (n *NetNS) File() *os.File { return n.file }

// Traces lists what a runtime has made in the namespace: taps and ingress qdiscs.
func (n *NetNS) Traces() (traces []string) {
	n.t.Helper()
	links, err := n.LinkList()
	assert.NilError(n.t, err)
	for _, l := range links {
		if l.Type() == "tuntap" {
			traces = append(traces, "tap "+l.Attrs().Name)
		}
		qdiscs, err := n.QdiscList(l)
		assert.NilError(n.t, err)
		for _, q := range qdiscs {
			if q.Attrs().Parent == netlink.HANDLE_INGRESS {
				traces = append(traces, "ingress qdisc of "+l.Attrs().Name)
			}
		}
	}
	slices.Sort(traces)
	return traces
}

// Link returns an interface.
func (n *NetNS) Link(name string) netlink.Link {
	n.t.Helper()
	l, err := n.LinkByName(name)
	assert.NilError(n.t, err, name)
	return l
}

// Veth makes a pair of interfaces, one here and one in another namespace, both up, with these
// addresses such as 10.0.0.1/24.
func (n *NetNS) Veth(name string, addrs []string, far *NetNS, farName string, farAddrs []string) {
	n.t.Helper()
	assert.NilError(n.t, n.Connect(name, addrs, far, farName, farAddrs))
}

// Connect is Veth for those who are no test.
func (n *NetNS) Connect(name string, addrs []string, far *NetNS, farName string, farAddrs []string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := n.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: farName, PeerNamespace: netlink.NsFd(int(far.file.Fd()))})
	if err != nil {
		return err
	}
	if err := far.setUp(farName, farAddrs); err != nil {
		return err
	}
	return n.setUp(name, addrs)
}

// setUp gives an interface addresses and sets it up.
func (n *NetNS) setUp(name string, addrs []string) error {
	l, err := n.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := n.addAddr(l, a); err != nil {
			return err
		}
	}
	return n.LinkSetUp(l)
}

func (n *NetNS) addAddr(l netlink.Link, addr string) error {
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD
	}
	return n.AddrAdd(l, a)
}

// AddAddr adds an address such as 10.0.0.1/24, of IPv6 without asking whether others have it.
func (n *NetNS) AddAddr(name, addr string) {
	n.t.Helper()
	assert.NilError(n.t, n.addAddr(n.Link(name), addr))
}

// AddRoute adds a route by a gateway; an empty destination stands for all.
func (n *NetNS) AddRoute(dst, gateway string) *netlink.Route {
	n.t.Helper()
	r := &netlink.Route{Gw: net.ParseIP(gateway)}
	if dst == "" {
		dst = "0.0.0.0/0"
		if r.Gw.To4() == nil {
			dst = "::/0"
		}
	}
	var err error
	_, r.Dst, err = net.ParseCIDR(dst)
	assert.NilError(n.t, err)
	assert.NilError(n.t, n.RouteAdd(r))
	return r
}

// MayPing gives a process the right to send pings.
func MayPing(s *specs.Spec) {
	c := s.Process.Capabilities
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted} {
		*set = append(*set, "CAP_NET_RAW")
	}
}
