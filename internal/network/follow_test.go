package network_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"gotest.tools/v3/assert"
	"pgregory.net/rapid"

	agentv1 "runv/api/agent/v1"
	"runv/internal/hypervisor"
	"runv/internal/network"
)

func (r *rig) hasAddress(name, ip string) bool {
	return slices.ContainsFunc(r.guest.find(name).GetAddresses(), func(a *agentv1.Address) bool {
		return slices.Equal(a.Ip, bytesOf(ip))
	})
}

func (r *rig) hasRoute(destination string) bool {
	return slices.ContainsFunc(r.guest.request().GetRoutes(), func(a *agentv1.Route) bool {
		return slices.Equal(a.Destination, bytesOf(destination))
	})
}

func TestChangesAreFollowed(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	before := state(t, ns)
	r := start(t, ns, nil)
	device := r.guest.find("eth0").DeviceMac
	for _, c := range []struct {
		name, script string
		done         func() bool
	}{
		{"address", "ip addr add 10.1.0.3/24 dev eth0", func() bool { return r.hasAddress("eth0", "10.1.0.3") }},
		{"address gone", "ip addr del 10.1.0.3/24 dev eth0", func() bool { return !r.hasAddress("eth0", "10.1.0.3") }},
		{"address of IPv6", "ip addr add fd00:1::3/64 dev eth0", func() bool { return r.hasAddress("eth0", "fd00:1::3") }},
		{"route", "ip route add 10.7.0.0/16 via 10.1.0.1", func() bool { return r.hasRoute("10.7.0.0") }},
		{"route gone", "ip route del 10.7.0.0/16", func() bool { return !r.hasRoute("10.7.0.0") }},
		{"rule", "ip rule add to 10.8.0.0/16 table 9", func() bool { return len(r.guest.request().Rules) == 1 }},
		{"rule gone", "ip rule del to 10.8.0.0/16 table 9", func() bool { return len(r.guest.request().Rules) == 0 }},
		{"neighbour", "ip neigh add 10.1.0.7 lladdr 02:00:00:00:00:07 dev eth0", func() bool { return len(r.guest.request().Neighbours) == 1 }},
		{"neighbour that may expire", "ip neigh change 10.1.0.7 nud stale dev eth0", func() bool { return len(r.guest.request().Neighbours) == 0 }},
		{"parameter", "sysctl -q net.ipv4.ip_forward=1", func() bool { return r.guest.request().Sysctls["net.ipv4.ip_forward"] == "1" }},
		{"parameter as before", "sysctl -q net.ipv4.ip_forward=0", func() bool { return r.guest.request().Sysctls["net.ipv4.ip_forward"] == "0" }},
		{"MTU", "ip link set eth0 mtu 9000", func() bool { return r.guest.find("eth0").GetMtu() == 9000 }},
		{"name", "ip link set eth0 name eth7", func() bool { return r.guest.find("eth7") != nil && r.guest.find("eth0") == nil }},
		{"down", "ip link set eth7 down", func() bool { return !r.guest.find("eth7").GetUp() }},
		{"MAC", "ip link set eth7 address 02:00:00:00:00:55", func() bool { return r.guest.find("eth7").GetMac()[5] == 0x55 }},
		{"up", "ip link set eth7 up arp off allmulticast on", func() bool {
			f := r.guest.find("eth7")
			return f.GetUp() && !f.Arp && f.Allmulti && r.hasAddress("eth7", "10.1.0.2")
		}},
		{"IPv6 disabled", "sysctl -q net.ipv6.conf.eth7.disable_ipv6=1", func() bool {
			return !r.hasAddress("eth7", "fd00:1::2") && r.guest.request().Sysctls["net.ipv6.conf.eth7.disable_ipv6"] == "1"
		}},
	} {
		run(t, ns, c.script)
		r.await(t, c.name, c.done)
	}
	assert.DeepEqual(t, r.guest.find("eth7").DeviceMac, device)
	assert.Equal(t, r.vm.count(), 1)

	veth(t, ns, "eth1", peer, "out1")
	r.await(t, "interface", func() bool { return len(r.guest.names()) == 2 })
	assert.Equal(t, r.vm.count(), 2)
	first := r.guest.find("eth1").DeviceMac
	run(t, ns, "ip link del eth1")
	veth(t, ns, "eth1", peer, "out1")
	r.await(t, "interface made anew", func() bool {
		f := r.guest.find("eth1")
		return f != nil && !slices.Equal(f.DeviceMac, first) && r.vm.count() == 2
	})
	run(t, ns, "ip link del eth1")
	r.await(t, "interface gone", func() bool { return len(r.guest.names()) == 1 && r.vm.count() == 1 })

	run(t, ns, `ip link set eth7 down
		ip link set eth7 arp on allmulticast off mtu 1500
		ip link set eth7 name eth0
		ip link set eth0 address 02:00:00:00:00:01 up`)
	assert.NilError(t, r.Sync(context.Background()))
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
}

