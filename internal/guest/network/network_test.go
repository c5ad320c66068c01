package network_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/network"
)

// bench is a set of networks whose home is a namespace of the test.
type bench struct {
	*network.Set
	t         *testing.T
	home, far *os.File
}

func newBench(t *testing.T) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	goroutines := goleak.IgnoreCurrent()
	before := descriptors(t)
	home, err := network.NewNetNS()
	assert.NilError(t, err)
	far, err := network.NewNetNS()
	assert.NilError(t, err)
	b := &bench{Set: network.NewSetAt(network.Config{Log: slog.New(slog.DiscardHandler)}, home), t: t, home: home, far: far}
	t.Cleanup(func() {
		for _, id := range []string{"a", "b"} {
			assert.NilError(t, b.Remove(context.Background(), id))
		}
		home.Close()
		far.Close()
		// A name server closes its clients' connections a moment after the stream.
		for end := time.Now().Add(10 * time.Second); !slices.Equal(descriptors(t), before) && time.Now().Before(end); {
			<-time.After(time.Millisecond)
		}
		assert.DeepEqual(t, descriptors(t), before)
		goleak.VerifyNone(t, goroutines)
	})
	return b
}

// descriptors lists what this process has open, without the Go runtime's poller.
func descriptors(t *testing.T) []string {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	assert.NilError(t, err)
	var all []string
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") && !strings.HasPrefix(target, "/proc/") {
			all = append(all, target)
		}
	}
	slices.Sort(all)
	return all
}

// device is the address of the i-th device of a test.
func device(i int) net.HardwareAddr { return net.HardwareAddr{0x52, 0x54, 0, 0, byte(i >> 8), byte(i)} }

// plug makes the i-th device appear at home.
func (b *bench) plug(i int) {
	b.t.Helper()
	assert.NilError(b.t, b.tryPlug(i))
}

