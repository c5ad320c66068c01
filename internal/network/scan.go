package network

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// What a request may have at most, as agent.proto says.
const (
	maxInterfaces = 128
	maxAddresses  = 1024
	maxRoutes     = 4096
	maxNeighbours = 4096
	maxRules      = 1024
	maxHops       = 64
)

// dumpTries is how often a question is asked whose answer changed while it was given.
const dumpTries = 8

// kernel is a netlink connection to the kernel in one namespace. One goroutine uses it at a time.
type kernel struct {
	*netlink.Handle
	raw map[int]*nl.SocketHandle // for what the library does not tell all of
}

func dial(ns *Namespace) (*kernel, error) {
	h, err := ns.Handle()
	if err != nil {
		return nil, err
	}
	var s *nl.NetlinkSocket
	err = ns.Do(func() (err error) {
		// Of the thread's own namespace, which Do has made this one.
		s, err = nl.Subscribe(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		h.Close()
		return nil, err
	}
	k := &kernel{Handle: h, raw: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}
	timeout := unix.NsecToTimeval(netlinkTimeout.Nanoseconds())
	if err := errors.Join(s.SetSendTimeout(&timeout), s.SetReceiveTimeout(&timeout)); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (k *kernel) close() {
	k.Close()
	k.raw[unix.NETLINK_ROUTE].Close()
}

// dump asks until the answer is one of one moment.
func dump[T any](ask func() ([]T, error)) ([]T, error) {
	var all []T
	var err error
	for range dumpTries {
		all, err = ask()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a kernel without IPv6, say
	}
	return all, err
}

// snapshot is what a namespace has.
type snapshot struct {
	links      []netlink.Link
	addresses  []netlink.Addr
	routes     []route
	neighbours []netlink.Neigh
	rules      [][]byte // messages of the kernel, without the header that all have
	sysctls    map[string]string
}

// scan asks for all that a request has but the kernel parameters.
func (k *kernel) scan() (*snapshot, error) {
	s := &snapshot{}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"interfaces", func() (err error) { s.links, err = dump(k.LinkList); return err }},
		{"addresses", func() (err error) {
			s.addresses, err = dump(func() ([]netlink.Addr, error) { return k.AddrList(nil, netlink.FAMILY_ALL) })
			return err
		}},
		{"routes", func() error {
			for _, family := range families {
				routes, err := dump(func() ([]route, error) { return k.routes(family) })
				if err != nil {
					return err
				}
				s.routes = append(s.routes, routes...)
			}
			return nil
		}},
		{"neighbours", func() error {
			for _, ask := range []func(index, family int) ([]netlink.Neigh, error){k.NeighList, k.NeighProxyList} {
				for _, family := range families {
					found, err := dump(func() ([]netlink.Neigh, error) { return ask(0, family) })
					if err != nil {
						return err
					}
					s.neighbours = append(s.neighbours, found...)
				}
			}
			return nil
		}},
		{"rules", func() error {
			for _, family := range families {
				rules, err := dump(func() ([][]byte, error) { return k.rules(family) })
				if err != nil {
					return err
				}
				s.rules = append(s.rules, rules...)
			}
			return nil
		}},
	} {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("list %s: %w", step.what, err)
		}
	}
	slices.SortStableFunc(s.links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	return s, nil
}

var families = [...]int{netlink.FAMILY_V4, netlink.FAMILY_V6}

func (k *kernel) rules(family int) ([][]byte, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
	request.Sockets = k.raw
	request.AddData(nl.NewRtMsg())
	request.Data[0].(*nl.RtMsg).Family = uint8(family)
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	// A kernel that does not know the family tells of all that it knows.
	return slices.DeleteFunc(messages, func(m []byte) bool { return len(m) < unix.SizeofRtMsg || int(m[0]) != family }), err
}

// carries tells whether an interface is one to mirror. If a user might have expected that it is, why says why it
// is not.
func (s *snapshot) carries(l netlink.Link) (mirrored bool, why string) {
	a := l.Attrs()
	up := a.RawFlags&unix.IFF_UP != 0
	switch {
	case a.RawFlags&unix.IFF_LOOPBACK != 0, isTap(l), l.Type() == "ifb", l.Type() == "vrf":
		return false, ""
	case a.EncapType != "ether":
		if !up {
			return false, ""
		}
		return false, "it carries no Ethernet frames"
	case !up && (a.Name == "gretap0" || a.Name == "erspan0"):
		return false, ""
	case a.MasterIndex != 0:
		return false, "" // its master carries what it has
	case l.Type() != "veth" && a.ParentIndex != 0 && a.NetNsID < 0 && a.ParentIndex != a.Index && s.link(a.ParentIndex) != nil:
		return false, "its packets go into the VM through the interface that it is on"
	case !utf8.ValidString(a.Name):
		return false, "its name cannot be told"
	case len(a.HardwareAddr) != 6:
		return false, "its address is not one of Ethernet"
	}
	return true, ""
}

// tapPrefix begins the names of our taps.
const tapPrefix = "rv-"

func isTap(l netlink.Link) bool {
	return l.Type() == "tuntap" && strings.HasPrefix(l.Attrs().Name, tapPrefix)
}

func (s *snapshot) link(index int) netlink.Link {
	for _, l := range s.links {
		if l.Attrs().Index == index {
			return l
		}
	}
	return nil
}

// A requester makes a request of a snapshot.
type requester struct {
	*snapshot
	names    map[int]string // of interfaces that the guest has, by index
	problems map[string]bool
}

// request is the whole of what the guest is told. devices are the addresses of the network cards by the
// index of their interface; interfaces without one are left out, and so is what needs them. problems tell
// what cannot be mirrored.
func (s *snapshot) request(id string, devices map[int]net.HardwareAddr) (r *agentv1.ApplyNetworkRequest, problems map[string]bool) {
	q := &requester{snapshot: s, names: make(map[int]string), problems: make(map[string]bool)}
	r = &agentv1.ApplyNetworkRequest{Id: id, Sysctls: s.sysctls}
	for _, l := range s.links {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_LOOPBACK != 0 {
			q.names[a.Index] = a.Name
			if own := q.addresses(a, ownOfLoopback); len(own) > 0 {
				r.Interfaces = append(r.Interfaces, &agentv1.Interface{Name: a.Name, Mtu: uint32(a.MTU), Up: true, Arp: true, Addresses: own})
			}
			continue
		}
		device, ok := devices[a.Index]
		if !ok {
			if mirrored, why := s.carries(l); !mirrored && why != "" {
				q.problem("interface %s: %s", a.Name, why)
			}
			continue
		}
		q.names[a.Index] = a.Name
		r.Interfaces = append(r.Interfaces, &agentv1.Interface{
			DeviceMac:     device,
			Name:          a.Name,
			Mac:           unicast(a.HardwareAddr),
			Mtu:           uint32(min(a.MTU, cardMTU)),
			Up:            a.RawFlags&unix.IFF_UP != 0,
			Arp:           a.RawFlags&unix.IFF_NOARP == 0,
			Allmulti:      a.RawFlags&unix.IFF_ALLMULTI != 0,
			Promisc:       a.RawFlags&unix.IFF_PROMISC != 0,
			TxQueueLength: uint32(max(a.TxQLen, 0)),
			Addresses:     q.addresses(a, nil),
		})
	}
	r.Routes = bounded(q, "routes", maxRoutes, q.allRoutes())
	r.Neighbours = bounded(q, "neighbours", maxNeighbours, q.allNeighbours())
	r.Rules = bounded(q, "rules", maxRules, q.allRules())
	return r, q.problems
}

// unicast returns nil for what is no address of a station.
func unicast(mac net.HardwareAddr) net.HardwareAddr {
	if mac[0]&1 != 0 || bytes.Equal(mac, make(net.HardwareAddr, 6)) {
		return nil
	}
	return mac
}

func (q *requester) problem(format string, args ...any) {
	q.problems[strings.ToValidUTF8(fmt.Sprintf(format, args...), "?")] = true
}

func bounded[T any](q *requester, what string, most int, all []T) []T {
	if len(all) > most {
		q.problem("there are %d %s, of which the guest gets %d", len(all), what, most)
		return all[:most]
	}
	return all
}

// settable are the flags of an address that can be asked for.
const settable = unix.IFA_F_NODAD | unix.IFA_F_HOMEADDRESS | unix.IFA_F_MANAGETEMPADDR | unix.IFA_F_NOPREFIXROUTE |
	unix.IFA_F_MCAUTOJOIN | unix.IFA_F_DEPRECATED

// addresses of an interface, in the order in which they were added. keep may leave some out.
func (q *requester) addresses(a *netlink.LinkAttrs, keep func(netlink.Addr) bool) []*agentv1.Address {
	var v4, v6 []*agentv1.Address
	for _, addr := range q.snapshot.addresses {
		if addr.LinkIndex != a.Index || addr.IPNet == nil || (keep != nil && !keep(addr)) {
			continue
		}
		length, _ := addr.Mask.Size()
		m := &agentv1.Address{
			Ip: addr.IP, PrefixLength: uint32(length), Scope: uint32(addr.Scope), Flags: uint32(addr.Flags & settable),
			Label: strings.ToValidUTF8(addr.Label, "?"),
		}
		if addr.Peer != nil {
			length, _ := addr.Peer.Mask.Size()
			m.Peer, m.PrefixLength = addr.Peer.IP, uint32(length)
		}
		if r, removed := q.routeOf(a, m); removed {
			m.Flags |= unix.IFA_F_NOPREFIXROUTE
		} else if r != nil && (len(addr.IP) != net.IPv6len || r.priority != defaultPrefixMetric6) {
			m.Metric = r.priority
		}
		if len(addr.IP) == net.IPv4len {
			m.Broadcast = addr.Broadcast
			v4 = append(v4, m)
			continue
		}
		if addr.Flags&(unix.IFA_F_DADFAILED|unix.IFA_F_TEMPORARY) == 0 {
			v6 = append(v6, m)
		}
	}
	slices.Reverse(v6) // the kernel tells the newest first
	return bounded(q, "addresses of "+a.Name, maxAddresses, append(v4, v6...))
}

// defaultPrefixMetric6 is the metric of the routes that the kernel makes for addresses of IPv6.
const defaultPrefixMetric6 = 256

// routeOf returns the route that the kernel has made for an address, nil if there is none, and tells whether
// somebody has taken it away. Some CNI plugins do, to have all packets go through a gateway.
func (q *requester) routeOf(a *netlink.LinkAttrs, m *agentv1.Address) (_ *route, removed bool) {
	const ready = unix.IFF_UP | unix.IFF_RUNNING // else the kernel has made none, or is about to
	if a.RawFlags&(ready|unix.IFF_LOOPBACK) != ready || int(m.PrefixLength) == 8*len(m.Ip) {
		return nil, false
	}
	to := net.IP(m.Ip)
	if m.Peer != nil {
		to = m.Peer
	}
	to = to.Mask(net.CIDRMask(int(m.PrefixLength), 8*len(to)))
	for i := range q.routes {
		if r := &q.routes[i]; r.is(a.Index, to, int(m.PrefixLength)) {
			return r, false
		}
	}
	return nil, true
}

func ownOfLoopback(a netlink.Addr) bool {
	return a.Peer != nil || !a.IP.Equal(net.IPv6loopback) && !a.IP.Equal(net.IPv4(127, 0, 0, 1))
}

func (q *requester) allNeighbours() []*agentv1.Neighbour {
	var all []*agentv1.Neighbour
	for _, n := range q.neighbours {
		name, ok := q.names[n.LinkIndex]
		proxy := n.Flags&netlink.NTF_PROXY != 0
		if !ok || n.IP == nil || (!proxy && n.State != netlink.NUD_PERMANENT) || (len(n.HardwareAddr) != 6 && !proxy) {
			continue
		}
		m := &agentv1.Neighbour{Interface: name, Ip: n.IP, Flags: uint32(n.Flags & (netlink.NTF_PROXY | netlink.NTF_ROUTER))}
		if !proxy {
			m.Mac, m.State = n.HardwareAddr, uint32(n.State)
		}
		all = append(all, m)
	}
	slices.SortStableFunc(all, func(a, b *agentv1.Neighbour) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), bytes.Compare(a.Ip, b.Ip), cmp.Compare(a.Flags, b.Flags))
	})
	return all
}

