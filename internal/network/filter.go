package network

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Our filters are known by their priorities, from firstPriority on, which nobody else is expected to have.
const (
	firstPriority = 0x7276 // "rv"
	redirectAt    = firstPriority + 15
)

// ingress is where packets that come in are filtered, in an ingress qdisc as well as in a clsact.
const ingress = netlink.HANDLE_MIN_INGRESS

// A filter takes packets that come in on an interface and match all keys.
type filter struct {
	priority uint16
	protocol uint16 // ETH_P_*
	keys     []nl.TcU32Key
	act      act
}

type act int

const (
	redirect act = iota // to the other interface, and nowhere else
	copied              // to the other interface, too
	pass                // to the namespace's kernel
)

// u32 looks at a packet from its network header on.
var (
	matchAll = []nl.TcU32Key{{}}
	// An ARP message for Ethernet and IPv4 that is a reply.
	arpReply = []nl.TcU32Key{{Off: 4, Mask: 0xffffffff, Val: 0x06040002}}
	// ICMPv6 without extension headers, which its kernel would not take for neighbour discovery in fragments.
	routerAdvertisement    = []nl.TcU32Key{{Off: 4, Mask: 0x0000ff00, Val: unix.IPPROTO_ICMPV6 << 8}, {Off: 40, Mask: 0xff000000, Val: 134 << 24}}
	neighbourAdvertisement = []nl.TcU32Key{{Off: 4, Mask: 0x0000ff00, Val: unix.IPPROTO_ICMPV6 << 8}, {Off: 40, Mask: 0xff000000, Val: 136 << 24}}
)

// fromInterface is what happens to packets that come in on an interface that is mirrored.
func fromInterface(hostPorts bool) []filter {
	filters := []filter{
		{priority: firstPriority, protocol: unix.ETH_P_ARP, keys: arpReply, act: copied},
		{priority: firstPriority + 1, protocol: unix.ETH_P_IPV6, keys: routerAdvertisement, act: copied},
		{priority: firstPriority + 2, protocol: unix.ETH_P_IPV6, keys: neighbourAdvertisement, act: copied},
	}
	if hostPorts {
		filters = append(filters,
			filter{priority: firstPriority + 3, protocol: unix.ETH_P_IP, keys: toHostPort4(unix.IPPROTO_UDP), act: pass},
			filter{priority: firstPriority + 4, protocol: unix.ETH_P_IP, keys: toHostPort4(unix.IPPROTO_TCP), act: pass},
			filter{priority: firstPriority + 5, protocol: unix.ETH_P_IPV6, keys: toHostPort6(unix.IPPROTO_UDP), act: pass},
			filter{priority: firstPriority + 6, protocol: unix.ETH_P_IPV6, keys: toHostPort6(unix.IPPROTO_TCP), act: pass},
		)
	}
	return append(filters, filter{priority: redirectAt, protocol: unix.ETH_P_ALL, keys: matchAll, act: redirect})
}

// fromTap is what happens to packets of the guest.
func fromTap() []filter {
	return []filter{{priority: redirectAt, protocol: unix.ETH_P_ALL, keys: matchAll, act: redirect}}
}

// toHostPort4 matches packets to a port of the namespace's own. Those with IP options are not found, nor
// the later fragments of one that was cut.
func toHostPort4(protocol uint32) []nl.TcU32Key {
	return []nl.TcU32Key{
		{Off: 0, Mask: 0x0f000000, Val: 0x05000000}, // a header of 20 bytes
		{Off: 4, Mask: 0x00001fff, Val: 0},          // the first fragment
		{Off: 8, Mask: 0x00ff0000, Val: protocol << 16},
		{Off: 20, Mask: hostPortMask, Val: firstHostPort},
	}
}

func toHostPort6(protocol uint32) []nl.TcU32Key {
	return []nl.TcU32Key{
		{Off: 4, Mask: 0x0000ff00, Val: protocol << 8},
		{Off: 40, Mask: hostPortMask, Val: firstHostPort},
	}
}