// tryPlug makes a pair of devices far away, and moves one home when it has its alias.
func (b *bench) tryPlug(i int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("new%d", i)
	peer := fmt.Sprintf("peer%d", i)
	return network.Inside(b.far, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}); err != nil {
			return err
		}
		for _, name := range []string{peer, attrs.Name} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if name == peer {
				err = netlink.LinkSetUp(link)
			} else {
				err = errors.Join(netlink.LinkSetAlias(link, device(i).String()), netlink.LinkSetNsFd(link, int(b.home.Fd())))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// unplug makes a device vanish, wherever it is.
func (b *bench) unplug(netns *os.File, i int) {
	b.t.Helper()
	b.inside(netns, func() error {
		link, err := netlink.LinkByAlias(device(i).String())
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
}

func (b *bench) inside(netns *os.File, f func() error) {
	b.t.Helper()
	assert.NilError(b.t, network.Inside(netns, f))
}

// open is Open without a container.
func (b *bench) open(id string) *os.File {
	b.t.Helper()
	netns, err := b.Open(id)
	assert.NilError(b.t, err)
	b.Release(id)
	b.t.Cleanup(func() { netns.Close() })
	return netns
}

func (b *bench) apply(r *agentv1.ApplyNetworkRequest) []string {
	b.t.Helper()
	resp, err := b.Apply(b.t.Context(), r)
	assert.NilError(b.t, err)
	return resp.Problems
}

// applyAll is apply when nothing may be wrong.
func (b *bench) applyAll(r *agentv1.ApplyNetworkRequest) {
	b.t.Helper()
	assert.DeepEqual(b.t, b.apply(r), []string(nil))
}

func ip(s string) []byte { return netip.MustParseAddr(s).AsSlice() }

func address(s string) *agentv1.Address {
	p := netip.MustParsePrefix(s)
	return &agentv1.Address{Ip: p.Addr().AsSlice(), PrefixLength: uint32(p.Bits())}
}

func iface(i int, name string, addresses ...string) *agentv1.Interface {
	f := &agentv1.Interface{DeviceMac: device(i), Name: name, Mac: []byte{2, 0, 0, 0, 0, byte(i)}, Mtu: 1400, Up: true, Arp: true}
	for _, a := range addresses {
		f.Addresses = append(f.Addresses, address(a))
	}
	return f
}

func route(destination, gateway, name string) *agentv1.Route {
	r := &agentv1.Route{Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_STATIC}
	if destination != "" {
		p := netip.MustParsePrefix(destination)
		r.Destination, r.PrefixLength = p.Addr().AsSlice(), uint32(p.Bits())
		if p.Addr().Is6() {
			r.Family = unix.AF_INET6
		}
	}
	hop := &agentv1.NextHop{Interface: name}
	if gateway != "" {
		hop.Gateway = ip(gateway)
		if len(hop.Gateway) == 16 {
			r.Family = unix.AF_INET6
		}
	} else {
		r.Scope = unix.RT_SCOPE_LINK
	}
	r.NextHops = []*agentv1.NextHop{hop}
	return r
}

// picture is all that matters of a namespace, as text.
func (b *bench) picture(netns *os.File) string {
	b.t.Helper()
	var lines []string
	b.inside(netns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		names := map[int]string{}
		for _, l := range links {
			a := l.Attrs()
			names[a.Index] = a.Name
			lines = append(lines, fmt.Sprintf("link %s %s mtu %d %s", a.Name, a.HardwareAddr, a.MTU, a.Flags&net.FlagUp))
			addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, x := range addresses {
				lines = append(lines, fmt.Sprintf("address %s %s flags %#x", a.Name, x.IPNet, x.Flags&^unix.IFA_F_PERMANENT))
			}
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Protocol == unix.RTPROT_KERNEL || r.Table == unix.RT_TABLE_LOCAL {
					continue
				}
				line := fmt.Sprintf("route %s via %v dev %s table %d metric %d mtu %d", r.Dst, r.Gw, names[r.LinkIndex], r.Table, r.Priority, r.MTU)
				for _, h := range r.MultiPath {
					line += fmt.Sprintf(" hop %v %s %d", h.Gw, names[h.LinkIndex], h.Hops+1)
				}
				lines = append(lines, line)
			}
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.Priority != 0 && r.Priority != 32766 && r.Priority != 32767 {
					lines = append(lines, fmt.Sprintf("rule %d from %v table %d", r.Priority, r.Src, r.Table))
				}
			}
		}
		neighbours, err := netlink.NeighList(0, 0)
		if err != nil {
			return err
		}
		for _, n := range neighbours {
			if n.State&unix.NUD_PERMANENT != 0 {
				lines = append(lines, fmt.Sprintf("neighbour %s %s dev %s", n.IP, n.HardwareAddr, names[n.LinkIndex]))
			}
		}
		return nil
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

const bare = `address lo 127.0.0.1/8 flags 0x0
address lo ::1/128 flags 0x0
link lo  mtu 65536 up
`

func TestEmptyNetworkHasLo(t *testing.T) {
	b := newBench(t)
	b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a"})
	assert.Equal(t, b.picture(b.open("a")), bare)
}

// full is a request that has some of everything.
func full() *agentv1.ApplyNetworkRequest {
	metered := route("10.9.0.0/16", "10.0.0.1", "eth0")
	metered.Priority, metered.Metrics, metered.Table = 50, map[uint32]uint32{unix.RTAX_MTU: 1300}, 100
	multi := route("10.8.0.0/16", "10.0.0.1", "eth0")
	multi.NextHops[0].Weight = 2
	multi.NextHops = append(multi.NextHops, &agentv1.NextHop{Gateway: ip("10.1.0.1"), Interface: "eth1", Weight: 3})
	onlink := route("10.7.0.0/16", "192.0.2.1", "eth1")
	onlink.NextHops[0].Flags = unix.RTNH_F_ONLINK
	via6 := route("10.6.0.0/16", "fd00::1", "eth0")
	via6.Family = unix.AF_INET
	black := route("10.5.0.0/16", "", "")
	black.Type, black.NextHops, black.Scope = unix.RTN_BLACKHOLE, nil, 0
	return &agentv1.ApplyNetworkRequest{
		Id: "a",
		Interfaces: []*agentv1.Interface{
			iface(0, "eth0", "10.0.0.2/24", "10.0.0.3/24", "fd00::2/64", "fe80::2/64"),
			iface(1, "eth1", "10.1.0.2/24"),
			{Name: "lo", Addresses: []*agentv1.Address{address("10.2.2.2/32")}},
		},
		Routes: []*agentv1.Route{
			route("10.3.0.0/16", "", "eth1"), route("", "10.0.0.1", "eth0"), route("", "fd00::1", "eth0"), metered, multi, onlink, via6, black,
		},
		Neighbours: []*agentv1.Neighbour{{Interface: "eth0", Ip: ip("10.0.0.9"), Mac: device(9), State: unix.NUD_PERMANENT}},
		Rules: []*agentv1.Rule{
			{Family: unix.AF_INET, Priority: 1000, Source: ip("10.0.0.3"), SourceLength: 32, Table: 100, Action: 1},
			{Family: unix.AF_INET6, Priority: 1001, Source: ip("fd00::"), SourceLength: 64, Table: 300, Action: 1},
		},
		Sysctls: map[string]string{"net.ipv4.ip_forward": "1", "net.ipv4.conf.eth0.rp_filter": "2", "net.ipv4.ping_group_range": "0 5"},
	}
}

const fullPicture = `address eth0 10.0.0.2/24 flags 0x0
address eth0 10.0.0.3/24 flags 0x1
address eth0 fd00::2/64 flags 0x2
address eth0 fe80::2/64 flags 0x2
address eth1 10.1.0.2/24 flags 0x0
address lo 10.2.2.2/32 flags 0x0
address lo 127.0.0.1/8 flags 0x0
address lo ::1/128 flags 0x0
link eth0 02:00:00:00:00:00 mtu 1400 up
link eth1 02:00:00:00:00:01 mtu 1400 up
link lo  mtu 65536 up
neighbour 10.0.0.9 52:54:00:00:00:09 dev eth0
route 0.0.0.0/0 via 10.0.0.1 dev eth0 table 254 metric 0 mtu 0
route 10.3.0.0/16 via <nil> dev eth1 table 254 metric 0 mtu 0
route 10.5.0.0/16 via <nil> dev  table 254 metric 0 mtu 0
route 10.6.0.0/16 via <nil> dev eth0 table 254 metric 0 mtu 0
route 10.7.0.0/16 via 192.0.2.1 dev eth1 table 254 metric 0 mtu 0
route 10.8.0.0/16 via <nil> dev  table 254 metric 0 mtu 0 hop 10.0.0.1 eth0 2 hop 10.1.0.1 eth1 3
route 10.9.0.0/16 via 10.0.0.1 dev eth0 table 100 metric 50 mtu 1300
route ::/0 via fd00::1 dev eth0 table 254 metric 1024 mtu 0
rule 1000 from 10.0.0.3/32 table 100
rule 1001 from fd00::/64 table 300
`

func (b *bench) sysctl(netns *os.File, key string) string {
	b.t.Helper()
	path, err := network.SysctlPath(key)
	assert.NilError(b.t, err)
	var data []byte
	b.inside(netns, func() (err error) {
		data, err = os.ReadFile(path)
		return err
	})
	return strings.Join(strings.Fields(string(data)), " ")
}

func TestApply(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	b.plug(1)
	for range 3 { // idempotent
		b.applyAll(full())
		assert.Equal(t, b.picture(b.open("a")), fullPicture)
	}
	netns := b.open("a")
	assert.Equal(t, b.sysctl(netns, "net.ipv4.ip_forward"), "1")
	assert.Equal(t, b.sysctl(netns, "net.ipv4.conf.eth0.rp_filter"), "2")
	assert.Equal(t, b.sysctl(netns, "net.ipv4.ping_group_range"), "0 5")
	assert.Equal(t, b.sysctl(netns, "net.ipv6.conf.eth0.accept_ra"), "0")
	assert.Equal(t, b.picture(b.home), bare)

	// What was taken away by somebody comes back.
	b.inside(netns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	})
	b.applyAll(full())
	assert.Equal(t, b.picture(netns), fullPicture)

	// What is not wanted any more goes, parameters become what they were.
	b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a"})
	assert.Equal(t, b.picture(netns), bare)
	assert.Equal(t, b.sysctl(netns, "net.ipv4.ip_forward"), "0")
	assert.Equal(t, b.sysctl(netns, "net.ipv4.ping_group_range"), "1 0")
	assert.Equal(t, strings.Count(b.picture(b.home), "link "), 3)

	b.applyAll(full())
	assert.Equal(t, b.picture(netns), fullPicture)
	assert.NilError(t, b.Remove(t.Context(), "a"))
	assert.Equal(t, strings.Count(b.picture(b.home), "link "), 3)
	assert.NilError(t, b.Remove(t.Context(), "a"))
	_, err := b.Open("a")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
}

func TestApplyChanges(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	b.plug(1)
	r := full()
	b.applyAll(r)
	netns := b.open("a")
	// Names change places, and with them what hangs on them.
	r.Interfaces[0].DeviceMac, r.Interfaces[1].DeviceMac = device(1), device(0)
	b.applyAll(r)
	assert.Equal(t, b.picture(netns), fullPicture)
	// One is named anew, with another address and size; one goes.
	r.Interfaces = []*agentv1.Interface{iface(0, "net.7", "10.0.0.2/25")}
	r.Interfaces[0].Mac, r.Interfaces[0].Mtu = []byte{2, 9, 9, 9, 9, 9}, 9000
	r.Routes = []*agentv1.Route{route("", "10.0.0.5", "net.7")}
	r.Neighbours, r.Rules = nil, nil
	r.Sysctls = map[string]string{"net.ipv4.conf.net/7.rp_filter": "1"}
	b.applyAll(r)
	assert.Equal(t, b.picture(netns), `address lo 127.0.0.1/8 flags 0x0
address lo ::1/128 flags 0x0
address net.7 10.0.0.2/25 flags 0x0
link lo  mtu 65536 up
link net.7 02:09:09:09:09:09 mtu 9000 up
route 0.0.0.0/0 via 10.0.0.5 dev net.7 table 254 metric 0 mtu 0
`)
	assert.Equal(t, b.sysctl(netns, "net.ipv4.conf.net/7.rp_filter"), "1")
	// Down, and small.
	r.Interfaces[0].Up, r.Interfaces[0].Mtu, r.Routes, r.Interfaces[0].Addresses = false, 68, nil, nil
	b.applyAll(r)
	assert.Assert(t, is.Contains(b.picture(netns), "link net.7 02:09:09:09:09:09 mtu 68 0\n"))
}

func TestLeavesWhatProgramsAdd(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	r := &agentv1.ApplyNetworkRequest{
		Id: "a", Interfaces: []*agentv1.Interface{iface(0, "eth0", "10.0.0.2/24")}, Routes: []*agentv1.Route{route("", "10.0.0.1", "eth0")},
	}
	b.applyAll(r)
	netns := b.open("a")
	b.inside(netns, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "tun7"
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		_, dst, _ := net.ParseCIDR("172.16.0.0/12")
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IP{10, 0, 5, 5}, Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.IP{10, 0, 0, 77}})
	})
	r.Interfaces[0].Addresses[0].PrefixLength = 16
	r.Routes = nil
	b.applyAll(r)
	picture := b.picture(netns)
	for _, text := range []string{"link tun7", "address eth0 10.0.5.5/24", "route 172.16.0.0/12 via 10.0.0.77", "address eth0 10.0.0.2/16"} {
		assert.Assert(t, is.Contains(picture, text))
	}
	assert.Assert(t, !strings.Contains(picture, "route 0.0.0.0/0"))
}