func (q *requester) allRules() []*agentv1.Rule {
	var all []*agentv1.Rule
	for _, message := range q.rules {
		r, why := rule(message)
		switch {
		case why != "":
			q.problem("rule %d: %s", r.Priority, why)
		case !kernelsOwn(r):
			all = append(all, r)
		}
	}
	return all
}

// kernelsOwn tells whether a rule is one of those that each namespace begins with.
func kernelsOwn(r *agentv1.Rule) bool {
	plain := agentv1.Rule{Family: r.Family, Priority: r.Priority, Table: r.Table, Action: unix.FR_ACT_TO_TBL}
	if r.String() != plain.String() {
		return false
	}
	switch r.Priority {
	case 0:
		return r.Table == unix.RT_TABLE_LOCAL
	case 32766:
		return r.Table == unix.RT_TABLE_MAIN
	case 32767:
		return r.Table == unix.RT_TABLE_DEFAULT
	}
	return false
}

// Of a rule's message; nl does not know all of them.
const (
	fraL3mdev  = 19
	fraPad     = 18
	ruleInvert = 2 // FIB_RULE_INVERT
)

// rule reads a message of the kernel. A rule with a condition that the guest cannot be told would be
// another rule: why says so.
func rule(message []byte) (r *agentv1.Rule, why string) {
	h := nl.DeserializeRtMsg(message)
	r = &agentv1.Rule{
		Family: uint32(h.Family), Tos: uint32(h.Tos), Table: uint32(h.Table), Action: uint32(h.Type), Invert: h.Flags&ruleInvert != 0,
	}
	attrs, err := nl.ParseRouteAttr(message[h.Len():])
	if err != nil {
		return r, "the kernel's message is not understood: " + err.Error()
	}
	for _, a := range attrs {
		switch a.Attr.Type {
		case nl.FRA_SRC:
			r.Source, r.SourceLength = a.Value, uint32(h.Src_len)
		case nl.FRA_DST:
			r.Destination, r.DestinationLength = a.Value, uint32(h.Dst_len)
		case nl.FRA_IIFNAME:
			r.InputInterface = nl.BytesToString(a.Value)
		case nl.FRA_OIFNAME:
			r.OutputInterface = nl.BytesToString(a.Value)
		case nl.FRA_PRIORITY:
			r.Priority = number(a.Value)
		case nl.FRA_TABLE:
			r.Table = number(a.Value)
		case nl.FRA_FWMARK:
			r.Mark = number(a.Value)
		case nl.FRA_FWMASK:
			r.Mask = number(a.Value)
		case nl.FRA_PROTOCOL, fraPad: // who made it, and nothing
		case nl.FRA_FLOW, nl.FRA_SUPPRESS_IFGROUP, nl.FRA_SUPPRESS_PREFIXLEN:
			if n := number(a.Value); n != 0 && n != 0xffffffff || a.Attr.Type == nl.FRA_SUPPRESS_PREFIXLEN && n == 0 {
				why = "suppressed routes and realms are not mirrored"
			}
		case nl.FRA_GOTO:
			why = "jumps are not mirrored"
		case fraL3mdev:
			why = "VRFs are not mirrored"
		default:
			why = fmt.Sprintf("its condition %d is not mirrored", a.Attr.Type)
		}
	}
	for _, name := range []string{r.InputInterface, r.OutputInterface} {
		if !utf8.ValidString(name) {
			why = "the name of its interface cannot be told"
		}
	}
	if why == "" && (r.Action == 0 || r.Action == unix.FR_ACT_GOTO) {
		why = "its action is not mirrored"
	}
	return r, why
}

func number(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}
