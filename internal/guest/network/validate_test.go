package network_test

import (
	"bytes"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/network"
)

func TestValidate(t *testing.T) {
	assert.NilError(t, network.Validate(full()))
	assert.NilError(t, network.Validate(&agentv1.ApplyNetworkRequest{Id: strings.Repeat("a", 32)}))
	eth := func(change func(*agentv1.Interface)) func(*agentv1.ApplyNetworkRequest) {
		return func(r *agentv1.ApplyNetworkRequest) { change(r.Interfaces[1]) }
	}
	addr := func(change func(*agentv1.Address)) func(*agentv1.ApplyNetworkRequest) {
		return func(r *agentv1.ApplyNetworkRequest) { change(r.Interfaces[0].Addresses[1]) }
	}
	rt := func(change func(*agentv1.Route)) func(*agentv1.ApplyNetworkRequest) {
		return func(r *agentv1.ApplyNetworkRequest) { change(r.Routes[0]) }
	}
	hop := func(change func(*agentv1.NextHop)) func(*agentv1.ApplyNetworkRequest) {
		return func(r *agentv1.ApplyNetworkRequest) { change(r.Routes[0].NextHops[0]) }
	}
	rule := func(change func(*agentv1.Rule)) func(*agentv1.ApplyNetworkRequest) {
		return func(r *agentv1.ApplyNetworkRequest) { change(r.Rules[0]) }
	}
	for _, c := range []struct {
		text   string
		change func(*agentv1.ApplyNetworkRequest)
	}{
		{"id", func(r *agentv1.ApplyNetworkRequest) { r.Id = "" }},
		{"id", func(r *agentv1.ApplyNetworkRequest) { r.Id = "A" }},
		{"id", func(r *agentv1.ApplyNetworkRequest) { r.Id = strings.Repeat("a", 33) }},
		{"interfaces: 129", func(r *agentv1.ApplyNetworkRequest) { r.Interfaces = make([]*agentv1.Interface, 129) }},
		{"interfaces[0]: empty", func(r *agentv1.ApplyNetworkRequest) { r.Interfaces = make([]*agentv1.Interface, 1) }},
		{"routes: 4097", func(r *agentv1.ApplyNetworkRequest) { r.Routes = make([]*agentv1.Route, 4097) }},
		{"routes[0].family", func(r *agentv1.ApplyNetworkRequest) { r.Routes = make([]*agentv1.Route, 1) }},
		{"neighbours: 4097", func(r *agentv1.ApplyNetworkRequest) { r.Neighbours = make([]*agentv1.Neighbour, 4097) }},
		{"neighbours[0].interface", func(r *agentv1.ApplyNetworkRequest) { r.Neighbours = make([]*agentv1.Neighbour, 1) }},
		{"neighbours[0].ip", func(r *agentv1.ApplyNetworkRequest) { r.Neighbours[0].Ip = nil }},
		{"neighbours[0].mac", func(r *agentv1.ApplyNetworkRequest) { r.Neighbours[0].Mac = []byte{1} }},
		{"neighbours[0].state", func(r *agentv1.ApplyNetworkRequest) { r.Neighbours[0].State = 1 << 16 }},
		{"neighbours[0].flags", func(r *agentv1.ApplyNetworkRequest) { r.Neighbours[0].Flags = 256 }},
		{"rules: 1025", func(r *agentv1.ApplyNetworkRequest) { r.Rules = make([]*agentv1.Rule, 1025) }},
		{"rules[0].family", func(r *agentv1.ApplyNetworkRequest) { r.Rules = make([]*agentv1.Rule, 1) }},
		{"interfaces[1]: name", eth(func(f *agentv1.Interface) { f.Name = "" })},
		{"interfaces[1]: name", eth(func(f *agentv1.Interface) { f.Name = "sixteen-letters-" })},
		{"interfaces[1]: name", eth(func(f *agentv1.Interface) { f.Name = ".." })},
		{"interfaces[1]: name", eth(func(f *agentv1.Interface) { f.Name = "a/b" })},
		{"interfaces[1]: name", eth(func(f *agentv1.Interface) { f.Name = "eth%d" })},
		{"interfaces[1]: name", eth(func(f *agentv1.Interface) { f.Name = "a\x00b" })},
		{"interfaces[1].name: eth0 is there twice", eth(func(f *agentv1.Interface) { f.Name = "eth0" })},
		{"interfaces[1].device_mac: 525400000000 is there twice", eth(func(f *agentv1.Interface) { f.DeviceMac = device(0) })},
		{"interfaces[1]: device_mac", eth(func(f *agentv1.Interface) { f.DeviceMac = nil })},
		{"interfaces[1]: device_mac", eth(func(f *agentv1.Interface) { f.DeviceMac = make([]byte, 6) })},
		{"interfaces[1]: mac", eth(func(f *agentv1.Interface) { f.Mac = bytes.Repeat([]byte{1}, 1<<20) })},
		{"interfaces[1]: mtu", eth(func(f *agentv1.Interface) { f.Mtu = 67 })},
		{"interfaces[1]: mtu", eth(func(f *agentv1.Interface) { f.Mtu = 65536 })},
		{"interfaces[1]: addresses: 1025", eth(func(f *agentv1.Interface) { f.Addresses = make([]*agentv1.Address, 1025) })},
		{"interfaces[1]: addresses[0].ip", eth(func(f *agentv1.Interface) { f.Addresses = make([]*agentv1.Address, 1) })},
		{"interfaces[2]: device_mac", func(r *agentv1.ApplyNetworkRequest) { r.Interfaces[2].DeviceMac = device(7) }},
		{"interfaces[2]: mac", func(r *agentv1.ApplyNetworkRequest) { r.Interfaces[2].Mac = device(7) }},
		{"interfaces[0]: addresses[1].ip", addr(func(a *agentv1.Address) { a.Ip = []byte{1, 2, 3} })},
		{"interfaces[0]: addresses[1].prefix_length", addr(func(a *agentv1.Address) { a.PrefixLength = 33 })},
		{"interfaces[0]: addresses[1].peer", addr(func(a *agentv1.Address) { a.Peer = make([]byte, 16) })},
		{"interfaces[0]: addresses[1].broadcast", addr(func(a *agentv1.Address) { a.Broadcast = make([]byte, 3) })},
		{"interfaces[0]: addresses[1].scope", addr(func(a *agentv1.Address) { a.Scope = 256 })},
		{"interfaces[0]: addresses[1].label", addr(func(a *agentv1.Address) { a.Label = "sixteen-letters-" })},
		{"routes[0].family", rt(func(r *agentv1.Route) { r.Family = 1 })},
		{"routes[0].destination", rt(func(r *agentv1.Route) { r.Destination = make([]byte, 16) })},
		{"routes[0].prefix_length", rt(func(r *agentv1.Route) { r.PrefixLength = 33 })},
		{"routes[0].prefix_length", rt(func(r *agentv1.Route) { r.Destination = nil })},
		{"routes[0].source", rt(func(r *agentv1.Route) { r.Source = make([]byte, 16) })},
		{"routes[0].next_hops: 65", rt(func(r *agentv1.Route) { r.NextHops = make([]*agentv1.NextHop, 65) })},
		{"routes[0].next_hops[0]: empty", rt(func(r *agentv1.Route) { r.NextHops = make([]*agentv1.NextHop, 1) })},
		{"routes[0].type", rt(func(r *agentv1.Route) { r.Type = 256 })},
		{"routes[0].next_hops[0].gateway", hop(func(h *agentv1.NextHop) { h.Gateway = []byte{1} })},
		{"routes[0].next_hops[0].interface", hop(func(h *agentv1.NextHop) { h.Interface = "no such name at all" })},
		{"routes[0].next_hops[0]: neither", hop(func(h *agentv1.NextHop) { h.Interface = "" })},
		{"routes[0].next_hops[0].weight", hop(func(h *agentv1.NextHop) { h.Weight = 257 })},
		{"routes[2].next_hops[0].gateway: of IPv4", func(r *agentv1.ApplyNetworkRequest) { r.Routes[2].NextHops[0].Gateway = ip("10.0.0.1") }},
		{"rules[0].source", rule(func(r *agentv1.Rule) { r.Source = make([]byte, 16) })},
		{"rules[0].source_length", rule(func(r *agentv1.Rule) { r.SourceLength = 33 })},
		{"rules[0].destination_length", rule(func(r *agentv1.Rule) { r.DestinationLength = 1 })},
		{"rules[0].destination", rule(func(r *agentv1.Rule) { r.Destination = []byte{1} })},
		{"rules[0].input_interface", rule(func(r *agentv1.Rule) { r.InputInterface = "a b" })},
		{"rules[0].output_interface", rule(func(r *agentv1.Rule) { r.OutputInterface = "a b" })},
		{"rules[0].action", rule(func(r *agentv1.Rule) { r.Action = 0 })},
		{"rules[0].action", rule(func(r *agentv1.Rule) { r.Action = 2 })},
		{"rules[0].tos", rule(func(r *agentv1.Rule) { r.Tos = 256 })},
		{"sysctls", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["kernel.hostname"] = "x" }},
		{"sysctls", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["net"] = "x" }},
		{"sysctls", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["net.//.kernel.hostname"] = "x" }},
		{"sysctls", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["net..ipv4"] = "x" }},
		{"sysctls", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["net."+strings.Repeat("x", 256)] = "x" }},
		{"sysctls: net.a", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["net.a"] = "a\x00" }},
		{"sysctls: net.a", func(r *agentv1.ApplyNetworkRequest) { r.Sysctls["net.a"] = strings.Repeat("x", 4097) }},
	} {
		r := full()
		c.change(r)
		err := network.Validate(r)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", c.text, err)
		assert.Assert(t, strings.HasPrefix(err.Error(), c.text), "%s: %v", c.text, err)
		assert.Assert(t, len(err.Error()) < 512, "%s", c.text)
	}
}

