package network_test

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
)

func TestRoutes(t *testing.T) {
	const unicast, boot, main = unix.RTN_UNICAST, unix.RTPROT_BOOT, unix.RT_TABLE_MAIN
	two := []*agentv1.NextHop{
		{Interface: "eth0", Gateway: bytesOf("10.1.0.1"), Weight: 1}, {Interface: "eth0", Gateway: bytesOf("10.1.0.3"), Weight: 5},
	}
	for _, c := range []struct {
		add  string
		want *agentv1.Route
	}{
		{"10.5.0.0/16 nexthop via 10.1.0.1 nexthop via 10.1.0.3 weight 5", &agentv1.Route{Destination: bytesOf("10.5.0.0"), PrefixLength: 16, NextHops: two}},
		{"10.5.0.0/16 via inet6 fd00:1::1", &agentv1.Route{Destination: bytesOf("10.5.0.0"), PrefixLength: 16, NextHops: hops("eth0", "fd00:1::1", 0)}},
		{"default dev eth0 scope global", &agentv1.Route{NextHops: hops("eth0", "", 0)}},
		{"0.0.0.0/1 via 10.1.0.1", &agentv1.Route{Destination: bytesOf("0.0.0.0"), PrefixLength: 1, NextHops: hops("eth0", "10.1.0.1", 0)}},
		{"local 10.6.0.0/16 dev lo", &agentv1.Route{
			Destination: bytesOf("10.6.0.0"), PrefixLength: 16, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL,
			Scope: unix.RT_SCOPE_HOST, NextHops: hops("lo", "", 0),
		}},
		{"10.7.0.0/16 nhid 7", &agentv1.Route{Destination: bytesOf("10.7.0.0"), PrefixLength: 16, NextHops: hops("eth0", "10.1.0.1", 0)}},
		{"10.7.0.0/16 nhid 9", &agentv1.Route{Destination: bytesOf("10.7.0.0"), PrefixLength: 16, NextHops: []*agentv1.NextHop{two[0], {Interface: "eth0", Gateway: bytesOf("10.1.0.3"), Weight: 1}}}},
		{"10.8.0.0/16 via 10.1.0.1 tos 0x10 metric 9 table 1000 proto static advmss 1000 window 5000", &agentv1.Route{
			Destination: bytesOf("10.8.0.0"), PrefixLength: 16, Tos: 0x10, Priority: 9, Table: 1000, Protocol: unix.RTPROT_STATIC, Metrics: map[uint32]uint32{unix.RTAX_ADVMSS: 1000, unix.RTAX_WINDOW: 5000},
			NextHops: hops("eth0", "10.1.0.1", 0),
		}},
		{"10.8.0.0/16 via 10.1.0.1 mtu lock 1400 rtt 40ms hoplimit 33 initcwnd 20 features ecn quickack 1 congctl reno realms 3/4", &agentv1.Route{
			Destination: bytesOf("10.8.0.0"), PrefixLength: 16, CongestionControl: "reno", Realms: 3<<16 | 4, NextHops: hops("eth0", "10.1.0.1", 0),
			Metrics: map[uint32]uint32{
				unix.RTAX_LOCK: 1 << unix.RTAX_MTU, unix.RTAX_MTU: 1400, unix.RTAX_RTT: 320, unix.RTAX_HOPLIMIT: 33, unix.RTAX_INITCWND: 20,
				unix.RTAX_FEATURES: 1, unix.RTAX_QUICKACK: 1,
			},
		}},
		{"fd00:8::/64 from fd00:1::/64 via fd00:1::1 pref high", &agentv1.Route{
			Family: unix.AF_INET6, Destination: bytesOf("fd00:8::"), PrefixLength: 64, From: bytesOf("fd00:1::"), FromLength: 64, Priority: 1024,
			Preference: 1, NextHops: hops("eth0", "fd00:1::1", 0),
		}},
		{"throw 10.9.0.0/16", &agentv1.Route{Destination: bytesOf("10.9.0.0"), PrefixLength: 16, Type: unix.RTN_THROW}},
		{"fd00:5::/64 nexthop via fd00:1::1 nexthop via fd00:1::3 weight 5", &agentv1.Route{
			Family: unix.AF_INET6, Destination: bytesOf("fd00:5::"), PrefixLength: 64, Priority: 1024, NextHops: []*agentv1.NextHop{
				{Interface: "eth0", Gateway: bytesOf("fd00:1::1"), Weight: 1}, {Interface: "eth0", Gateway: bytesOf("fd00:1::3"), Weight: 5},
			},
		}},
		{"unreachable fd00:6::/64", &agentv1.Route{
			Family: unix.AF_INET6, Destination: bytesOf("fd00:6::"), PrefixLength: 64, Priority: 1024, Type: unix.RTN_UNREACHABLE,
		}},
		{"fd00:7::/64 via fe80::1 dev eth0 metric 5 src fd00:1::2", &agentv1.Route{
			Family: unix.AF_INET6, Destination: bytesOf("fd00:7::"), PrefixLength: 64, Priority: 5, Source: bytesOf("fd00:1::2"), NextHops: hops("eth0", "fe80::1", 0),
		}},
	} {
		t.Run(strings.ReplaceAll(c.add, "/", "_"), func(t *testing.T) {
			ns := newNamespace(t)
			pair(t, ns)
			run(t, ns, `ip nexthop add id 7 via 10.1.0.1 dev eth0
				ip nexthop add id 8 via 10.1.0.3 dev eth0
				ip nexthop add id 9 group 7/8
				ip route add `+c.add)
			want := c.want
			for _, f := range []struct {
				field *uint32
				value uint32
			}{{&want.Family, unix.AF_INET}, {&want.Table, main}, {&want.Type, unicast}, {&want.Protocol, boot}} {
				if *f.field == 0 {
					*f.field = f.value
				}
			}
			assert.DeepEqual(t, start(t, ns, nil).guest.request().Routes, []*agentv1.Route{want}, protocmp.Transform())
		})
	}
}

