package network

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/fault"
)

// What a request may have at most, as the API says.
const (
	maxInterfaces = 128
	maxRoutes     = 4096
	maxNeighbours = 4096
	maxRules      = 1024
	maxSysctls    = 1024
	maxAddresses  = 1024
	maxHops       = 64
	maxMetrics    = 32
	maxName       = 15   // bytes
	maxKey        = 256  // bytes of a sysctl's name
	maxValue      = 4096 // bytes of its value
	maxMTU        = 65535
	minMTU        = 68
)

var idPattern = regexp.MustCompile(`^[a-z0-9-]{1,32}$`)

// validate tells whether a request is within its bounds. Errors name the field.
func validate(r *agentv1.ApplyNetworkRequest) error {
	if !idPattern.MatchString(r.Id) {
		return invalid("id %q: small letters, digits and dashes only, at most 32", clip(r.Id))
	}
	for _, c := range []struct {
		field     string
		count, at int
	}{
		{"interfaces", len(r.Interfaces), maxInterfaces},
		{"routes", len(r.Routes), maxRoutes},
		{"neighbours", len(r.Neighbours), maxNeighbours},
		{"rules", len(r.Rules), maxRules},
		{"sysctls", len(r.Sysctls), maxSysctls},
	} {
		if c.count > c.at {
			return invalid("%s: %d, at most %d", c.field, c.count, c.at)
		}
	}
	names, macs := make(map[string]bool), make(map[string]bool)
	for i, f := range r.Interfaces {
		if err := validateInterface(f); err != nil {
			return invalid("interfaces[%d]: %w", i, err)
		}
		mac := string(f.DeviceMac)
		if names[f.Name] {
			return invalid("interfaces[%d].name: %s is there twice", i, f.Name)
		}
		if mac != "" && macs[mac] {
			return invalid("interfaces[%d].device_mac: %x is there twice", i, mac)
		}
		names[f.Name], macs[mac] = true, true
	}
	for i, route := range r.Routes {
		if err := validateRoute(route); err != nil {
			return invalid("routes[%d].%w", i, err)
		}
	}
	for i, n := range r.Neighbours {
		if err := validateNeighbour(n); err != nil {
			return invalid("neighbours[%d].%w", i, err)
		}
	}
	for i, rule := range r.Rules {
		if err := validateRule(rule); err != nil {
			return invalid("rules[%d].%w", i, err)
		}
	}
	for key, value := range r.Sysctls {
		if _, err := sysctlPath(key); err != nil {
			return invalid("sysctls: %w", err)
		}
		if len(value) > maxValue || strings.ContainsRune(value, 0) {
			return invalid("sysctls: %s: value of more than %d bytes, or with a zero byte", key, maxValue)
		}
	}
	return nil
}

func validateInterface(f *agentv1.Interface) error {
	switch {
	case f == nil:
		return fmt.Errorf("empty")
	case !validName(f.Name):
		return fmt.Errorf("name %q: not that of an interface", clip(f.Name))
	case (f.Name == "lo") != (len(f.DeviceMac) == 0):
		return fmt.Errorf("device_mac: all interfaces but lo have one")
	case f.Name == "lo" && len(f.Mac) > 0:
		return fmt.Errorf("mac: lo has none")
	case len(f.DeviceMac) > 0 && !unicast(f.DeviceMac):
		return fmt.Errorf("device_mac %x: not a unicast address of 6 bytes", clip(string(f.DeviceMac)))
	case len(f.Mac) > 0 && !unicast(f.Mac):
		return fmt.Errorf("mac %x: not a unicast address of 6 bytes", clip(string(f.Mac)))
	case f.Mtu != 0 && (f.Mtu < minMTU || f.Mtu > maxMTU) && f.Name != "lo":
		return fmt.Errorf("mtu %d: not within %d and %d", f.Mtu, minMTU, maxMTU)
	case len(f.Addresses) > maxAddresses:
		return fmt.Errorf("addresses: %d, at most %d", len(f.Addresses), maxAddresses)
	}
	for i, a := range f.Addresses {
		if err := validateAddress(a); err != nil {
			return fmt.Errorf("addresses[%d].%w", i, err)
		}
	}
	return nil
}

func validateAddress(a *agentv1.Address) error {
	switch {
	case a == nil:
		return fmt.Errorf("ip: empty")
	case !validIP(a.Ip):
		return badIP("ip", a.Ip)
	case int(a.PrefixLength) > 8*len(a.Ip):
		return fmt.Errorf("prefix_length %d: at most %d", a.PrefixLength, 8*len(a.Ip))
	case len(a.Peer) > 0 && len(a.Peer) != len(a.Ip):
		return badIP("peer", a.Peer)
	case len(a.Broadcast) > 0 && (len(a.Broadcast) != 4 || len(a.Ip) != 4):
		return badIP("broadcast", a.Broadcast)
	case a.Scope > 255:
		return fmt.Errorf("scope %d: at most 255", a.Scope)
	case a.Label != "" && (len(a.Label) > maxName || strings.ContainsRune(a.Label, 0)):
		return fmt.Errorf("label %q: at most %d bytes", clip(a.Label), maxName)
	}
	return nil
}

