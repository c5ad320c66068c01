package qemu

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/hypervisor"
)

// defaultMTU is what a guest takes that is told of none.
const defaultMTU = 1500

// plugNIC plugs a network card into a slot.
func (v *vm) plugNIC(ctx context.Context, n hypervisor.NIC, at slot, undo *undoList) error {
	for _, f := range n.Taps {
		if err := checkTap(f, len(n.Taps) > 1); err != nil {
			return err
		}
	}
	for _, f := range n.VhostNet {
		if err := checkVhostNet(f); err != nil {
			return err
		}
	}
	taps, err := v.sendFiles(ctx, n.ID, "tap", n.Taps, undo)
	if err != nil {
		return err
	}
	vhosts, err := v.sendFiles(ctx, n.ID, "vhost", n.VhostNet, undo)
	if err != nil {
		return err
	}
	netdev := map[string]any{"type": "tap", "id": netdevName(n.ID)}
	if len(taps) == 1 {
		netdev["fd"] = taps[0]
	} else {
		netdev["fds"] = strings.Join(taps, ":")
	}
	switch len(vhosts) {
	case 0:
	case 1:
		netdev["vhost"], netdev["vhostfd"] = true, vhosts[0]
	default:
		netdev["vhost"], netdev["vhostfds"] = true, strings.Join(vhosts, ":")
	}
	if err := v.execute(ctx, "netdev_add", netdev); err != nil {
		return err
	}
	undo.add(func(ctx context.Context) error { return v.removeNetdev(ctx, n.ID) })
	return v.execute(ctx, "device_add", nicDevice(n, at))
}

// checkTap looks at a descriptor before QEMU does, which loses one that is no tap device, and aborts when
// one of several is no queue (seen with 7.2).
func checkTap(f *os.File, several bool) error {
	request, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	if err := control(f, func(fd int) error { return unix.IoctlIfreq(fd, unix.TUNGETIFF, request) }); err != nil {
		return hypervisor.Errorf(errdefs.ErrInvalidArgument, "%s is no tap device: %v", f.Name(), err)
	}
	flags := request.Uint16()
	switch {
	case flags&unix.IFF_TAP == 0 || flags&unix.IFF_VNET_HDR == 0:
		err = hypervisor.Errorf(errdefs.ErrInvalidArgument, "%s is no tap device with vnet_hdr", request.Name())
	case several && flags&unix.IFF_MULTI_QUEUE == 0:
		err = hypervisor.Errorf(errdefs.ErrInvalidArgument, "%s is no tap device with several queues", request.Name())
	}
	return err
}

// vhostGetFeatures is VHOST_GET_FEATURES of linux/vhost.h.
const vhostGetFeatures = 0x8008af00

// checkVhostNet looks at a descriptor before QEMU does, which aborts at one that is no vhost-net (seen with 7.2).
func checkVhostNet(f *os.File) error {
	// The kernel writes 8 bytes, as many as an int has.
	if err := control(f, func(fd int) error { _, err := unix.IoctlGetInt(fd, vhostGetFeatures); return err }); err != nil {
		return hypervisor.Errorf(errdefs.ErrInvalidArgument, "%s is no vhost-net: %v", f.Name(), err)
	}
	return nil
}

// control calls f with a file's descriptor.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// nicDevice is the device of a network card. All offloads that QEMU and the tap device know are on
// without saying so.
func nicDevice(n hypervisor.NIC, at slot) map[string]any {
	device := map[string]any{
		"driver": "virtio-net-pci", "id": deviceName(n.ID), "netdev": netdevName(n.ID), "mac": n.MAC.String(),
		// Nobody boots from the network, so there need be no such file.
		"romfile": "",
		// A card that can tell whether its link is up says so only after its driver has begun, and Linux then takes it
		// for down until a second has passed. It always is up.
		"status": false,
		// The ports of the older kind would need a window of I/O addresses.
		"disable-legacy": "on",
		"bus":            at.bus(), "addr": at.addr(),
	}
	if n.MTU > defaultMTU {
		device["host_mtu"] = n.MTU
	}
	if len(n.Taps) > 1 {
		// An interrupt for each queue of each direction, one for the control queue and one for changes.
		device["mq"], device["vectors"] = true, 2*len(n.Taps)+2
	}
	return device
}

// sendFiles gives QEMU files under names, which it returns. QEMU closes those that nothing has taken when undone.
func (v *vm) sendFiles(ctx context.Context, id, kind string, files []*os.File, undo *undoList) (names []string, err error) {
	for i, f := range files {
		name := fmt.Sprintf("%s-%s-%d", kind, id, i)
		if err := v.sendFile(ctx, name, f); err != nil {
			return nil, err
		}
		names = append(names, name)
		undo.add(func(ctx context.Context) error { v.closeFile(ctx, name); return nil })
	}
	return names, nil
}

func (v *vm) removeNetdev(ctx context.Context, id string) error {
	return v.execute(ctx, "netdev_del", map[string]string{"id": netdevName(id)})
}

func netdevName(id string) string { return "net-" + id }
