package network_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/hypervisor"
	"runv/internal/network"
)

func TestStartTellsTheGuestWhatThereIs(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	run(t, ns, `ip route add default via 10.1.0.1 metric 7
		ip -6 route add default via fd00:1::1
		ip neigh add 10.1.0.9 lladdr 02:00:00:00:00:99 dev eth0
		ip neigh add proxy 10.1.0.8 dev eth0
		ip rule add from 10.1.0.2 fwmark 5 table 100 priority 50
		ip rule add suppress_prefixlength 0 table main priority 51
		ip route add 10.2.0.0/16 dev eth0 table 100 src 10.1.0.2 mtu 1300
		ip route add blackhole 10.3.0.0/16
		ip route add 10.4.0.0/16 via 192.168.0.1 dev eth0 onlink
		ip addr add 10.9.9.9/32 dev lo
		ip link set eth0 txqueuelen 500
		ip link add eth1.5 type veth peer name other
		sysctl -q net.ipv6.conf.eth0.accept_redirects=0 net.ipv4.conf.eth1/5.rp_filter=2 net.ipv4.ip_forward=1`)
	before := state(t, ns)
	open := files(t)
	r := start(t, ns, nil)
	got := r.guest.request()
	eth0 := r.guest.find("eth0")
	address := func(ip string, length uint32, more func(*agentv1.Address)) *agentv1.Address {
		a := &agentv1.Address{Ip: bytesOf(ip), PrefixLength: length}
		if more != nil {
			more(a)
		}
		return a
	}
	assert.DeepEqual(t, eth0, &agentv1.Interface{
		DeviceMac: eth0.DeviceMac, Name: "eth0", Mac: guestMAC, Mtu: 1500, Up: true, Arp: true, TxQueueLength: 500,
		Addresses: []*agentv1.Address{
			address("10.1.0.2", 24, func(a *agentv1.Address) { a.Broadcast, a.Label = bytesOf("10.1.0.255"), "eth0" }),
			address("fe80::ff:fe00:1", 64, func(a *agentv1.Address) { a.Scope = unix.RT_SCOPE_LINK }),
			address("fd00:1::2", 64, func(a *agentv1.Address) { a.Flags = unix.IFA_F_NODAD }),
		},
	}, protocmp.Transform())
	assert.Assert(t, eth0.DeviceMac[0]&3 == 2, "not a unicast address that is administered locally: %x", eth0.DeviceMac)
	assert.DeepEqual(t, r.guest.names(), []string{"lo", "eth0", "other", "eth1.5"})
	assert.DeepEqual(t, r.guest.find("lo").Addresses, []*agentv1.Address{
		address("10.9.9.9", 32, func(a *agentv1.Address) { a.Label = "lo" }),
	}, protocmp.Transform())
	assert.DeepEqual(t, got.Routes, []*agentv1.Route{
		{
			Family: unix.AF_INET, Destination: bytesOf("10.2.0.0"), PrefixLength: 16, Source: bytesOf("10.1.0.2"), Table: 100,
			Scope: unix.RT_SCOPE_LINK, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_BOOT, Metrics: map[uint32]uint32{unix.RTAX_MTU: 1300}, NextHops: hops("eth0", "", 0),
		},
		{
			Family: unix.AF_INET, Destination: bytesOf("10.3.0.0"), PrefixLength: 16, Table: unix.RT_TABLE_MAIN,
			Type: unix.RTN_BLACKHOLE, Protocol: unix.RTPROT_BOOT,
		},
		{
			Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Priority: 7, Type: unix.RTN_UNICAST,
			Protocol: unix.RTPROT_BOOT, NextHops: hops("eth0", "10.1.0.1", 0),
		},
		{
			Family: unix.AF_INET, Destination: bytesOf("10.4.0.0"), PrefixLength: 16, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST,
			Protocol: unix.RTPROT_BOOT, NextHops: hops("eth0", "192.168.0.1", unix.RTNH_F_ONLINK),
		},
		{
			Family: unix.AF_INET6, Table: unix.RT_TABLE_MAIN, Priority: 1024, Type: unix.RTN_UNICAST,
			Protocol: unix.RTPROT_BOOT, NextHops: hops("eth0", "fd00:1::1", 0),
		},
	}, protocmp.Transform())
	assert.DeepEqual(t, got.Neighbours, []*agentv1.Neighbour{
		{Interface: "eth0", Ip: bytesOf("10.1.0.8"), Flags: 8},
		{Interface: "eth0", Ip: bytesOf("10.1.0.9"), Mac: []byte{2, 0, 0, 0, 0, 0x99}, State: unix.NUD_PERMANENT},
	}, protocmp.Transform())
	assert.DeepEqual(t, got.Rules, []*agentv1.Rule{{
		Family: unix.AF_INET, Priority: 50, Source: bytesOf("10.1.0.2"), SourceLength: 32, Mark: 5, Mask: 0xffffffff, Table: 100,
		Action: unix.FR_ACT_TO_TBL,
	}}, protocmp.Transform())
	assert.DeepEqual(t, got.Sysctls, map[string]string{
		"net.ipv4.conf.all.accept_redirects": "0", // comes with the next
		"net.ipv4.ip_forward":                "1", "net.ipv6.conf.eth0.accept_redirects": "0", "net.ipv4.conf.eth1/5.rp_filter": "2",
	})

	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
	assert.Equal(t, files(t), open)
	assert.Assert(t, r.guest.removed)
	assert.NilError(t, r.Close(context.Background()))
}