func TestSysctlPath(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.ip_forward":                 "/proc/sys/net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/5.rp_filter":      "/proc/sys/net/ipv4/conf/eth0.5/rp_filter",
		"net.ipv4.conf.a//b.rp_filter":        "/proc/sys/net/ipv4/conf/a..b/rp_filter",
		"net.ipv4.conf./.forwarding":          "",
		"net.ipv4.conf.//.forwarding":         "",
		"/net.x":                              "",
		"net.ipv4.conf.eth0.":                 "",
		"":                                    "",
		"net.ipv4.conf.eth0 .rp_filter":       "",
		"net.ipv4.conf.eth0.rp_filter\n":      "",
		"kernel.net":                          "",
		"net.ipv4.conf.-1/../../kernel/panic": "",
	} {
		path, err := network.SysctlPath(key)
		assert.Equal(t, path, want, "%q", key)
		assert.Equal(t, err == nil, want != "", "%q: %v", key, err)
	}
}

// Whatever a request has in it, the agent answers, within its bounds, and its network can be used thereafter.
func FuzzApply(f *testing.F) {
	seed, err := proto.Marshal(full())
	assert.NilError(f, err)
	f.Add(seed)
	odd := full()
	odd.Interfaces[1].Addresses = append(odd.Interfaces[1].Addresses, &agentv1.Address{Ip: ip("255.255.255.255"), PrefixLength: 0, Flags: 1 << 31})
	odd.Routes = append(odd.Routes, &agentv1.Route{Family: unix.AF_INET6, Type: 255, Table: 1 << 31, Protocol: 255})
	maps.Copy(odd.Sysctls, map[string]string{"net.ipv4.ip_local_port_range": "9 1", "net.core.somaxconn": "-1"})
	seed, err = proto.Marshal(odd)
	assert.NilError(f, err)
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		r := new(agentv1.ApplyNetworkRequest)
		if proto.Unmarshal(data, r) != nil || network.Validate(r) != nil {
			return
		}
		r.Id = "a"
		for _, i := range r.Interfaces { // nobody waits for devices that there are not
			if i.Name != "lo" {
				return
			}
		}
		b := newBench(t)
		resp, err := b.Apply(t.Context(), r)
		assert.NilError(t, err)
		assert.Assert(t, len(resp.Problems) <= 65)
		for _, p := range resp.Problems {
			assert.Assert(t, len(p) <= 256 && !strings.Contains(p, "\n"), "%q", p)
		}
		b.applyAll(&agentv1.ApplyNetworkRequest{Id: "a"})
	})
}