func TestProblems(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	nowhere := route("", "192.0.2.1", "eth0")
	unknown := route("10.5.0.0/16", "", "eth7")
	r := &agentv1.ApplyNetworkRequest{
		Id:         "a",
		Interfaces: []*agentv1.Interface{iface(0, "eth0", "10.0.0.2/24", "10.0.0.2/24")},
		Routes:     []*agentv1.Route{nowhere, unknown, route("10.6.0.0/16", "10.0.0.1", "eth0")},
		Neighbours: []*agentv1.Neighbour{{Interface: "eth7", Ip: ip("10.0.0.9"), Mac: device(9), State: unix.NUD_PERMANENT}},
		Sysctls:    map[string]string{"net.ipv4.no_such_thing": "1", "net.ipv4.ip_forward": "many"},
	}
	r.Interfaces[0].Mtu = 65535
	problems := b.apply(r)
	for i, prefix := range []string{
		"neighbour 10.0.0.9: there is no interface eth7",
		"route 10.5.0.0/16: there is no interface eth7",
		"sysctl net.ipv4.ip_forward: invalid argument",
		"sysctl net.ipv4.no_such_thing: no such file or directory",
		"route default via 192.0.2.1 dev eth0: network is unreachable",
	} {
		assert.Assert(t, len(problems) > i && strings.HasPrefix(problems[i], prefix), "%q", problems)
	}
	assert.Equal(t, len(problems), 5, "%q", problems)
	// The rest was applied.
	assert.Assert(t, is.Contains(b.picture(b.open("a")), "route 10.6.0.0/16 via 10.0.0.1"))
}