func TestPrepareDoesWhatNeedsNoVM(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before := state(t, ns)
	r := newRig(t, ns, nil)
	assert.NilError(t, r.Prepare(context.Background(), nil))
	assert.Equal(t, len(r.records), 1)
	run(t, ns, "ip link add eth1 type veth peer name other") // by a hook, meanwhile
	assert.NilError(t, r.Start(context.Background(), r.vm, r.guest))
	assert.DeepEqual(t, r.guest.names(), []string{"eth0", "other", "eth1"})
	assert.Equal(t, r.guest.applies, 1)
	run(t, ns, "ip link del eth1")
	assert.NilError(t, r.Sync(context.Background()))
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
}

func TestPrepareWhileTheGuestBoots(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before := state(t, ns)
	r := newRig(t, ns, nil)
	assert.NilError(t, r.Prepare(t.Context(), r.vm))
	assert.Equal(t, r.vm.count(), 1)
	assert.Equal(t, r.guest.applies, 0)
	assert.NilError(t, r.Start(t.Context(), r.vm, r.guest))
	assert.Equal(t, r.vm.count(), 1)
	assert.DeepEqual(t, r.guest.names(), []string{"eth0"})
	assert.NilError(t, r.Close(t.Context()))
	assert.Equal(t, r.vm.count(), 0)
	assert.Equal(t, state(t, ns), before)
}

func TestCloseAfterPrepare(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before, open := state(t, ns), files(t)
	r := newRig(t, ns, nil)
	assert.NilError(t, r.Prepare(context.Background(), nil))
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
	assert.Equal(t, files(t), open)
	err := r.Start(context.Background(), r.vm, r.guest)
	assert.Assert(t, errdefs.IsFailedPrecondition(err), err)
}

func TestStartFails(t *testing.T) {
	for _, c := range []struct {
		name, text string
		spoil      func(*rig)
	}{
		{"attach", "network: eth0: attach NIC: no more slots", func(r *rig) {
			r.vm.onAttach = func(hypervisor.NIC) error { return errTest }
		}},
		{"apply", "network: tell the guest: no more slots", func(r *rig) { r.guest.err = errTest }},
		{"missing", "network: eth0: the guest has no such device", func(r *rig) { r.guest.hidden = "eth0" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := newNamespace(t)
			pair(t, ns)
			before, open := state(t, ns), files(t)
			r := newRig(t, ns, nil)
			c.spoil(r)
			contains(t, r.Start(context.Background(), r.vm, r.guest), c.text)
			assert.NilError(t, r.Close(context.Background()))
			assert.Equal(t, state(t, ns), before)
			assert.Equal(t, files(t), open)
		})
	}
	t.Run("save", func(t *testing.T) {
		ns := newNamespace(t)
		pair(t, ns)
		before := state(t, ns)
		r := newRig(t, ns, func(c *network.Config) { c.Save = func(network.Record) error { return errTest } })
		contains(t, r.Start(context.Background(), r.vm, r.guest), "network: save record: no more slots")
		assert.Equal(t, state(t, ns), before)
	})
	t.Run("canceled", func(t *testing.T) {
		ns := newNamespace(t)
		pair(t, ns)
		before := state(t, ns)
		r := newRig(t, ns, nil)
		ctx, cancel := context.WithCancel(context.Background())
		r.vm.onAttach = func(hypervisor.NIC) error { cancel(); return ctx.Err() }
		assert.ErrorIs(t, r.Start(ctx, r.vm, r.guest), context.Canceled)
		assert.NilError(t, r.Close(context.Background()))
		assert.Equal(t, state(t, ns), before)
	})
}

