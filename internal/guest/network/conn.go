package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// conn is a connection to the kernel about one network namespace.
type conn struct {
	handle  *netlink.Handle // lists
	sockets map[int]*nl.SocketHandle
}

// dial connects. The caller closes the result.
func dial(netns *os.File) (*conn, error) {
	var c *conn
	err := inside(netns, func() (err error) {
		c, err = dialHere()
		return err
	})
	return c, err
}

// dialHere is dial for the calling thread's namespace.
func dialHere() (*conn, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		handle.Close()
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	c := &conn{handle: handle, sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}}
	_ = socket.SetExtAck(true) // only the texts would be missing
	if err := errors.Join(
		socket.SetSendTimeout(&nl.SocketTimeoutTv), socket.SetReceiveTimeout(&nl.SocketTimeoutTv),
		handle.SetSocketTimeout(socketTimeout),
	); err != nil {
		c.close()
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	return c, nil
}

func (c *conn) close() {
	c.handle.Close()
	for _, s := range c.sockets {
		s.Close()
	}
}

// request asks the kernel for one thing that it only answers with yes or an error.
func (c *conn) request(kind, flags int, body []byte) error {
	r := nl.NewNetlinkRequest(kind, flags|unix.NLM_F_ACK)
	r.Sockets = c.sockets
	r.AddRawData(body)
	_, err := r.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// maxDumps is how often a list is read that changes meanwhile.
const maxDumps = 10

// links lists all devices.
func (c *conn) links() (links []netlink.Link, err error) {
	for range maxDumps {
		links, err = c.handle.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return links, nil
}

// setLink changes a device.
func (c *conn) setLink(index int, flags, change uint32, attrs ...*nl.RtAttr) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), flags, change
	return c.request(unix.RTM_SETLINK, 0, message(msg, attrs))
}

// rename gives a device another name, one that is down if the kernel wants it so.
func (c *conn) rename(index int, name string) error {
	return c.withDown(index, func() error {
		return c.setLink(index, 0, 0, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	})
}

// setMAC gives a device another hardware address.
func (c *conn) setMAC(index int, mac net.HardwareAddr) error {
	return c.withDown(index, func() error {
		return c.setLink(index, 0, 0, nl.NewRtAttr(unix.IFLA_ADDRESS, mac))
	})
}

// withDown calls f once more with the device down if it is too busy otherwise.
func (c *conn) withDown(index int, f func() error) error {
	err := f()
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	if err := c.setLink(index, 0, unix.IFF_UP); err != nil {
		return err
	}
	return f()
}

// move sends a device into another namespace, under a name of its own there: a pattern such as
// dev%d is one that the kernel completes.
func (c *conn) move(index int, netns *os.File, name string) error {
	return c.setLink(index, 0, 0,
		nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(netns.Fd()))),
		nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
}

// setUp sets a device of the calling thread's namespace up.
func setUp(name string) error {
	c, err := dialHere()
	if err != nil {
		return err
	}
	defer c.close()
	link, err := c.handle.LinkByName(name)
	if err != nil {
		return err
	}
	return c.setLink(link.Attrs().Index, unix.IFF_UP, unix.IFF_UP)
}

// message is the part of a netlink message behind its header.
func message(head nl.NetlinkRequestData, attrs []*nl.RtAttr) []byte {
	body := slices.Clip(head.Serialize()) // it may be the header itself
	for _, a := range attrs {
		body = append(body, a.Serialize()...)
	}
	return body
}
