package network_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	agentv1 "runv/api/agent/v1"
	"runv/internal/hypervisor"
	"runv/internal/mountns"
	"runv/internal/network"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes network namespaces, which takes root")
	}
}

// newNamespace makes a namespace whose lo is up. It is gone when the test ends and nothing else holds it.
func newNamespace(t *testing.T) *network.Namespace {
	t.Helper()
	needRoot(t)
	var file *os.File
	assert.NilError(t, mountns.OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	}))
	t.Cleanup(func() { file.Close() })
	ns, err := network.Open(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	assert.NilError(t, err)
	t.Cleanup(func() { ns.Close() })
	run(t, ns, "ip link set lo up")
	return ns
}

// run runs commands in a namespace, one a line.
func run(t *testing.T, ns *network.Namespace, script string) {
	t.Helper()
	if out, err := try(ns, script); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// try is run for commands that may fail.
func try(ns *network.Namespace, script string) (string, error) {
	var out []byte
	err := ns.Do(func() (err error) {
		// The child is forked by this thread, and is in its namespace.
		out, err = exec.Command("sh", "-ec", script).CombinedOutput()
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s: %w", script, err)
	}
	return string(out), err
}

// pair makes a pair of veths: eth0 in ns with an address, and out in a namespace of its own.
func pair(t *testing.T, ns *network.Namespace) (peer *network.Namespace) {
	t.Helper()
	peer = newNamespace(t)
	veth(t, ns, "eth0", peer, "out")
	run(t, ns, `ip link set eth0 address 02:00:00:00:00:01
		ip addr add 10.1.0.2/24 brd + dev eth0
		ip addr add fd00:1::2/64 dev eth0 nodad
		ip link set eth0 up`)
	run(t, peer, `ip addr add 10.1.0.1/24 dev out
		ip addr add fd00:1::1/64 dev out nodad
		ip link set out up`)
	return peer
}

func veth(t *testing.T, ns *network.Namespace, name string, peer *network.Namespace, peerName string) {
	t.Helper()
	file, err := os.Open(peer.Path())
	assert.NilError(t, err)
	defer file.Close()
	h := handle(t, ns)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	assert.NilError(t, h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peerName, PeerNamespace: netlink.NsFd(file.Fd())}))
}

func handle(t *testing.T, ns *network.Namespace) *netlink.Handle {
	t.Helper()
	h, err := ns.Handle()
	assert.NilError(t, err)
	t.Cleanup(h.Close)
	return h
}

// move moves an interface to another namespace.
func move(t *testing.T, from, to *network.Namespace, name string) {
	t.Helper()
	file, err := os.Open(to.Path())
	assert.NilError(t, err)
	defer file.Close()
	h := handle(t, from)
	link, err := h.LinkByName(name)
	assert.NilError(t, err)
	assert.NilError(t, h.LinkSetNsFd(link, int(file.Fd())))
}

// machine plays a VM: it keeps the taps of its cards open as a VMM does.
type machine struct {
	mu    sync.Mutex
	cards map[string]hypervisor.NIC
	// onAttach, if set, can make Attach fail.
	onAttach func(hypervisor.NIC) error
	onDetach func(ctx context.Context, id string) error
	dead     bool
}

func (v *machine) Attach(ctx context.Context, dev hypervisor.Device) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	nic := dev.(hypervisor.NIC)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case v.dead:
		return errdefs.ErrFailedPrecondition
	case v.cards[nic.ID].ID != "":
		return errdefs.ErrAlreadyExists
	}
	if v.onAttach != nil {
		if err := v.onAttach(nic); err != nil {
			return err
		}
	}
	var taps []*os.File
	for _, f := range nic.Taps {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		taps = append(taps, os.NewFile(uintptr(fd), f.Name()))
	}
	nic.Taps = taps
	if v.cards == nil {
		v.cards = make(map[string]hypervisor.NIC)
	}
	v.cards[nic.ID] = nic
	return nil
}

func (v *machine) Detach(ctx context.Context, id string) error {
	v.mu.Lock()
	f := v.onDetach
	if v.dead {
		f = nil
	}
	v.mu.Unlock()
	if f != nil {
		if err := f(ctx, id); err != nil {
			return err
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dead {
		return errdefs.ErrFailedPrecondition
	}
	nic, ok := v.cards[id]
	if !ok {
		return errdefs.ErrNotFound
	}
	closeTaps(nic)
	delete(v.cards, id)
	return nil
}

// kill ends the VM.
func (v *machine) kill() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, nic := range v.cards {
		closeTaps(nic)
	}
	v.cards, v.dead = nil, true
}

func closeTaps(nic hypervisor.NIC) {
	for _, f := range nic.Taps {
		f.Close()
	}
}

// card is the one with an address.
func (v *machine) card(mac []byte) (hypervisor.NIC, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, nic := range v.cards {
		if slices.Equal(nic.MAC, net.HardwareAddr(mac)) {
			return nic, true
		}
	}
	return hypervisor.NIC{}, false
}

func (v *machine) count() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.cards)
}

