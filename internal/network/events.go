package network

import (
	"encoding/binary"
	"errors"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// events tells when something in a namespace has changed. What it was does not matter, as each sync
// looks at all; so a message that the kernel could not deliver is one like any other.
type events struct {
	file *os.File
	// C gets a value after changes; several may make one value.
	C chan struct{}
	// failed is closed when there will be no more values, after an error that err then holds.
	failed chan struct{}
	err    error
	// fixed are the neighbours that were mirrored last. All others come and go without meaning.
	fixed atomic.Pointer[map[neighbourKey]bool]
}

type neighbourKey struct {
	index int
	ip    string
}

// groups are what a snapshot consists of, and the qdiscs that somebody might remove.
var groups = []uint32{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_TC, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
}

// subscribe begins to listen; the caller calls close.
func subscribe(ns *Namespace) (*events, error) {
	e, err := openEvents(ns)
	if err != nil {
		return nil, err
	}
	go e.read()
	return e, nil
}

func openEvents(ns *Namespace) (*events, error) {
	e := &events{C: make(chan struct{}, 1), failed: make(chan struct{})}
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		address := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
		for _, g := range groups {
			address.Groups |= 1 << (g - 1)
		}
		if err := unix.Bind(fd, address); err != nil {
			unix.Close(fd)
			return err
		}
		e.file = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	return e, err
}

// close ends it and waits for the reading goroutine.
func (e *events) close() {
	e.file.Close()
	<-e.failed
}

func (e *events) read() {
	defer close(e.failed)
	raw, err := e.file.SyscallConn()
	if err != nil {
		e.err = err
		return
	}
	buf := make([]byte, 1<<16)
	for {
		var n int
		var readErr error
		if err := raw.Read(func(fd uintptr) bool {
			n, _, readErr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(readErr, unix.EAGAIN)
		}); err != nil {
			e.err = err // closed
			return
		}
		switch {
		case errors.Is(readErr, unix.EINTR):
			continue
		case errors.Is(readErr, unix.ENOBUFS):
			// Some were lost; who knows which.
		case readErr != nil:
			e.err = readErr
			return
		case !e.matters(buf[:n]):
			continue
		}
		select {
		case e.C <- struct{}{}:
		default: // there is one already that nobody has looked at
		}
	}
}

// watch tells which neighbours were mirrored.
func (e *events) watch(neighbours []netlink.Neigh) {
	fixed := make(map[neighbourKey]bool)
	for _, n := range neighbours {
		if n.State == netlink.NUD_PERMANENT {
			fixed[neighbourKey{n.LinkIndex, string(n.IP)}] = true
		}
	}
	e.fixed.Store(&fixed)
}

// matters is false for messages on neighbours that the kernel found by itself.
func (e *events) matters(data []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		return true
	}
	fixed := e.fixed.Load()
	for _, m := range messages {
		if m.Header.Type != unix.RTM_NEWNEIGH && m.Header.Type != unix.RTM_DELNEIGH || len(m.Data) < unix.SizeofNdMsg {
			return true
		}
		state, flags := binary.NativeEndian.Uint16(m.Data[8:]), m.Data[10]
		if state&unix.NUD_PERMANENT != 0 || flags&unix.NTF_PROXY != 0 || fixed == nil {
			return true
		}
		n, err := netlink.NeighDeserialize(m.Data)
		if err != nil || (*fixed)[neighbourKey{n.LinkIndex, string(n.IP)}] {
			return true
		}
	}
	return false
}
