package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// Attributes of routes, and a flag, that the libraries do not name.
const (
	rtaPad          = 24
	rtaUID          = 25
	rtaTTLPropagate = 26
	rtaNexthopID    = 30

	routeCloned = 0x200 // RTM_F_CLONED: what the kernel has learnt, not what somebody has said
)

// settableHop are the flags of a next hop that can be asked for.
const settableHop = unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE

// route is what the kernel tells of one.
type route struct {
	header  unix.RtMsg
	table   uint32
	dst     []byte
	from    []byte
	source  []byte
	metrics map[uint32]uint32
	congest string
	single  hop // if there are no hops
	hops    []hop

	priority, realms, preference, nexthopID uint32
	// changes tells that it changes packets; unknown are attributes that are none of these.
	changes bool
	unknown []string
}

// hop is a next hop.
type hop struct {
	index   int
	gateway []byte
	flags   uint32
	weight  uint32
	realms  uint32
	changes bool
}

// routes asks for all routes of a family, whichever table they are in.
func (k *kernel) routes(family int) ([]route, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
	request.Sockets = k.raw
	request.AddData(nl.NewRtMsg())
	request.Data[0].(*nl.RtMsg).Family = uint8(family)
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return nil, err
	}
	var all []route
	for _, m := range messages {
		// A kernel that does not know the family tells of all that it knows.
		if len(m) < unix.SizeofRtMsg || int(m[0]) != family {
			continue
		}
		r, err := parseRoute(m)
		if err != nil {
			return nil, fmt.Errorf("parse route: %w", err)
		}
		if r.header.Flags&routeCloned == 0 {
			all = append(all, r)
		}
	}
	return all, nil
}

// parseRoute reads a message of the kernel.
func parseRoute(message []byte) (r route, err error) {
	r.header = nl.DeserializeRtMsg(message).RtMsg
	r.table, r.single.flags, r.single.weight = uint32(r.header.Table), r.header.Flags, 1
	attrs, err := nl.ParseRouteAttr(message[unix.SizeofRtMsg:])
	if err != nil {
		return r, err
	}
	for _, a := range attrs {
		switch kind := a.Attr.Type &^ nl.NLA_F_NESTED; kind {
		case unix.RTA_DST:
			r.dst = a.Value
		case unix.RTA_SRC:
			r.from = a.Value
		case unix.RTA_PREFSRC:
			r.source = a.Value
		case unix.RTA_TABLE:
			r.table = number(a.Value)
		case unix.RTA_PRIORITY:
			r.priority = number(a.Value)
		case unix.RTA_FLOW:
			r.realms = number(a.Value)
		case unix.RTA_PREF:
			if len(a.Value) > 0 {
				r.preference = uint32(a.Value[0])
			}
		case unix.RTA_METRICS:
			err = r.parseMetrics(a.Value)
		case unix.RTA_MULTIPATH:
			r.hops, err = parseHops(a.Value)
		case rtaNexthopID: // its next hops are told as well
			r.nexthopID = number(a.Value)
		case unix.RTA_NEWDST, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE:
			r.changes = true
		case unix.RTA_CACHEINFO, unix.RTA_MARK, unix.RTA_IIF, unix.RTA_MFC_STATS, rtaPad, rtaUID: // what has become of it
		default:
			if !r.single.parse(kind, a.Value) {
				r.unknown = append(r.unknown, fmt.Sprintf("attribute %d", kind))
			}
		}
		if err != nil {
			return r, err
		}
	}
	return r, nil
}

// parse reads an attribute that a next hop of several can have, too.
func (h *hop) parse(kind uint16, value []byte) bool {
	switch kind {
	case unix.RTA_OIF:
		h.index = int(number(value))
	case unix.RTA_GATEWAY:
		h.gateway = value
	case unix.RTA_VIA:
		if len(value) > 2 { // the family comes first
			h.gateway = value[2:]
		}
	case unix.RTA_FLOW:
		h.realms = number(value)
	case unix.RTA_NEWDST, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE:
		h.changes = true
	default:
		return false
	}
	return true
}

func (r *route) parseMetrics(value []byte) error {
	attrs, err := nl.ParseRouteAttr(value)
	if err != nil {
		return err
	}
	r.metrics = make(map[uint32]uint32, len(attrs))
	for _, a := range attrs {
		switch kind := uint32(a.Attr.Type); {
		case kind == unix.RTAX_CC_ALGO:
			r.congest = strings.ToValidUTF8(nl.BytesToString(a.Value), "?")
		case kind > unix.RTAX_MAX || len(a.Value) != 4:
			r.unknown = append(r.unknown, fmt.Sprintf("metric %d", kind))
		default:
			r.metrics[kind] = number(a.Value)
		}
	}
	return nil
}