func TestProblemsOfTheGuestAreLogged(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	var log bytes.Buffer
	r := newRig(t, ns, func(c *network.Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	r.guest.problems = []string{"route 10.0.0.0/8: network is unreachable", "\x1b[2J\n\xff" + strings.Repeat("x", 1<<20)}
	for range 1000 {
		r.guest.problems = append(r.guest.problems, fmt.Sprint("one more ", len(r.guest.problems)))
	}
	assert.NilError(t, r.Start(t.Context(), r.vm, r.guest))
	run(t, ns, "ip addr add 10.1.0.3/24 dev eth0")
	assert.NilError(t, r.Sync(t.Context())) // the same again, which is no news
	assert.NilError(t, r.Close(t.Context()))
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	assert.Equal(t, len(lines), 32)
	assert.Assert(t, strings.Contains(log.String(), `problem="guest: route 10.0.0.0/8: network is unreachable"`))
	for _, l := range lines {
		assert.Assert(t, len(l) < 500 && !strings.Contains(l, "\x1b"), l)
	}
}

func TestNamespaceOfAnotherMirror(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	start(t, ns, nil)
	before := state(t, ns)
	second := newRig(t, ns, nil)
	err := second.Prepare(context.Background(), nil)
	assert.Assert(t, errdefs.IsAlreadyExists(err), err)
	assert.NilError(t, second.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
}

func TestSomebodyElsesFiltersStay(t *testing.T) {
	for name, qdisc := range map[string]string{"ingress": "ingress", "clsact": "clsact"} {
		t.Run(name, func(t *testing.T) {
			ns := newNamespace(t)
			peer := pair(t, ns)
			run(t, ns, "tc qdisc add dev eth0 "+qdisc)
			before := state(t, ns)
			r := start(t, ns, nil)
			_, err := listenUDP(t, peer, "10.1.0.1:7000").WriteTo([]byte("x"), &agentIP)
			assert.NilError(t, err)
			next(t, tapOf(t, r, "eth0"), func(f []byte) bool { return f[12] == 8 && f[13] == 6 })
			assert.NilError(t, r.Close(context.Background()))
			assert.Equal(t, state(t, ns), before)
		})
	}
	t.Run("added later", func(t *testing.T) {
		ns := newNamespace(t)
		pair(t, ns)
		r := start(t, ns, nil)
		run(t, ns, "tc filter add dev eth0 ingress protocol ip prio 9 u32 match u32 0 0 classid 1:1")
		assert.NilError(t, r.Close(context.Background()))
		out := state(t, ns)
		assert.Assert(t, strings.Contains(out, "pref 9 ") && !strings.Contains(out, "mirred"), out)
	})
}

func TestCloseOfADeadVM(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before := state(t, ns)
	r := start(t, ns, nil)
	r.vm.kill()
	r.guest.err = errTest
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
}

func TestCloseOfAGuestThatDoesNotLetGo(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before := state(t, ns)
	r := start(t, ns, nil)
	r.vm.onDetach = func(context.Context, string) error { return context.DeadlineExceeded }
	assert.ErrorContains(t, r.Close(context.Background()), "network: eth0: detach NIC: ")
	assert.Equal(t, state(t, ns), before)
	r.vm.kill()
	assert.NilError(t, r.Close(context.Background()))
}

func TestClean(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	before := state(t, ns)
	r := newRig(t, ns, nil)
	assert.NilError(t, r.Prepare(context.Background(), nil)) // and no more, as it would repair what Clean does
	record := r.records[len(r.records)-1]
	assert.Equal(t, record.Path, ns.Path())

	other := record
	other.Namespace.Ino++
	assert.NilError(t, network.Clean(other))
	other.Path = "/proc/self/ns/mnt"
	assert.NilError(t, network.Clean(other))
	other.Path = t.TempDir() + "/gone"
	assert.NilError(t, network.Clean(other))
	assert.NilError(t, network.Clean(network.Record{}))
	other = record
	other.Path = "relative"
	assert.Assert(t, errdefs.IsInvalidArgument(network.Clean(other)))
	assert.Assert(t, state(t, ns) != before)

	assert.NilError(t, network.Clean(record))
	// The sockets of a process that was killed are closed.
	assert.NilError(t, r.CloseSockets())
	assert.Equal(t, state(t, ns), before)
	assert.NilError(t, network.Clean(record))
	assert.Equal(t, state(t, ns), before)
	assert.NilError(t, r.Close(context.Background())) // with nothing left to do
	assert.Equal(t, state(t, ns), before)
}

func TestOpenRefuses(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	assert.NilError(t, unix.Mkfifo(dir+"/pipe", 0o600))
	for _, path := range []string{"/proc/self/ns/mnt", "/proc/self/ns/pid", dir, dir + "/pipe", "/dev/null", "/proc/self/cmdline"} {
		_, err := network.Open(path)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", path, err)
	}
	_, err := network.Open(dir + "/gone")
	assert.Assert(t, errdefs.IsNotFound(err), err)
	assert.Equal(t, err.Error(), fmt.Sprintf("open network namespace %s/gone: no such file or directory", dir))
}

func hops(name, gateway string, flags uint32) []*agentv1.NextHop {
	return []*agentv1.NextHop{{Interface: name, Gateway: bytesOf(gateway), Flags: flags, Weight: 1}}
}

func TestProbe(t *testing.T) {
	assert.NilError(t, network.Probe())
}