func TestSyncSeesWhatWasChangedBefore(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	r := start(t, ns, nil)
	for i := range 10 {
		run(t, ns, fmt.Sprintf("ip addr add 10.1.1.%d/24 dev eth0", i))
		assert.NilError(t, r.Sync(context.Background()))
		assert.Assert(t, r.hasAddress("eth0", fmt.Sprintf("10.1.1.%d", i)))
	}
}

func TestBurstsAreCoalesced(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	r := start(t, ns, nil)
	before := r.guest.applies
	run(t, ns, "for i in $(seq 2000); do echo addr add 10.2.$((i / 250)).$((i % 250))/32 dev eth0; echo route add 10.3.$((i / 250)).$((i % 250)) dev eth0; done | ip -batch -")
	r.await(t, "the last address", func() bool { return len(r.guest.request().Routes) == 2000 })
	assert.Equal(t, len(r.guest.find("eth0").Addresses), 1024) // as many as a message may have
	assert.Assert(t, r.guest.applies-before < 100, "%d requests", r.guest.applies-before)
}

func TestLostMessages(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	heard, end, err := network.Overflow(ns, func() {
		run(t, ns, "for i in $(seq 200); do echo addr add 10.2.0.$i/32 dev eth0; done | ip -batch -")
	})
	assert.NilError(t, err)
	for i := range 3 {
		<-heard
		run(t, ns, fmt.Sprintf("ip addr add 10.3.0.%d/32 dev eth0", i))
	}
	<-heard
	assert.NilError(t, end())
}

func TestListensAnew(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	r := start(t, ns, nil)
	for i := range 3 {
		assert.NilError(t, r.Deafen())
		run(t, ns, fmt.Sprintf("ip addr add 10.1.1.%d/24 dev eth0", i))
		r.await(t, "address", func() bool { return r.hasAddress("eth0", fmt.Sprintf("10.1.1.%d", i)) })
	}
}

// As CNI's ptp plugin does.
func TestAddressWithoutItsRoute(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	run(t, ns, `ip route del 10.1.0.0/24 dev eth0
		ip route add 10.1.0.1 dev eth0 src 10.1.0.2
		ip route add 10.1.0.0/24 via 10.1.0.1 src 10.1.0.2
		ip -6 route del fd00:1::/64 dev eth0`)
	r := start(t, ns, nil)
	for _, a := range r.guest.find("eth0").Addresses {
		assert.Equal(t, a.Flags&unix.IFA_F_NOPREFIXROUTE != 0, a.Scope == unix.RT_SCOPE_UNIVERSE, a)
	}
}