func TestProblemsAreBounded(t *testing.T) {
	b := newBench(t)
	r := &agentv1.ApplyNetworkRequest{Id: "a"}
	for range 4096 {
		r.Routes = append(r.Routes, route("10.5.0.0/16", "", "eth7"))
	}
	problems := b.apply(r)
	assert.Equal(t, len(problems), 65)
	assert.Equal(t, problems[64], "and 4032 more")
}

// A device that comes while Apply waits is taken, one that does not come is told.
func TestWaitsForDevices(t *testing.T) {
	b := newBench(t)
	r := &agentv1.ApplyNetworkRequest{Id: "a", Interfaces: []*agentv1.Interface{iface(0, "eth0", "10.0.0.2/24"), iface(1, "eth1", "10.1.0.2/24")}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- errors.Join(b.tryPlug(0), b.tryPlug(1))
	}()
	resp, err := b.Apply(ctx, r)
	assert.NilError(t, err)
	assert.NilError(t, <-done)
	assert.DeepEqual(t, resp.Problems, []string(nil))

	r.Interfaces = append(r.Interfaces, iface(2, "eth2", "10.2.0.2/24"))
	r.Routes = []*agentv1.Route{route("10.5.0.0/16", "10.2.0.1", "eth2"), route("10.6.0.0/16", "10.1.0.1", "eth1")}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	resp, err = b.Apply(ctx, r)
	assert.NilError(t, err)
	assert.DeepEqual(t, resp.Missing, []string{"eth2"})
	assert.DeepEqual(t, resp.Problems, []string{"eth2: wait for device 52:54:00:00:00:02: it has not appeared"})
	assert.Assert(t, is.Contains(b.picture(b.open("a")), "route 10.6.0.0/16 via 10.1.0.1 dev eth1"))
}

