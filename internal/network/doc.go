// Package network is the host's side of a pod's network: it mirrors a network namespace into a VM,
// continuously, and owns nothing in it.
//
// Whatever puts interfaces into a pod's namespace, such as libnetwork, netavark, a CNI plugin, a hook or
// a person with ip(8), goes on to do so while the pod runs. A Mirror gives each interface a tap in the same
// namespace, whose packets the kernel exchanges with the interface's, plugs the tap into the VM as a
// network card, and tells the guest what the interface is called and has: MAC, MTU, flags,
// addresses, and of the namespace the routes, neighbours, rules and kernel parameters. It follows netlink and does
// the same with each change. The guest's part is internal/guest/network, the message between them
// agentv1.ApplyNetworkRequest, which always holds all.
//
// # What is mirrored
//
// Interfaces: all that carry Ethernet frames, such as veth, macvlan, macvtap, ipvlan, bridge, bond, dummy, tap,
// physical ones, but these:
//   - our own taps, called "rv-" and the index of their interface;
//   - ports of a bridge, a bond, a team or a VRF, whose packets are their master's;
//   - those on top of another interface of the same namespace (VLANs, macvlans), whose packets the
//     interface below takes into the guest;
//   - ifb, VRFs, and the devices that tunnel modules make in each namespace (gretap0, erspan0);
//   - those with names that are not UTF-8, which messages cannot carry.
//
// Interfaces without Ethernet (tun, wireguard, sit) are left out, and logged when they are up. So are
// the routes, rules and neighbours that need an interface that is left out.
//
// Addresses: those that are still tentative are the guest's at once, those that were found to be in
// use elsewhere are not, nor are temporary ones of IPv6, which the host's kernel would replace behind
// the guest's back. An address whose own route somebody has removed gets none in the guest. Routes: of all tables, without the kernel's own (proto kernel, and IPv6's
// multicast). Neighbours: those that do not expire, and proxies. Rules: without the kernel's own three
// of each family. Kernel parameters: those of a list whose value is not what a new namespace has.
//
// # What the namespace's own kernel still gets
//
// What arrives at an interface is the guest's, with two exceptions. Answers of ARP and of IPv6's
// neighbour discovery, and router advertisements, are copied: the host's kernel goes on to find
// neighbours, to notice duplicate addresses and to configure addresses and routes, which the guest then gets from
// here. With Config.HostPorts some ports are the namespace's own, too.
//
// What is left after a kill -9: a tap is gone when the last process has closed it, which the VMM's
// death does. The redirections stay, and Clean removes them.
package network