// parseHops reads an array of struct rtnexthop with their attributes.
func parseHops(b []byte) (hops []hop, err error) {
	for len(b) >= unix.SizeofRtNexthop {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofRtNexthop || length > len(b) {
			return nil, fmt.Errorf("next hop of %d bytes", length)
		}
		h := hop{flags: uint32(b[2]), weight: uint32(b[3]) + 1, index: int(int32(binary.NativeEndian.Uint32(b[4:])))}
		attrs, err := nl.ParseRouteAttr(b[unix.SizeofRtNexthop:length])
		if err != nil {
			return nil, err
		}
		for _, a := range attrs {
			h.parse(a.Attr.Type&^nl.NLA_F_NESTED, a.Value)
		}
		hops = append(hops, h)
		b = b[min(len(b), (length+3)&^3):]
	}
	return hops, nil
}

// is tells whether the route is the one that the kernel makes for an address of an interface.
func (r *route) is(index int, to net.IP, length int) bool {
	return r.header.Protocol == unix.RTPROT_KERNEL && r.single.index == index && r.header.Type == unix.RTN_UNICAST &&
		int(r.header.Dst_len) == length && net.IP(r.dst).Equal(to)
}

func (r *route) String() string {
	if len(r.dst) == 0 {
		return "default"
	}
	return fmt.Sprintf("%s/%d", net.IP(r.dst), r.header.Dst_len)
}

// allRoutes returns those that need no other first.
func (q *requester) allRoutes() []*agentv1.Route {
	var direct, through []*agentv1.Route
	for i := range q.routes {
		r := &q.routes[i]
		m, why := q.route(r)
		switch {
		case why != "":
			q.problem("route %s: %s", r, why)
		case m == nil:
		case hasGateway(m):
			through = append(through, m)
		default:
			direct = append(direct, m)
		}
	}
	return append(direct, through...)
}

func hasGateway(m *agentv1.Route) bool {
	for _, h := range m.NextHops {
		if len(h.Gateway) > 0 {
			return true
		}
	}
	return false
}

// route returns nil for one that is not mirrored, and why, if that is worth a word. What is not equal in the guest is
// a problem.
func (q *requester) route(r *route) (m *agentv1.Route, why string) {
	h := r.header
	switch {
	case h.Protocol == unix.RTPROT_KERNEL, h.Protocol == unix.RTPROT_REDIRECT:
		return nil, ""
	case h.Family == unix.AF_INET6 && h.Type == unix.RTN_MULTICAST:
		return nil, "" // the kernel's own, whatever its protocol says
	case r.changes:
		return nil, "routes that change packets are not mirrored"
	}
	m = &agentv1.Route{
		Family: uint32(h.Family), Source: r.source, Table: r.table, Priority: r.priority, Scope: uint32(h.Scope),
		Type: uint32(h.Type), Protocol: uint32(h.Protocol), Tos: uint32(h.Tos), CongestionControl: r.congest,
		Realms: r.realms, Preference: r.preference,
	}
	if len(r.metrics) > 0 {
		m.Metrics = r.metrics
	}
	if len(r.dst) > 0 {
		m.Destination, m.PrefixLength = r.dst, uint32(h.Dst_len)
	}
	if len(r.from) > 0 {
		m.From, m.FromLength = r.from, uint32(h.Src_len)
	}
	for _, what := range r.unknown {
		q.problem("route %s: its %s is not mirrored", r, what)
	}
	switch h.Type {
	case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
		return m, ""
	}
	hops := r.hops
	if len(hops) == 0 {
		hops = []hop{r.single}
	}
	for _, h := range hops {
		name, ok := q.names[h.index]
		if !ok || h.changes {
			continue
		}
		m.NextHops = append(m.NextHops, &agentv1.NextHop{
			Gateway: h.gateway, Interface: name, Flags: h.flags & settableHop, Weight: h.weight, Realms: h.realms,
		})
	}
	switch {
	case len(m.NextHops) == 0 && r.nexthopID != 0 && len(r.hops) == 0 && r.single.index == 0:
		return nil, fmt.Sprintf("the kernel does not tell its next hop %d, see net.ipv4.nexthop_compat_mode", r.nexthopID)
	case len(m.NextHops) == 0:
		return nil, "it needs an interface that the guest does not have"
	case len(m.NextHops) < len(hops):
		q.problem("route %s: %d of its next hops need what the guest does not have", r, len(hops)-len(m.NextHops))
	case len(m.NextHops) > maxHops:
		q.problem("route %s: it has %d next hops, of which the guest gets %d", r, len(m.NextHops), maxHops)
	}
	m.NextHops = m.NextHops[:min(len(m.NextHops), maxHops)]
	return m, ""
}