func validateRoute(r *agentv1.Route) error {
	size, err := familySize(r.GetFamily())
	switch {
	case err != nil:
		return err
	case len(r.Destination) > 0 && len(r.Destination) != size:
		return badIP("destination", r.Destination)
	case int(r.PrefixLength) > 8*size, len(r.Destination) == 0 && r.PrefixLength > 0:
		return fmt.Errorf("prefix_length %d: more than the destination has", r.PrefixLength)
	case len(r.Source) > 0 && len(r.Source) != size:
		return badIP("source", r.Source)
	case len(r.From) > 0 && len(r.From) != size:
		return badIP("from", r.From)
	case int(r.FromLength) > 8*len(r.From):
		return fmt.Errorf("from_length %d: more than from has", r.FromLength)
	case len(r.NextHops) > maxHops:
		return fmt.Errorf("next_hops: %d, at most %d", len(r.NextHops), maxHops)
	}
	for _, f := range []struct {
		field string
		value uint32
	}{{"scope", r.Scope}, {"type", r.Type}, {"protocol", r.Protocol}, {"tos", r.Tos}, {"preference", r.Preference}} {
		if f.value > 255 {
			return fmt.Errorf("%s %d: at most 255", f.field, f.value)
		}
	}
	if err := validateMetrics(r); err != nil {
		return err
	}
	for i, h := range r.NextHops {
		switch {
		case h == nil:
			return fmt.Errorf("next_hops[%d]: empty", i)
		case len(h.Gateway) > 0 && !validIP(h.Gateway):
			return fmt.Errorf("next_hops[%d].%w", i, badIP("gateway", h.Gateway))
		case len(h.Gateway) == 4 && size == 16:
			return fmt.Errorf("next_hops[%d].gateway: of IPv4, the route is of IPv6", i)
		case h.Interface != "" && !validName(h.Interface):
			return fmt.Errorf("next_hops[%d].interface %q: not that of an interface", i, clip(h.Interface))
		case h.Interface == "" && len(h.Gateway) == 0:
			return fmt.Errorf("next_hops[%d]: neither gateway nor interface", i)
		case h.Weight > 256:
			return fmt.Errorf("next_hops[%d].weight %d: at most 256", i, h.Weight)
		}
	}
	return nil
}

func validateMetrics(r *agentv1.Route) error {
	if len(r.Metrics) > maxMetrics {
		return fmt.Errorf("metrics: %d, at most %d", len(r.Metrics), maxMetrics)
	}
	for kind := range r.Metrics {
		if kind == 0 || kind > 255 || kind == unix.RTAX_CC_ALGO {
			return fmt.Errorf("metrics[%d]: not one that is a number", kind)
		}
	}
	if c := r.CongestionControl; len(c) > maxName || strings.ContainsFunc(c, func(c rune) bool { return c <= ' ' || c > '~' || c == '/' }) {
		return fmt.Errorf("congestion_control %q: not the name of one", clip(c))
	}
	return nil
}

func validateNeighbour(n *agentv1.Neighbour) error {
	switch {
	case n == nil || !validName(n.Interface):
		return fmt.Errorf("interface %q: not that of an interface", clip(n.GetInterface()))
	case !validIP(n.Ip):
		return badIP("ip", n.Ip)
	case len(n.Mac) > 0 && len(n.Mac) != 6:
		return fmt.Errorf("mac: %d bytes, not 6", len(n.Mac))
	case n.State > 0xffff:
		return fmt.Errorf("state %d: at most 65535", n.State)
	case n.Flags > 255:
		return fmt.Errorf("flags %d: at most 255", n.Flags)
	}
	return nil
}

// frActGoto jumps to another rule, which a Rule cannot name.
const frActGoto = 2

func validateRule(r *agentv1.Rule) error {
	size, err := familySize(r.GetFamily())
	switch {
	case err != nil:
		return err
	case len(r.Source) > 0 && len(r.Source) != size:
		return badIP("source", r.Source)
	case len(r.Destination) > 0 && len(r.Destination) != size:
		return badIP("destination", r.Destination)
	case int(r.SourceLength) > 8*len(r.Source):
		return fmt.Errorf("source_length %d: more than the source has", r.SourceLength)
	case int(r.DestinationLength) > 8*len(r.Destination):
		return fmt.Errorf("destination_length %d: more than the destination has", r.DestinationLength)
	case r.InputInterface != "" && !validName(r.InputInterface):
		return fmt.Errorf("input_interface %q: not that of an interface", clip(r.InputInterface))
	case r.OutputInterface != "" && !validName(r.OutputInterface):
		return fmt.Errorf("output_interface %q: not that of an interface", clip(r.OutputInterface))
	case r.Action == 0 || r.Action > 255 || r.Action == frActGoto:
		return fmt.Errorf("action %d: not one that a rule can have", r.Action)
	case r.Tos > 255:
		return fmt.Errorf("tos %d: at most 255", r.Tos)
	}
	return nil
}

func familySize(family uint32) (int, error) {
	switch family {
	case unix.AF_INET:
		return 4, nil
	case unix.AF_INET6:
		return 16, nil
	}
	return 0, fmt.Errorf("family %d: neither IPv4 nor IPv6", family)
}

func validIP(ip []byte) bool { return len(ip) == 4 || len(ip) == 16 }

func badIP(field string, ip []byte) error {
	return fmt.Errorf("%s: %d bytes, not an address of its kind", field, len(ip))
}

func unicast(mac []byte) bool {
	return len(mac) == 6 && mac[0]&1 == 0 && string(mac) != "\x00\x00\x00\x00\x00\x00"
}

// validName tells what the kernel takes; a % would make it number the name.
func validName(name string) bool {
	if name == "" || len(name) > maxName || name == "." || name == ".." {
		return false
	}
	return !strings.ContainsFunc(name, func(c rune) bool {
		return c <= ' ' || c == 0x7f || c == 0x85 || c == 0xa0 || c == '/' || c == ':' || c == '%' || c == '\ufffd'
	})
}

// text is an address as people write it.
func text(ip []byte) string {
	a, ok := netip.AddrFromSlice(ip)
	if !ok {
		return fmt.Sprintf("%x", ip)
	}
	return a.String()
}

// clip shortens what goes into a message.
func clip(s string) string { return s[:min(len(s), 64)] }

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}
