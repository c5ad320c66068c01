package network

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"runv/internal/hypervisor"
)

const (
	// maxQueues bounds how many pairs of queues a network card has.
	maxQueues = 8
	// tapMTU is the largest that the kernel lets a tap have.
	tapMTU = 65535 - 14
	// cardMTU is the largest that the guest may ever set: an interface's can grow.
	cardMTU = 65535
)

// port joins an interface of the namespace and a network card of the VM.
type port struct {
	index int    // of the interface
	name  string // of the interface, when it was seen last
	mac   net.HardwareAddr
	made  bool // the interface's ingress qdisc is ours, or will be

	tap      int        // index of the tap; 0: none
	taps     []*os.File // its queues, until the VMM has them
	attached bool
	// unplugging: a goroutine is at it.
	unplugging bool
}

// card is the id of the network card in the VM.
func (p *port) card() string { return fmt.Sprintf("nic-%x", []byte(p.mac)) }

// tapName is the same for no two ports, whatever comes and goes.
func (p *port) tapName() string { return fmt.Sprintf("%s%x", tapPrefix, []byte(p.mac[1:])) }

// newMAC returns an address that nobody has: of 46 random bits.
func newMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

// openTap makes the tap of an interface in the calling thread's namespace. It is gone when its files are
// closed.
func openTap(name string, queues int) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	for i := range queues {
		// Not os.OpenFile, which would have the runtime wait for packets together with the VMM.
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return files, fmt.Errorf("open /dev/net/tun: %w", err)
		}
		files = append(files, os.NewFile(uintptr(fd), name))
		request.SetUint16(flags)
		if i == 0 {
			request.SetUint16(flags | unix.IFF_TUN_EXCL) // never a queue of somebody else's
		}
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return files, err
		}
	}
	// Else its kernel would talk to the guest through it.
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return files, fmt.Errorf("disable IPv6: %w", errors.Unwrap(err))
	}
	return files, nil
}

// openVhost opens /dev/vhost-net for each queue, or none on a host without it.
func openVhost(queues int) []*os.File {
	var files []*os.File
	for range queues {
		f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
		if err != nil {
			closeAll(files)
			return nil
		}
		files = append(files, f)
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// open makes the port's tap and joins it to the interface. A failed open leaves nothing.
func (p *port) open(ns *Namespace, k *kernel, mtu, queues int, filters []filter) (err error) {
	name := p.tapName()
	defer func() {
		if err != nil {
			_ = errors.Join(p.disconnect(k), p.close(k))
		}
	}()
	if err := ns.Do(func() (err error) {
		p.taps, err = openTap(name, queues)
		return err
	}); err != nil {
		return fmt.Errorf("make tap %s: %w", name, err)
	}
	tap, err := k.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find tap %s: %w", name, err)
	}
	p.tap = tap.Attrs().Index
	if err := p.setMTU(k, tap, mtu); err != nil {
		return err
	}
	if _, err := k.steer(p.tap, p.index, fromTap()); err != nil {
		return fmt.Errorf("redirect tap %s: %w", name, err)
	}
	if err := k.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set tap %s up: %w", name, err)
	}
	made, err := k.steer(p.index, p.tap, filters)
	p.made = p.made || made
	if err != nil {
		return fmt.Errorf("redirect to tap %s: %w", name, err)
	}
	return nil
}

// check repairs what somebody may have changed since open: qdiscs, the tap's MTU, that it is up.
func (p *port) check(k *kernel, tap netlink.Link, mtu int, filters []filter) error {
	if err := p.setMTU(k, tap, mtu); err != nil {
		return err
	}
	if tap.Attrs().RawFlags&unix.IFF_UP == 0 {
		if err := k.LinkSetUp(tap); err != nil {
			return fmt.Errorf("set tap %s up: %w", tap.Attrs().Name, err)
		}
	}
	if _, err := k.steer(p.tap, p.index, fromTap()); err != nil {
		return fmt.Errorf("redirect tap %s: %w", tap.Attrs().Name, err)
	}
	made, err := k.steer(p.index, p.tap, filters)
	p.made = p.made || made
	if err != nil {
		return fmt.Errorf("redirect to tap %s: %w", tap.Attrs().Name, err)
	}
	return nil
}

func (p *port) setMTU(k *kernel, tap netlink.Link, mtu int) error {
	if mtu = min(mtu, tapMTU); tap.Attrs().MTU == mtu {
		return nil
	}
	if err := k.LinkSetMTU(tap, mtu); err != nil {
		return fmt.Errorf("set MTU %d of tap %s: %w", mtu, tap.Attrs().Name, err)
	}
	return nil
}

// nic is the network card to plug. The caller closes its VhostNet.
func (p *port) nic() hypervisor.NIC {
	return hypervisor.NIC{ID: p.card(), MAC: p.mac, MTU: cardMTU, Taps: p.taps, VhostNet: openVhost(len(p.taps))}
}

// disconnect gives the interface's packets back to the namespace's kernel.
func (p *port) disconnect(k *kernel) error { return k.release(p.index, p.made) }

// close removes the tap, even if the VMM has it open.
func (p *port) close(k *kernel) error {
	closeAll(p.taps)
	p.taps = nil
	if p.tap == 0 {
		return nil
	}
	if err := k.LinkDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: p.tap}}); err != nil && !gone(err) {
		return fmt.Errorf("remove tap %s: %w", p.tapName(), err)
	}
	p.tap = 0
	return nil
}