func TestGuestThatDoesNotAnswer(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before := state(t, ns)
	r := start(t, ns, nil)
	asked := make(chan struct{}, 1)
	r.guest.mu.Lock()
	r.guest.onApply = func(ctx context.Context) error {
		select {
		case asked <- struct{}{}:
		default:
		}
		<-ctx.Done()
		return context.Cause(ctx)
	}
	r.guest.mu.Unlock()
	run(t, ns, "ip addr add 10.1.0.3/24 dev eth0")
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	assert.ErrorIs(t, r.Sync(ctx), context.DeadlineExceeded)
	begin := time.Now()
	assert.NilError(t, r.Close(t.Context()))
	assert.Assert(t, time.Since(begin) < 5*time.Second)
	assert.Equal(t, state(t, ns), before)
	err := r.Sync(t.Context())
	assert.Assert(t, errdefs.IsFailedPrecondition(err), err)
}

// A guest that keeps a card keeps nobody from going on.
func TestCardThatIsNotLetGo(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	before := state(t, ns)
	r := start(t, ns, nil)
	veth(t, ns, "eth1", peer, "out1")
	assert.NilError(t, r.Sync(t.Context()))
	letGo := make(chan struct{})
	r.vm.mu.Lock()
	r.vm.onDetach = func(ctx context.Context, _ string) error {
		select {
		case <-letGo:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	r.vm.mu.Unlock()
	for i := range 3 {
		run(t, ns, "ip link del eth1")
		assert.NilError(t, r.Sync(t.Context()))
		assert.DeepEqual(t, r.guest.names(), []string{"eth0"})
		veth(t, ns, "eth1", peer, "out1")
		assert.NilError(t, r.Sync(t.Context()))
		assert.DeepEqual(t, r.guest.names(), []string{"eth0", "eth1"})
		assert.Equal(t, r.vm.count(), 3+i)
	}
	close(letGo)
	r.await(t, "the end of the cards", func() bool { return r.vm.count() == 2 })
	run(t, ns, "ip link del eth1")
	assert.NilError(t, r.Close(t.Context()))
	assert.Equal(t, r.vm.count(), 0)
	assert.Equal(t, state(t, ns), before)
}

// Whenever a mirror is closed, it leaves nothing, whatever happens to the namespace meanwhile.
func TestCloseAtAnyTime(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before, open := state(t, ns), files(t)
	stop := t.TempDir() + "/stop"
	storm := exec.Command("sh", "-c", `while [ ! -e "$0" ]; do
		ip link add eth1 type veth peer name eth2
		ip link set eth1 up
		ip addr add 10.2.0.1/24 dev eth1
		ip link set eth1 name eth3
		ip link del eth3
	done`, stop)
	assert.NilError(t, ns.Do(storm.Start))
	end := func() error { return errors.Join(os.WriteFile(stop, nil, 0o600), storm.Wait()) }
	defer func() {
		if t.Failed() {
			_ = end()
		}
	}()
	for round := range 40 {
		r := newRig(t, ns, func(c *network.Config) { c.Log = slog.New(slog.DiscardHandler) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+round*3)*time.Millisecond)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if r.Start(ctx, r.vm, r.guest) == nil {
				_ = r.Sync(ctx)
			}
		}()
		<-ctx.Done()
		cancel()
		assert.NilError(t, r.Close(t.Context()))
		<-done
		assert.Equal(t, r.vm.count(), 0)
	}
	assert.NilError(t, end())
	_, _ = try(ns, "ip link del eth1; ip link del eth3")
	assert.Equal(t, state(t, ns), before)
	assert.Equal(t, files(t), open)
}

// A namespace that nobody else holds lives as long as the mirror, and no longer.
func TestNamespaceThatNobodyHolds(t *testing.T) {
	peer := newNamespace(t)
	var r *rig
	t.Run("mirrored", func(t *testing.T) {
		ns := newNamespace(t)
		veth(t, ns, "eth0", peer, "out")
		r = start(t, ns, nil)
	})
	r.await(t, "end of the namespace", func() bool {
		out, err := try(peer, "ip -o link")
		return err == nil && !strings.Contains(out, "out@")
	})
}

// Whoever takes our qdisc away takes the guest's network away.
func TestRepair(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	r := start(t, ns, nil)
	whole := state(t, ns)
	run(t, ns, "tc qdisc del dev eth0 ingress")
	r.await(t, "redirection", func() bool { return state(t, ns) == whole })
	run(t, ns, "tc filter del dev $(ip -o link | grep -o 'rv-[0-9a-f]*') ingress")
	r.await(t, "redirection of the tap", func() bool { return state(t, ns) == whole })
	run(t, ns, "ip link set $(ip -o link | grep -o 'rv-[0-9a-f]*') down")
	r.await(t, "tap", func() bool { return state(t, ns) == whole })

	device := r.guest.find("eth0").DeviceMac
	run(t, ns, "ip link del $(ip -o link | grep -o 'rv-[0-9a-f]*')")
	r.await(t, "another tap", func() bool {
		f := r.guest.find("eth0")
		return f != nil && !slices.Equal(f.DeviceMac, device) && r.vm.count() == 1
	})
	ask(t, peer, "10.1.0.2")
	next(t, tapOf(t, r, "eth0"), func(f []byte) bool { return f[12] == 8 && f[13] == 6 }) // ARP
}

// An interface that goes to another namespace and back is the same to nobody but us: its qdiscs are gone.
func TestInterfaceThatWentAway(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	r := start(t, ns, nil)
	elsewhere := newNamespace(t)
	move(t, ns, elsewhere, "eth0")
	r.await(t, "none", func() bool { return len(r.guest.names()) == 0 && r.vm.count() == 0 })
	move(t, elsewhere, ns, "eth0")
	r.await(t, "one", func() bool { return len(r.guest.names()) == 1 })
	elsewhere2 := newNamespace(t)
	move(t, ns, elsewhere2, "eth0")
	move(t, elsewhere2, ns, "eth0")
	run(t, ns, "ip link set eth0 up")
	assert.NilError(t, r.Sync(context.Background()))
	assert.Equal(t, r.guest.find("eth0").GetUp(), true)
	tapOf(t, r, "eth0")
}

func TestFiftyInterfaces(t *testing.T) {
	ns := newNamespace(t)
	peer := newNamespace(t)
	for i := range 50 {
		veth(t, ns, fmt.Sprintf("eth%d", i), peer, fmt.Sprintf("out%d", i))
		run(t, ns, fmt.Sprintf("ip addr add 10.1.0.2/24 dev eth%d; ip link set eth%d up", i, i)) // all the same
	}
	before, open := state(t, ns), files(t)
	r := start(t, ns, nil)
	assert.Equal(t, len(r.guest.names()), 50)
	assert.Equal(t, r.vm.count(), 50)
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
	assert.Equal(t, files(t), open)
}

func TestFailuresAreTriedAgain(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	r := start(t, ns, nil)
	attempts := 0
	r.vm.mu.Lock()
	r.vm.onAttach = func(hypervisor.NIC) error {
		if attempts++; attempts < 3 {
			return errTest
		}
		return nil
	}
	r.vm.mu.Unlock()
	veth(t, ns, "eth1", peer, "out1")
	run(t, ns, "ip addr add 10.1.0.3/24 dev eth0")
	r.await(t, "the others meanwhile", func() bool { return r.hasAddress("eth0", "10.1.0.3") })
	r.await(t, "the interface", func() bool { return r.guest.find("eth1") != nil })

	r.guest.mu.Lock()
	r.guest.hidden = "eth1"
	r.guest.mu.Unlock()
	run(t, ns, "ip addr add 10.1.0.4/24 dev eth0")
	r.await(t, "attempts", func() bool { return r.hasAddress("eth0", "10.1.0.4") })
	contains(t, r.Sync(context.Background()), "network: eth1: the guest has no such device")
	r.guest.mu.Lock()
	applies := r.guest.applies
	r.guest.hidden = ""
	r.guest.mu.Unlock()
	r.await(t, "another", func() bool { r.guest.mu.Lock(); defer r.guest.mu.Unlock(); return r.guest.applies > applies })
	assert.NilError(t, r.Sync(context.Background()))
}

// An interface can vanish at each step.
func TestInterfaceVanishesWhileItIsPlugged(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	run(t, ns, "ip link add eth1 type veth peer name eth2")
	r := newRig(t, ns, nil)
	attached := 0
	r.vm.onAttach = func(hypervisor.NIC) error {
		if attached++; attached == 1 {
			return nil
		}
		run(t, ns, "ip link del eth1")
		return errTest
	}
	assert.NilError(t, r.Start(context.Background(), r.vm, r.guest))
	assert.DeepEqual(t, r.guest.names(), []string{"eth0"})
}

func TestInterfacesThatAreNotMirrored(t *testing.T) {
	ns := newNamespace(t)
	peer := pair(t, ns)
	veth(t, ns, "port0", peer, "out1")
	run(t, ns, `ip link add br0 type bridge
		ip link set port0 master br0
		ip link add mv0 link eth0 type macvlan
		ip link add $(printf 'no\377utf8') type veth peer name plain
		ip link add vx0 type vxlan id 3 dstport 4789
		ip link add ifb9 type ifb
		ip tuntap add tun0 mode tun
		ip link set tun0 up
		ip addr add 10.9.0.1/24 dev tun0
		ip route add 10.10.0.0/16 dev tun0`)
	r := start(t, ns, nil)
	names := r.guest.names()
	slices.Sort(names)
	assert.DeepEqual(t, names, []string{"br0", "eth0", "plain", "vx0"})
	assert.Equal(t, len(r.guest.request().Routes), 0)
}

func TestMacvlan(t *testing.T) {
	ns, below := newNamespace(t), newNamespace(t)
	peer := pair(t, below)
	run(t, below, "ip link set eth0 address 02:00:00:00:00:77; ip link add mv0 link eth0 type macvlan mode bridge; ip link add mv1 link eth0 type macvtap")
	move(t, below, ns, "mv0")
	move(t, below, ns, "mv1")
	run(t, ns, "ip link set mv0 address 02:00:00:00:00:01; ip addr add 10.1.0.2/24 dev mv0; ip link set mv0 up; ip link set mv1 up")
	before := state(t, ns)
	r := start(t, ns, nil)
	assert.DeepEqual(t, r.guest.names(), []string{"mv0", "mv1"})
	tap, wire := tapOf(t, r, "mv0"), sniff(t, peer, "out")
	frame := ipv4(macOf(t, peer, "out"), unix.IPPROTO_UDP, udp(9, 7000, []byte("through the macvlan")), 6)
	send(t, tap, header{flags: needsCsum, csumStart: 34, csumOffs: 6}, frame)
	next(t, wire, func(f []byte) bool { return slices.Equal(f[:14], frame[:14]) })
	// To a group that only the guest knows of.
	group := slices.Concat([]byte{1, 0, 0x5e, 1, 2, 3}, macOf(t, peer, "out"), frame[12:])
	send(t, wire, header{}, group)
	next(t, tap, func(f []byte) bool { return slices.Equal(f[:6], group[:6]) })
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
}

// Whatever is done to a namespace, in the end the guest has what a mirror that begins then sees.
func TestRandomChanges(t *testing.T) {
	needRoot(t)
	const devices = 4
	actions := []string{
		"ip link add eth%[1]d type veth peer name p%[1]d",
		"ip link del eth%[1]d",
		"ip link set eth%[1]d up",
		"ip link set eth%[1]d up; ip link set p%[1]d up",
		"ip link set eth%[1]d down",
		"ip link set eth%[1]d mtu %[2]d",
		"ip link set eth%[1]d down; ip link set eth%[1]d name eth%[3]d",
		"ip link set eth%[1]d address 02:00:00:00:01:%02[3]d",
		"ip addr add 10.%[1]d.0.%[3]d/24 dev eth%[1]d",
		"ip addr del 10.%[1]d.0.%[3]d/24 dev eth%[1]d",
		"ip addr add fd00:%[1]d::%[3]d/64 dev eth%[1]d",
		"ip addr flush dev eth%[1]d",
		"ip route add 10.9.%[3]d.0/24 via 10.%[1]d.0.9",
		"ip route add 10.9.%[3]d.0/24 dev eth%[1]d table 7 metric %[2]d",
		"ip route flush table 7",
		"ip rule add from 10.%[1]d.0.%[3]d table 7",
		"ip rule del from 10.%[1]d.0.%[3]d table 7",
		"ip neigh replace 10.%[1]d.0.7 lladdr 02:00:00:00:00:%02[3]d dev eth%[1]d",
		"ip neigh del 10.%[1]d.0.7 dev eth%[1]d",
		"sysctl -q net.ipv6.conf.eth%[1]d.disable_ipv6=1",
		"sysctl -q net.ipv4.conf.eth%[1]d.rp_filter=%[3]d",
		"tc qdisc del dev eth%[1]d ingress",
	}
	ns := newNamespace(t)
	before, open := state(t, ns), files(t)
	r := start(t, ns, nil)
	rapid.Check(t, func(rt *rapid.T) {
		script := ""
		for range rapid.IntRange(1, 12).Draw(rt, "length") {
			action := rapid.SampledFrom(actions).Draw(rt, "action")
			// %! of arguments that are not used is a comment for the shell.
			script += fmt.Sprintf("("+action+") 2>/dev/null || true # %[1]d %[2]d %[3]d\n",
				rapid.IntRange(0, devices-1).Draw(rt, "device"), rapid.IntRange(1280, 9000).Draw(rt, "mtu"), rapid.IntRange(0, devices-1).Draw(rt, "n"))
		}
		if out, err := try(ns, script); err != nil {
			rt.Fatal(err, out)
		}
		// The kernel makes link-local addresses when it gets round to it.
		deadline := time.Now().Add(10 * time.Second)
		err := r.compare()
		for ; err != nil && time.Now().Before(deadline); err = r.compare() {
		}
		if err != nil {
			rt.Fatal(err)
		}
	})
	run(t, ns, `for i in 0 1 2 3; do ip link del eth$i 2>/dev/null || true; done; ip rule flush table 7 || true; ip route flush table 7 || true`)
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
	assert.Equal(t, files(t), open)
}

// compare syncs, and tells how what the guest has differs from what it should have.
func (r *rig) compare() error {
	if err := r.Sync(context.Background()); err != nil {
		return err
	}
	if err := r.Check(); err != nil {
		return err
	}
	got := proto.CloneOf(r.guest.request())
	devices := make(map[string][]byte)
	for _, f := range got.Interfaces {
		devices[f.Name] = f.DeviceMac
		if _, ok := r.vm.card(f.DeviceMac); !ok {
			return fmt.Errorf("%s has no card", f.Name)
		}
	}
	if len(devices) != r.vm.count() {
		return fmt.Errorf("%d interfaces, %d cards", len(devices), r.vm.count())
	}
	want, err := network.Scan(r.ns, "net0", devices)
	if err != nil {
		return err
	}
	for key, value := range want.Sysctls {
		if got.Sysctls[key] != value {
			return fmt.Errorf("%s is %q, not %q", key, got.Sysctls[key], value)
		}
	}
	got.Sysctls, want.Sysctls = nil, nil
	if !proto.Equal(got, want) {
		return fmt.Errorf("the guest has\n%v\nand not\n%v", got, want)
	}
	return nil
}