// guest remembers what it was told, and checks what the agent would.
type guest struct {
	vm *machine

	mu      sync.Mutex
	last    *agentv1.ApplyNetworkRequest
	applies int
	removed bool
	err     error  // that Apply answers
	hidden  string // an interface whose device does not appear
	onApply func(context.Context) error
	// problems that the guest has; it is hostile.
	problems []string
}

func (g *guest) Apply(ctx context.Context, r *agentv1.ApplyNetworkRequest) (*agentv1.ApplyNetworkResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if f := g.onApply; f != nil {
		g.mu.Unlock()
		defer g.mu.Lock()
		return nil, f(ctx)
	}
	g.applies++
	if g.err != nil {
		return nil, g.err
	}
	if _, err := proto.Marshal(r); err != nil {
		return nil, err
	}
	answer := &agentv1.ApplyNetworkResponse{Problems: g.problems}
	for _, i := range r.Interfaces {
		if _, ok := g.vm.card(i.DeviceMac); i.Name != "lo" && !ok || i.Name == g.hidden {
			answer.Missing = append(answer.Missing, i.Name)
		}
	}
	g.last = proto.CloneOf(r)
	return answer, nil
}

func (g *guest) Remove(context.Context, *agentv1.RemoveNetworkRequest) (*agentv1.RemoveNetworkResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removed = true
	return &agentv1.RemoveNetworkResponse{}, nil
}

func (g *guest) request() *agentv1.ApplyNetworkRequest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last
}

func (g *guest) find(name string) *agentv1.Interface {
	for _, i := range g.request().GetInterfaces() {
		if i.Name == name {
			return i
		}
	}
	return nil
}

func (g *guest) names() []string {
	var names []string
	for _, i := range g.request().GetInterfaces() {
		names = append(names, i.Name)
	}
	return names
}

// rig is a mirror with all that it works on.
type rig struct {
	*network.Mirror
	ns      *network.Namespace
	vm      *machine
	guest   *guest
	records []network.Record
}

func newRig(t *testing.T, ns *network.Namespace, change func(*network.Config)) *rig {
	t.Helper()
	r := &rig{ns: ns, vm: &machine{}}
	r.guest = &guest{vm: r.vm}
	cfg := network.Config{
		ID: "net0", Namespace: ns, Queues: 1, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Save: func(rec network.Record) error { r.records = append(r.records, rec); return nil },
	}
	if change != nil {
		change(&cfg)
	}
	r.Mirror = network.New(cfg)
	t.Cleanup(func() {
		assert.Check(t, r.Close(context.Background()))
		r.vm.kill()
	})
	return r
}

// start is newRig, started.
func start(t *testing.T, ns *network.Namespace, change func(*network.Config)) *rig {
	t.Helper()
	r := newRig(t, ns, change)
	assert.NilError(t, r.Start(context.Background(), r.vm, r.guest))
	return r
}

// await waits until the guest was told.
func (r *rig) await(t *testing.T, what string, done func() bool) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if done() {
			return poll.Success()
		}
		return poll.Continue("%s; the guest has %v", what, r.guest.request())
	}, poll.WithDelay(5*time.Millisecond), poll.WithTimeout(20*time.Second))
}

// state is what a namespace has that a mirror might leave behind.
func state(t *testing.T, ns *network.Namespace) string {
	t.Helper()
	out, err := try(ns, `ip -o link | sed 's/^[0-9]*: //; s/@.*mtu/ mtu/; s/ state [A-Z]*//'
		tc qdisc show | sed 's/[0-9]*: //' | grep -v noqueue || true
		for l in $(ip -o link | sed 's/^[0-9]*: \([^:@]*\).*/\1/'); do tc filter show dev $l ingress; done | sed 's/index [0-9]* //'
		ip -d -o link | grep -o 'promiscuity [0-9]* .*allmulti [0-9]*' | sed 's/min.*//' | sort -u`)
	assert.NilError(t, err, out)
	return out
}

func files(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	return len(entries)
}

func contains(t *testing.T, err error, text string) {
	t.Helper()
	assert.ErrorContains(t, err, text)
	assert.Assert(t, !strings.Contains(err.Error(), "\n"), err.Error())
}

var errTest = errors.New("no more slots")

// bytesOf is an address as messages have it.
func bytesOf(ip string) []byte {
	if ip == "" {
		return nil
	}
	return netip.MustParseAddr(ip).AsSlice()
}

var agentIP = net.UDPAddr{IP: net.IPv4(10, 1, 0, 2), Port: 9}
