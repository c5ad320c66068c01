package integration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/factory"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu"
	"runv/test/harness"
)

// The guest's end of a network, with the real driver and the real agent: what is plugged answers under the
// addresses that Apply gave it.
func TestGuestNetwork(t *testing.T) {
	wires := newWires(t)
	guest := filepath.Join(harness.TreeRoot(), "build/guest")
	direct := factory.Direct{Driver: qemu.New(slog.New(slog.DiscardHandler)), BootTimeout: time.Minute}
	vm, err := direct.Get(t.Context(), hypervisor.Config{
		ID: "guestnet", Kernel: filepath.Join(guest, "vmlinux"), Initrd: filepath.Join(guest, "initrd.cpio"),
		Accel: hypervisor.TCG, VCPUs: 2, MemoryBytes: 256 << 20, RunDir: t.TempDir(),
		User: &hypervisor.User{UID: 65534, GID: 65534},
	}, func(hypervisor.VM) {})
	assert.NilError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console: %q", vm.Console().Tail(20))
		}
		assert.Check(t, errors.Join(vm.Agent.Close(), vm.Kill()))
		<-vm.Done()
	})

	request := &agentv1.ApplyNetworkRequest{Id: "pod", Sysctls: map[string]string{"net.ipv4.ping_group_range": "0 1000"}}
	apply := func(problems ...string) {
		t.Helper()
		resp, err := vm.Agent.Networks.Apply(t.Context(), request)
		assert.NilError(t, err)
		assert.DeepEqual(t, resp.Problems, problems)
	}
	// add plugs a card, and waits for an answer through it.
	add := func(i, queues, mtu int) {
		t.Helper()
		w := wires.add(i, queues, mtu)
		began := time.Now()
		assert.NilError(t, vm.Attach(t.Context(), hypervisor.NIC{ID: w.name, MAC: w.mac, MTU: mtu, Taps: w.taps}))
		plugged := time.Since(began)
		w.closeTaps()
		request.Interfaces = append(request.Interfaces, w.iface(mtu))
		apply()
		applied := time.Since(began)
		wires.ping(w.guest4, 56)
		t.Logf("%s: plugged after %s, applied after %s, answers after %s", w.name, plugged, applied, time.Since(began))
		wires.ping(w.guest6, 56)
		wires.ping(w.guest4, mtu*2) // in fragments
	}
	add(0, 1, 1500)
	add(1, 2, 9000)
	add(2, 1, 1280)

	// One that has been unplugged is missing, the others stay.
	assert.NilError(t, vm.Detach(t.Context(), "tap0"))
	request.Interfaces = request.Interfaces[1:]
	apply()
	wires.ping(wires.byIndex[1].guest4, 56)

	// Names change places while the network is in use.
	request.Interfaces[0].Name, request.Interfaces[1].Name = request.Interfaces[1].Name, request.Interfaces[0].Name
	apply()
	wires.ping(wires.byIndex[1].guest4, 56)
	wires.ping(wires.byIndex[2].guest6, 56)

	// The same id and address once more.
	request.Interfaces = request.Interfaces[:1]
	add(0, 1, 1500)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = vm.Agent.Networks.Remove(ctx, &agentv1.RemoveNetworkRequest{Id: "pod"})
	assert.NilError(t, err)
	for _, id := range []string{"tap0", "tap1", "tap2"} {
		assert.NilError(t, vm.Detach(ctx, id))
	}
	_, err = vm.Agent.Networks.Apply(ctx, &agentv1.ApplyNetworkRequest{Id: "NO"})
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
}

// wires are tap devices in a network namespace of the test.
type wires struct {
	t       *testing.T
	netns   *os.File
	byIndex map[int]*wire
}

type wire struct {
	name           string
	mac            net.HardwareAddr
	taps           []*os.File
	guest4, guest6 netip.Addr
}

func newWires(t *testing.T) *wires {
	t.Helper()
	w := &wires{t: t, byIndex: map[int]*wire{}}
	assert.NilError(t, onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		w.netns, err = os.Open("/proc/thread-self/ns/net")
		return err
	}))
	t.Cleanup(func() { w.netns.Close() })
	return w
}

// inside calls f in the wires' namespace.
func (w *wires) inside(f func() error) {
	w.t.Helper()
	assert.NilError(w.t, onThread(func() error {
		if err := unix.Setns(int(w.netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	}))
}

// add makes the i-th tap device, with an address of its own kind of each family.
func (w *wires) add(i, queues, mtu int) *wire {
	w.t.Helper()
	n := &wire{
		name: fmt.Sprintf("tap%d", i), mac: net.HardwareAddr{0x52, 0x54, 0, 0, 0, byte(i)},
		guest4: netip.AddrFrom4([4]byte{10, 77, byte(i), 2}), guest6: netip.MustParseAddr(fmt.Sprintf("fd77:%d::2", i)),
	}
	w.t.Cleanup(n.closeTaps)
	w.inside(func() error {
		for range queues {
			tap, err := openTap(n.name, queues > 1)
			if err != nil {
				return err
			}
			n.taps = append(n.taps, tap)
		}
		link, err := netlink.LinkByName(n.name)
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.LinkSetMTU(link, mtu),
			netlink.LinkSetUp(link),
			netlink.AddrAdd(link, &netlink.Addr{IPNet: subnet(n.guest4.Prev(), 24)}),
			netlink.AddrAdd(link, &netlink.Addr{IPNet: subnet(n.guest6.Prev(), 64), Flags: unix.IFA_F_NODAD}),
		)
	})
	w.byIndex[i] = n
	return n
}

func subnet(a netip.Addr, bits int) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
}

func (n *wire) closeTaps() {
	for _, f := range n.taps {
		f.Close()
	}
}

// iface is what the guest shall make of it, with another hardware address than the device has.
func (n *wire) iface(mtu int) *agentv1.Interface {
	return &agentv1.Interface{
		DeviceMac: n.mac, Name: strings.Replace(n.name, "tap", "eth", 1), Mac: append([]byte{2}, n.mac[1:]...), Mtu: uint32(mtu), Up: true, Arp: true,
		Addresses: []*agentv1.Address{{Ip: n.guest4.AsSlice(), PrefixLength: 24}, {Ip: n.guest6.AsSlice(), PrefixLength: 64}},
	}
}

// ping waits for the answer to one echo request with that many bytes.
func (w *wires) ping(to netip.Addr, size int) {
	w.t.Helper()
	w.inside(func() error {
		// The program is born in the thread's namespace.
		cmd := exec.Command("busybox", "ping", "-c", "1", "-W", "10", "-s", fmt.Sprint(size), to.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", cmd, err, out)
		}
		return nil
	})
}

func openTap(name string, several bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if several {
		flags |= unix.IFF_MULTI_QUEUE
	}
	request.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// onThread calls f on a thread that ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- f()
	}()
	return <-done
}