// A device that was unplugged and plugged again is a new one to the kernel.
func TestReplug(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	b.plug(1)
	b.applyAll(full())
	netns := b.open("a")
	for range 3 {
		b.unplug(netns, 0)
		b.plug(0)
		b.applyAll(full())
		assert.Equal(t, b.picture(netns), fullPicture)
	}
	b.unplug(netns, 1)
	b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a", Interfaces: full().Interfaces[:1]})
}

func TestUsers(t *testing.T) {
	b := newBench(t)
	_, err := b.Open("a")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	b.Release("a")
	b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a"})
	for range 2 {
		netns, err := b.Open("a")
		assert.NilError(t, err)
		netns.Close()
	}
	err = b.Remove(t.Context(), "a")
	assert.Assert(t, errdefs.IsFailedPrecondition(err), "%v", err)
	b.Release("a")
	err = b.Remove(t.Context(), "a")
	assert.Assert(t, errdefs.IsFailedPrecondition(err), "%v", err)
	b.Release("a")
	b.Release("a")
	assert.NilError(t, b.Remove(t.Context(), "a"))
}

func TestAdopt(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	b.plug(1)
	b.applyAll(full())
	old, err := b.Open("a")
	assert.NilError(t, err)
	defer old.Close()
	netns, err := network.NewNetNS()
	assert.NilError(t, err)
	defer netns.Close()
	assert.NilError(t, b.Adopt(t.Context(), "a", netns))
	assert.Equal(t, b.picture(netns), fullPicture)
	assert.Assert(t, !strings.Contains(b.picture(old), "eth"))
	b.applyAll(full())
	assert.Equal(t, b.picture(netns), fullPicture)

	file, err := os.Open("/dev/null")
	assert.NilError(t, err)
	defer file.Close()
	err = b.Adopt(t.Context(), "a", file)
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	other, err := b.Open("a")
	assert.NilError(t, err)
	defer other.Close()
	err = b.Adopt(t.Context(), "a", old)
	assert.Assert(t, errdefs.IsFailedPrecondition(err), "%v", err)
	assert.ErrorContains(t, err, "network a: adopt namespace: 1 other containers")
	err = b.Adopt(t.Context(), "nothing", old)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	b.Release("a")
	b.Release("a")
}

// Devices go from one network to another when the first has given them up.
func TestTwoNetworks(t *testing.T) {
	b := newBench(t)
	b.plug(0)
	r := &agentv1.ApplyNetworkRequest{Id: "a", Interfaces: []*agentv1.Interface{iface(0, "eth0", "10.0.0.2/24")}}
	b.applyAll(r)
	b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a"})
	r.Id = "b"
	b.applyAll(r)
	assert.Assert(t, is.Contains(b.picture(b.open("b")), "address eth0 10.0.0.2/24"))
	assert.Equal(t, b.picture(b.open("a")), bare)
}
