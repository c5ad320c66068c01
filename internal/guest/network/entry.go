package network

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// entry is one thing of a network that one netlink message makes, and the same with the kind after
// it takes away.
type entry struct {
	what  string // for people
	slot  string // who it is for the kernel: there is never more than one with the same
	index int    // of the device that it hangs on; 0: several, or none
	kind  int    // RTM_NEW*
	flags int    // NLM_F_* of the making
	// fixed tells that the kernel does not change one that is there in all points.
	fixed bool
	body  []byte
	// second is made when the kernel does not take body, for what it lacks; nil: nothing.
	second  []byte
	without string
}

const (
	replace = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	create  = unix.NLM_F_CREATE | unix.NLM_F_EXCL

	forever = math.MaxUint32 // lifetime of an address
)

// Flags of addresses that say what somebody wants, and not what the kernel has found.
const (
	settable4 = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_MCAUTOJOIN
	settable6 = settable4 | unix.IFA_F_HOMEADDRESS | unix.IFA_F_NODAD
)

func addressEntry(name string, index int, a *agentv1.Address) entry {
	family, flags := unix.AF_INET, a.Flags&settable4
	if len(a.Ip) == 16 {
		// The host's kernel has looked for duplicates: the address can be used at once.
		family, flags = unix.AF_INET6, a.Flags&settable6|unix.IFA_F_NODAD
	}
	msg := nl.NewIfAddrmsg(family)
	msg.Prefixlen, msg.Scope, msg.Index = uint8(a.PrefixLength), uint8(a.Scope), uint32(index)
	peer := a.Peer
	if len(peer) == 0 {
		peer = a.Ip
	}
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(unix.IFA_LOCAL, a.Ip), nl.NewRtAttr(unix.IFA_ADDRESS, peer),
		nl.NewRtAttr(unix.IFA_FLAGS, nl.Uint32Attr(flags)),
	}
	if len(a.Broadcast) > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.IFA_BROADCAST, a.Broadcast))
	}
	if a.Metric > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.IFA_RT_PRIORITY, nl.Uint32Attr(a.Metric)))
	}
	if a.Label != "" && family == unix.AF_INET {
		attrs = append(attrs, nl.NewRtAttr(unix.IFA_LABEL, nl.ZeroTerminated(a.Label)))
	}
	if a.Flags&unix.IFA_F_DEPRECATED != 0 {
		lifetimes := nl.IfaCacheInfo{IfaCacheinfo: unix.IfaCacheinfo{Valid: forever}} // and not preferred
		attrs = append(attrs, nl.NewRtAttr(unix.IFA_CACHEINFO, lifetimes.Serialize()))
	}
	slot := fmt.Sprintf("address %d %x", index, a.Ip)
	if family == unix.AF_INET {
		slot += fmt.Sprintf("/%d %x", a.PrefixLength, peer)
	}
	return entry{
		what:  fmt.Sprintf("%s: address %s/%d", name, text(a.Ip), a.PrefixLength),
		slot:  slot,
		index: index, kind: unix.RTM_NEWADDR, flags: replace, fixed: true, body: message(msg, attrs),
	}
}

// routeEntry needs the indexes of the route's devices. missing is one that there is not.
func routeEntry(r *agentv1.Route, indexes map[string]int) (e entry, missing string) {
	table, destination := r.Table, text(r.Destination)
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	if len(r.Destination) == 0 {
		destination = "default"
	} else {
		destination = fmt.Sprintf("%s/%d", destination, r.PrefixLength)
	}
	msg := nl.NewRtMsg()
	msg.Family, msg.Dst_len, msg.Tos = uint8(r.Family), uint8(r.PrefixLength), uint8(r.Tos)
	msg.Table, msg.Protocol, msg.Scope, msg.Type = unix.RT_TABLE_UNSPEC, uint8(r.Protocol), uint8(r.Scope), uint8(r.Type)
	if r.Type == 0 {
		msg.Type = unix.RTN_UNICAST
	}
	attrs := []*nl.RtAttr{nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(table))}
	if len(r.Destination) > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_DST, r.Destination))
	}
	if len(r.Source) > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_PREFSRC, r.Source))
	}
	if r.Priority > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(r.Priority)))
	}
	if r.Realms > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_FLOW, nl.Uint32Attr(r.Realms)))
	}
	if r.Preference > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_PREF, []byte{uint8(r.Preference)}))
	}
	if len(r.From) > 0 {
		msg.Src_len = uint8(r.FromLength)
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_SRC, r.From))
	}
	e = entry{what: "route " + destination, kind: unix.RTM_NEWROUTE, flags: replace}
	for _, h := range r.NextHops {
		if h.Interface != "" && indexes[h.Interface] == 0 {
			return e, h.Interface
		}
	}
	switch len(r.NextHops) {
	case 0:
	case 1:
		h := r.NextHops[0]
		e.index = indexes[h.Interface]
		msg.Flags = h.Flags & settableHop
		attrs = append(attrs, gateway(r, h)...)
		if e.index > 0 {
			attrs = append(attrs, nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(e.index))))
		}
		e.what += via(h)
	default:
		var hops []byte
		for _, h := range r.NextHops {
			next := &nl.RtNexthop{RtNexthop: unix.RtNexthop{
				Hops: uint8(max(1, h.Weight) - 1), Ifindex: int32(indexes[h.Interface]), Flags: uint8(h.Flags & settableHop),
			}}
			for _, a := range gateway(r, h) {
				next.Children = append(next.Children, a)
			}
			if h.Realms > 0 {
				next.Children = append(next.Children, nl.NewRtAttr(unix.RTA_FLOW, nl.Uint32Attr(h.Realms)))
			}
			hops = append(hops, next.Serialize()...)
			e.what += via(h)
		}
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_MULTIPATH, hops))
	}
	priority := r.Priority
	if r.Family == unix.AF_INET6 && priority == 0 {
		priority = defaultPriority6
	}
	e.slot = fmt.Sprintf("route %d %d %x/%d %x/%d %d %d",
		r.Family, table, r.Destination, r.PrefixLength, r.From, r.FromLength, r.Tos, priority)
	with := func(congestionControl string) []byte {
		if metrics := routeMetrics(r, congestionControl); metrics != nil {
			return message(msg, append(slices.Clip(attrs), metrics))
		}
		return message(msg, attrs)
	}
	e.body = with(r.CongestionControl)
	if r.CongestionControl != "" {
		e.second, e.without = with(""), "congestion control "+r.CongestionControl
	}
	return e, ""
}