func (f filter) u32(on, to int) *netlink.U32 {
	u := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: on, Parent: ingress, Priority: f.priority, Protocol: f.protocol},
		// Without a class the kernel takes no filter for one that ends the search.
		ClassId: netlink.MakeHandle(1, 1),
		Sel:     &nl.TcU32Sel{Flags: nl.TC_U32_TERMINAL, Keys: slices.Clip(slices.Clone(f.keys))},
	}
	switch f.act {
	case redirect:
		u.Actions = []netlink.Action{netlink.NewMirredAction(to)}
	case copied:
		u.Actions = []netlink.Action{&netlink.MirredAction{
			ActionAttrs:  netlink.ActionAttrs{Action: netlink.TC_ACT_OK},
			MirredAction: netlink.TCA_EGRESS_MIRROR,
			Ifindex:      to,
		}}
	case pass: // a match without an action
	}
	return u
}

// steer makes the filters of an interface what they should be. made tells that there was no qdisc for
// them, and that it is ours now. When they are right already it changes nothing.
func (k *kernel) steer(on, to int, filters []filter) (made bool, err error) {
	have, err := k.ourFilters(on)
	if err != nil {
		return false, err
	}
	if matches(have, to, filters) {
		return false, nil
	}
	if err := k.dropFilters(on, have); err != nil {
		return false, err
	}
	made, err = k.addIngress(on)
	if err != nil {
		return false, fmt.Errorf("add ingress qdisc: %w", err)
	}
	for _, f := range filters {
		if err := k.FilterAdd(f.u32(on, to)); err != nil {
			return made, fmt.Errorf("add filter %d: %w", f.priority-firstPriority, err)
		}
	}
	return made, nil
}

func (k *kernel) addIngress(on int) (made bool, err error) {
	err = k.QdiscAdd(ingressOf(on))
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		return false, nil // somebody else's, or a clsact
	}
	return err == nil, err
}

func ingressOf(index int) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
}

// ourFilters are those with our priorities, of an interface.
func (k *kernel) ourFilters(on int) ([]netlink.Filter, error) {
	all, err := k.filters(on)
	return slices.DeleteFunc(all, func(f netlink.Filter) bool { return !ours(f) }), err
}

func (k *kernel) filters(on int) ([]netlink.Filter, error) {
	all, err := dump(func() ([]netlink.Filter, error) {
		return k.FilterList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: on}}, ingress)
	})
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	return all, nil
}

func ours(f netlink.Filter) bool {
	p := f.Attrs().Priority
	return p >= firstPriority && p <= redirectAt
}

// matches tells whether the filters that are there are those that should be.
func matches(have []netlink.Filter, to int, filters []filter) bool {
	if len(have) != len(filters) {
		return false
	}
	for i, h := range have {
		u, ok := h.(*netlink.U32)
		if !ok || u.Priority != filters[i].priority || u.Protocol != filters[i].protocol {
			return false
		}
		if filters[i].act != pass && u.RedirIndex != to {
			return false // the other interface was made anew, or is gone
		}
	}
	return true
}

func (k *kernel) dropFilters(on int, filters []netlink.Filter) error {
	for _, f := range filters {
		a := f.Attrs()
		// Of all filters with this priority.
		err := k.FilterDel(&netlink.U32{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: on, Parent: ingress, Priority: a.Priority, Protocol: a.Protocol,
		}})
		if err != nil && !gone(err) {
			return fmt.Errorf("remove filter %d: %w", a.Priority-firstPriority, err)
		}
	}
	return nil
}

// release takes away what steer has made: our filters and, if made, the qdisc, unless somebody else has
// put filters there meanwhile. An interface that is gone is success.
func (k *kernel) release(on int, made bool) error {
	have, err := k.ourFilters(on)
	if err == nil {
		err = k.dropFilters(on, have)
	}
	if err != nil && !gone(err) {
		return err
	}
	if !made {
		return nil
	}
	left, err := k.filters(on)
	if err != nil && !gone(err) {
		return err
	}
	if len(left) > 0 {
		return nil
	}
	if err := k.QdiscDel(ingressOf(on)); err != nil && !gone(err) {
		return fmt.Errorf("remove ingress qdisc: %w", err)
	}
	return nil
}

// gone tells whether what an error tells of is that there is no such interface, qdisc or filter.
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}