func TestRules(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	run(t, ns, `ip rule add to 10.2.0.0/16 iif eth0 tos 0x10 blackhole priority 10
		ip -6 rule add not from fd00::/16 oif eth0 fwmark 0x1/0xff table 300 priority 11
		ip rule add table main priority 12
		ip -6 rule del priority 32766
		ip -6 rule add table main priority 32766 fwmark 3`)
	r := start(t, ns, nil)
	want := []*agentv1.Rule{
		{Family: unix.AF_INET, Priority: 10, Destination: bytesOf("10.2.0.0"), DestinationLength: 16, InputInterface: "eth0", Tos: 0x10, Action: unix.FR_ACT_BLACKHOLE},
		{Family: unix.AF_INET, Priority: 12, Table: unix.RT_TABLE_MAIN, Action: unix.FR_ACT_TO_TBL},
		{
			Family: unix.AF_INET6, Priority: 11, Source: bytesOf("fd00::"), SourceLength: 16, OutputInterface: "eth0", Mark: 1, Mask: 0xff, Table: 300,
			Invert: true, Action: unix.FR_ACT_TO_TBL,
		},
		{Family: unix.AF_INET6, Priority: 32766, Mark: 3, Mask: 0xffffffff, Table: unix.RT_TABLE_MAIN, Action: unix.FR_ACT_TO_TBL},
	}
	assert.DeepEqual(t, r.guest.request().Rules, want, protocmp.Transform())
	// What the guest cannot be told must not become a rule for more than it was meant for.
	run(t, ns, `ip rule add ipproto tcp table 9
		ip rule add dport 80 table 9
		ip rule add sport 1000-2000 table 9
		ip rule add uidrange 0-100 table 9
		ip rule add from 10.0.0.1 goto 32766
		ip rule add tun_id 7 table 9
		ip rule add suppress_prefixlength 0 table main
		ip rule add suppress_ifgroup 5 table main
		ip rule add from 10.0.0.2 table 9 realms 5`)
	assert.NilError(t, r.Sync(t.Context()))
	assert.DeepEqual(t, r.guest.request().Rules, want, protocmp.Transform())
}