// settableHop are the flags of a next hop that can be asked for.
const settableHop = unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE

// defaultPriority6 is what the kernel gives to IPv6 routes without any.
const defaultPriority6 = 1024

func gateway(r *agentv1.Route, h *agentv1.NextHop) []*nl.RtAttr {
	switch {
	case len(h.Gateway) == 0:
		return nil
	case len(h.Gateway) == 16 && r.Family == unix.AF_INET:
		value := append(nl.Uint16Attr(unix.AF_INET6), h.Gateway...)
		return []*nl.RtAttr{nl.NewRtAttr(unix.RTA_VIA, value)}
	}
	return []*nl.RtAttr{nl.NewRtAttr(unix.RTA_GATEWAY, h.Gateway)}
}

func via(h *agentv1.NextHop) (s string) {
	if len(h.Gateway) > 0 {
		s = " via " + text(h.Gateway)
	}
	if h.Interface != "" {
		s += " dev " + h.Interface
	}
	return s
}

func routeMetrics(r *agentv1.Route, congestionControl string) *nl.RtAttr {
	if len(r.Metrics) == 0 && congestionControl == "" {
		return nil
	}
	metrics := nl.NewRtAttr(unix.RTA_METRICS, nil)
	for _, kind := range slices.Sorted(maps.Keys(r.Metrics)) {
		metrics.AddRtAttr(int(kind), nl.Uint32Attr(r.Metrics[kind]))
	}
	if congestionControl != "" {
		metrics.AddRtAttr(unix.RTAX_CC_ALGO, nl.ZeroTerminated(congestionControl))
	}
	return metrics
}

func neighbourEntry(n *agentv1.Neighbour, index int) entry {
	msg := &ndmsg{family: unix.AF_INET, index: uint32(index), state: uint16(n.State), flags: uint8(n.Flags)}
	if len(n.Ip) == 16 {
		msg.family = unix.AF_INET6
	}
	attrs := []*nl.RtAttr{nl.NewRtAttr(unix.NDA_DST, n.Ip)}
	if len(n.Mac) > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.NDA_LLADDR, n.Mac))
	}
	return entry{
		what:  fmt.Sprintf("%s: neighbour %s", n.Interface, text(n.Ip)),
		slot:  fmt.Sprintf("neighbour %d %x %t", index, n.Ip, n.Flags&unix.NTF_PROXY != 0),
		index: index, kind: unix.RTM_NEWNEIGH, flags: replace, body: message(msg, attrs),
	}
}

// ndmsg is struct ndmsg of linux/neighbour.h.
type ndmsg struct {
	family uint8
	index  uint32
	state  uint16
	flags  uint8
}

// Len implements nl.NetlinkRequestData.
func (*ndmsg) Len() int { return unix.SizeofNdMsg }

// Serialize implements nl.NetlinkRequestData.
func (m *ndmsg) Serialize() []byte {
	b := append([]byte{m.family, 0, 0, 0}, nl.Uint32Attr(m.index)...)
	b = append(b, nl.Uint16Attr(m.state)...)
	return append(b, m.flags, 0)
}

// fibRuleInvert is FIB_RULE_INVERT of linux/fib_rules.h.
const fibRuleInvert = 2

func ruleEntry(r *agentv1.Rule) entry {
	msg := nl.NewRtMsg()
	msg.Family, msg.Src_len, msg.Dst_len, msg.Tos = uint8(r.Family), uint8(r.SourceLength), uint8(r.DestinationLength), uint8(r.Tos)
	msg.Table, msg.Protocol, msg.Type = unix.RT_TABLE_UNSPEC, unix.RTPROT_UNSPEC, uint8(r.Action)
	if r.Invert {
		msg.Flags = fibRuleInvert
	}
	attrs := []*nl.RtAttr{nl.NewRtAttr(nl.FRA_PRIORITY, nl.Uint32Attr(r.Priority))}
	add := func(set bool, kind int, value []byte) {
		if set {
			attrs = append(attrs, nl.NewRtAttr(kind, value))
		}
	}
	add(r.Table > 0, nl.FRA_TABLE, nl.Uint32Attr(r.Table))
	add(len(r.Source) > 0, nl.FRA_SRC, r.Source)
	add(len(r.Destination) > 0, nl.FRA_DST, r.Destination)
	add(r.Mark > 0 || r.Mask > 0, nl.FRA_FWMARK, nl.Uint32Attr(r.Mark))
	add(r.Mask > 0, nl.FRA_FWMASK, nl.Uint32Attr(r.Mask))
	add(r.InputInterface != "", nl.FRA_IIFNAME, nl.ZeroTerminated(r.InputInterface))
	add(r.OutputInterface != "", nl.FRA_OIFNAME, nl.ZeroTerminated(r.OutputInterface))
	body := message(msg, attrs)
	return entry{
		what: fmt.Sprintf("rule %d", r.Priority), slot: "rule " + string(body),
		kind: unix.RTM_NEWRULE, flags: create, body: body,
	}
}
