// Package hvtest is the suite that every hypervisor.Driver passes. The test of a
// driver calls Run with a Harness; the guests run the test guest (package
// testguest).
//
// Each case also proves that it left no goroutine, descriptor or child behind.
package hvtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"gotest.tools/v3/assert"

	"runv/internal/hypervisor"
)

// limit bounds each wait of the suite. A guest boots in two seconds where nothing
// else runs.
const limit = 60 * time.Second

// Harness is a driver and what the suite needs around it.
type Harness struct {
	Driver hypervisor.Driver
	// Config is a configuration that works, for a guest that runs the test guest.
	Config func(t *testing.T) hypervisor.Config
	// ServeShare serves a directory to one VM and returns what goes into
	// Share.Socket. It ends with the VM or with the test.
	ServeShare func(t *testing.T, dir string) string
	// NewWire makes a tap device with that many queues, which ends with the test at the latest.
	NewWire func(t *testing.T, queues int) Wire
	// KillVMM ends the VMM behind the driver's back, as by SIGKILL.
	KillVMM func(t *testing.T, vm hypervisor.VM)
	// PauseFreezes tells that a paused guest does not answer.
	PauseFreezes bool
}

// Wire is a tap device of the host.
type Wire struct {
	Taps []*os.File // its queues; Close closes them
	// Address is what the guest's device shall have.
	Address netip.Prefix
	// Ping waits for the guest's answer through the device; nil: nothing travels on this wire.
	Ping func(t *testing.T)
}

// Close closes what the driver has no need of after Attach.
func (w Wire) Close() {
	for _, f := range w.Taps {
		f.Close()
	}
}

// Run runs the suite. It takes three boots of a guest.
func Run(t *testing.T, h Harness) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, h Harness)
	}{
		{"Describe", testDescribe},
		{"RefuseConfig", testRefuseConfig},
		{"StartCancelled", testStartCancelled},
		{"SameShareTwice", testSameShareTwice},
		{"StopAtOnce", testStopAtOnce},
		{"StopWithoutTime", testStopWithoutTime},
		{"Kill", testKill},
		{"VMMKilled", testVMMKilled},
		{"TwoVMs", testTwoVMs},
		{"Running", testRunning},
		{"PowerOff", testPowerOff},
		{"Panic", testPanic},
	} {
		t.Run(c.name, func(t *testing.T) {
			expectNothingLeft(t)
			c.run(t, h)
		})
	}
}

func testDescribe(t *testing.T, h Harness) {
	assert.Assert(t, h.Driver.Name() != "")
	caps := h.Driver.Capabilities()
	assert.Assert(t, len(caps.Accels) > 0)
	for _, kind := range []hypervisor.DeviceKind{hypervisor.KindShare, hypervisor.KindNIC} {
		assert.Assert(t, slices.Contains(caps.HotPlug, kind), "%s", kind)
	}
}

func testRefuseConfig(t *testing.T, h Harness) {
	for _, c := range []struct {
		name   string
		change func(*hypervisor.Config)
		is     func(error) bool
	}{
		{"no vcpu", func(c *hypervisor.Config) { c.VCPUs = 0 }, errdefs.IsInvalidArgument},
		{"little memory", func(c *hypervisor.Config) { c.MemoryBytes = 1 << 20 }, errdefs.IsInvalidArgument},
		{"unknown accelerator", func(c *hypervisor.Config) { c.Accel = "abacus" }, errdefs.IsInvalidArgument},
		{"no kernel", func(c *hypervisor.Config) { c.Kernel = filepath.Join(c.RunDir, "nowhere") }, errdefs.IsNotFound},
		{"no initramfs", func(c *hypervisor.Config) { c.Initrd = filepath.Join(c.RunDir, "nowhere") }, errdefs.IsNotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := h.Config(t)
			c.change(&cfg)
			vm, err := h.Driver.Start(t.Context(), cfg)
			assert.Assert(t, vm == nil)
			assert.Assert(t, c.is(err), "%v", err)
			assert.ErrorContains(t, err, cfg.ID)
		})
	}
}

func testStartCancelled(t *testing.T, h Harness) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	vm, err := h.Driver.Start(ctx, h.Config(t))
	assert.Assert(t, vm == nil)
	assert.ErrorIs(t, err, context.Canceled)
}

func testSameShareTwice(t *testing.T, h Harness) {
	cfg := h.Config(t)
	cfg.Shares = []hypervisor.Share{{ID: "a", Tag: "a", Socket: h.ServeShare(t, t.TempDir())}}
	cfg.Shares = append(cfg.Shares, cfg.Shares[0])
	vm, err := h.Driver.Start(t.Context(), cfg)
	assert.Assert(t, vm == nil)
	assert.Assert(t, errdefs.IsAlreadyExists(err), "%v", err)
}

func testStopAtOnce(t *testing.T, h Harness) {
	vm := start(t, h.Driver, h.Config(t))
	assert.NilError(t, vm.Err())
	info := vm.Info()
	assert.Assert(t, len(info.Command) > 0 && info.Version != "", "%+v", info)
	assert.NilError(t, vm.Stop(t.Context()))
	expectEnded(t, vm)
	assert.NilError(t, vm.Err())
}

// A stop whose context has ended does not wait, and still ends the VM.
func testStopWithoutTime(t *testing.T, h Harness) {
	vm := start(t, h.Driver, h.Config(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := vm.Stop(ctx); err != nil {
		assert.ErrorIs(t, err, context.Canceled)
	}
	waitEnd(t, vm)
	assert.NilError(t, vm.Err())
}

func testKill(t *testing.T, h Harness) {
	vm := start(t, h.Driver, h.Config(t))
	assert.NilError(t, vm.Kill())
	waitEnd(t, vm)
	assert.NilError(t, vm.Err())
	expectEnded(t, vm)
}

func testVMMKilled(t *testing.T, h Harness) {
	vm := start(t, h.Driver, h.Config(t))
	h.KillVMM(t, vm)
	waitEnd(t, vm)
	var exit *hypervisor.ExitError
	assert.Assert(t, errors.As(vm.Err(), &exit), "%v", vm.Err())
	assert.Equal(t, exit.Status, "signal: killed")
	assert.Assert(t, exit.After > 0)
	expectEnded(t, vm)
	assert.Assert(t, errors.As(vm.Err(), &exit), "a Stop after the end does not change it")
}

func testTwoVMs(t *testing.T, h Harness) {
	a, b := start(t, h.Driver, h.Config(t)), start(t, h.Driver, h.Config(t))
	assert.NilError(t, a.Stop(t.Context()))
	select {
	case <-b.Done():
		t.Fatal("the end of one VM ended the other:", b.Err())
	default:
	}
	assert.NilError(t, b.Pause(t.Context()))
	assert.NilError(t, b.Stop(t.Context()))
}

// testRunning is one guest's story.
func testRunning(t *testing.T, h Harness) {
	cfg := h.Config(t)
	cfg.MaxVCPUs, cfg.MaxMemoryBytes = cfg.VCPUs+1, cfg.MemoryBytes+512<<20
	vm := start(t, h.Driver, cfg)
	g := talk(t, vm)
	step := func(name string, run func(t *testing.T)) {
		if !t.Run(name, run) {
			t.FailNow()
		}
	}

	step("echo", func(t *testing.T) {
		assert.Equal(t, g.ask(t, "echo hello"), "hello")
		long := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
		assert.Assert(t, g.ask(t, "echo "+long) == long)
		assert.Assert(t, vm.Agent() == vm.Agent())
	})
	step("console", func(t *testing.T) {
		g.ask(t, "console this is the console")
		waitConsole(t, vm, "this is the console")
	})
	step("pause", func(t *testing.T) {
		for range 2 { // idempotent
			assert.NilError(t, vm.Pause(t.Context()))
		}
		if h.PauseFreezes {
			g.send(t, "echo thawed")
			assert.NilError(t, vm.Agent().SetReadDeadline(time.Now().Add(300*time.Millisecond)))
			_, err := g.answers.Peek(1)
			assert.Assert(t, errors.Is(err, os.ErrDeadlineExceeded), "a paused guest answered: %v", err)
		}
		for range 2 {
			assert.NilError(t, vm.Resume(t.Context()))
		}
		if h.PauseFreezes {
			assert.Equal(t, g.answer(t), "thawed")
		}
		assert.Equal(t, g.ask(t, "echo resumed"), "resumed")
	})
	step("resize", func(t *testing.T) { testResize(t, vm, g, cfg) })
	step("share", func(t *testing.T) {
		for i := range 3 { // an id and its port can be used again
			name := fmt.Sprintf("round %d", i)
			attach(t, h, vm, "data", name)
			assert.Equal(t, g.ask(t, "read data file"), name)
			assert.Assert(t, errdefs.IsAlreadyExists(vm.Attach(t.Context(), hypervisor.Share{ID: "data", Tag: "other"})))
			g.ask(t, "release data")
			detach(t, vm, "data")
		}
	})
	step("NIC", func(t *testing.T) { testNIC(t, h, vm, g) })
	step("refuse devices", func(t *testing.T) {
		ctx := t.Context()
		err := vm.Detach(ctx, "nothing")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
		for _, dev := range []hypervisor.Device{
			hypervisor.Disk{ID: "disk", Path: "/dev/null"},
		} {
			if !slices.Contains(h.Driver.Capabilities().HotPlug, dev.DeviceKind()) {
				err := vm.Attach(ctx, dev)
				assert.Assert(t, errdefs.IsNotImplemented(err), "%v", err)
			}
		}
		ended, cancel := context.WithCancel(ctx)
		cancel()
		err = vm.Attach(ended, hypervisor.Share{ID: "data", Tag: "data", Socket: h.ServeShare(t, t.TempDir())})
		assert.ErrorIs(t, err, context.Canceled)
		attach(t, h, vm, "data", "a failed attach left nothing")
		detach(t, vm, "data")
	})
	step("concurrent use", func(t *testing.T) {
		var all sync.WaitGroup
		for _, id := range []string{"x", "y"} {
			socket := h.ServeShare(t, t.TempDir())
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				check(t, vm.Attach(ctx, hypervisor.Share{ID: id, Tag: id, Socket: socket}))
				check(t, vm.Detach(ctx, id))
			})
		}
		for range 4 {
			all.Go(func() {
				check(t, vm.Resume(t.Context()))
				vm.Info()
				check(t, vm.Err())
				vm.Console().Tail(1)
			})
		}
		all.Wait()
		assert.Equal(t, g.ask(t, "echo fine"), "fine")
	})
	step("stop", func(t *testing.T) {
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { check(t, vm.Stop(t.Context())) })
		}
		all.Wait()
		assert.NilError(t, vm.Err())
		expectEnded(t, vm)
		waitConsole(t, vm, "this is the console")
	})
}

// nic is a network card on a wire.
func nic(id string, i int, w Wire) hypervisor.NIC {
	return hypervisor.NIC{ID: id, MAC: net.HardwareAddr{0x52, 0x54, 0, 0, 1, byte(i)}, Taps: w.Taps}
}

// attachNIC plugs a NIC and sees that it works in the guest, which has given it the largest MTU.
func attachNIC(t *testing.T, vm hypervisor.VM, g *guest, n hypervisor.NIC, w Wire) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	assert.NilError(t, vm.Attach(ctx, n))
	w.Close()
	assert.Equal(t, g.ask(t, fmt.Sprintf("nic %s %s", n.MAC, w.Address)), fmt.Sprintf("%d %d", max(n.MTU, 1500), len(n.Taps)))
	if w.Ping != nil {
		w.Ping(t)
	}
}

func testNIC(t *testing.T, h Harness, vm hypervisor.VM, g *guest) {
	for i := range 3 { // an id and its slot can be used again
		w := h.NewWire(t, 1)
		n := nic("eth", i, w)
		attachNIC(t, vm, g, n, w)
		err := vm.Attach(t.Context(), n)
		assert.Assert(t, errdefs.IsAlreadyExists(err), "%v", err)
		if i == 2 {
			g.ask(t, "busy 500")
		}
		detach(t, vm, "eth")
		assert.Equal(t, g.ask(t, "nics"), "0")
	}
	w := h.NewWire(t, 4)
	n := nic("jumbo", 9, w)
	n.MTU = 9000
	attachNIC(t, vm, g, n, w)
	detach(t, vm, "jumbo")
	w = h.NewWire(t, 1)
	defer w.Close()
	for _, change := range []func(*hypervisor.NIC){
		func(n *hypervisor.NIC) { n.ID = "A" },
		func(n *hypervisor.NIC) { n.MAC = nil },
		func(n *hypervisor.NIC) { n.MAC = net.HardwareAddr{1, 2, 3, 4, 5, 6} },
		func(n *hypervisor.NIC) { n.MTU = 67 },
		func(n *hypervisor.NIC) { n.Taps = nil },
		func(n *hypervisor.NIC) { n.VhostNet = make([]*os.File, 2) },
	} {
		n := nic("bad", 1, w)
		change(&n)
		err := vm.Attach(t.Context(), n)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
}

// testManyNICs plugs as many as a pod may have, and unplugs them together.
func testManyNICs(t *testing.T, h Harness, vm hypervisor.VM, g *guest) {
	const many = 50
	began := time.Now()
	for i := range many {
		w := h.NewWire(t, 1)
		attachNIC(t, vm, g, nic(fmt.Sprintf("nic%d", i), i, w), w)
	}
	t.Logf("%d NICs plugged and in use after %s", many, time.Since(began))
	assert.Equal(t, g.ask(t, "nics"), strconv.Itoa(many))
	began = time.Now()
	var all sync.WaitGroup
	for i := range many {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			check(t, vm.Detach(ctx, fmt.Sprintf("nic%d", i)))
		})
	}
	all.Wait()
	t.Logf("unplugged after %s", time.Since(began))
	assert.Equal(t, g.ask(t, "nics"), "0")
}

// testResize leaves a VM that is as large as it can be. What comes after shows that it works.
func testResize(t *testing.T, vm hypervisor.VM, g *guest, cfg hypervisor.Config) {
	r, ok := vm.(hypervisor.Resizer)
	if !ok {
		t.Skip("VMs of this driver do not grow")
	}
	size := func() (cpus int, mebibytes int64) {
		_, err := fmt.Sscan(g.ask(t, "size"), &cpus, &mebibytes)
		assert.NilError(t, err)
		return cpus, mebibytes
	}
	cpus, mebibytes := size()
	assert.Equal(t, cpus, cfg.VCPUs)
	first := hypervisor.Size{VCPUs: cfg.VCPUs, MemoryBytes: cfg.MemoryBytes}
	grow := func(want hypervisor.Size, full bool) hypervisor.Size {
		t.Helper()
		got, err := r.Resize(t.Context(), want)
		if full {
			assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
			assert.ErrorContains(t, err, cfg.ID)
		} else {
			assert.NilError(t, err)
			assert.Assert(t, got.VCPUs >= want.VCPUs && got.MemoryBytes >= want.MemoryBytes, "%+v", got)
		}
		assert.Equal(t, got.MemoryBytes, cfg.MemoryBytes+got.PluggedBytes)
		return got
	}
	assert.Equal(t, grow(first, false), first)
	assert.Equal(t, grow(hypervisor.Size{VCPUs: 1}, false), first, "nothing is taken away")
	got := grow(hypervisor.Size{VCPUs: cfg.VCPUs, MemoryBytes: cfg.MemoryBytes + 100<<20}, false)
	assert.Equal(t, got.VCPUs, cfg.VCPUs)
	got = grow(hypervisor.Size{VCPUs: 1 << 20, MemoryBytes: 1 << 60}, true)
	assert.Equal(t, got, hypervisor.Size{VCPUs: cfg.MaxVCPUs, MemoryBytes: cfg.MaxMemoryBytes, PluggedBytes: 512 << 20})
	assert.Equal(t, grow(got, false), got)
	// The guest is told a moment before it has it.
	for end := time.Now().Add(limit); ; <-time.After(10 * time.Millisecond) {
		c, m := size()
		if c == cpus+1 && m == mebibytes+512 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the guest has %d processors and %d MiB, had %d and %d", c, m, cpus, mebibytes)
		}
	}
}

// testPowerOff also has a share from the start, a NIC that is plugged while the guest boots, and many more.
func testPowerOff(t *testing.T, h Harness) {
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("there from the start"), 0o644))
	cfg := h.Config(t)
	cfg.Shares = []hypervisor.Share{{ID: "first", Tag: "first", Socket: h.ServeShare(t, dir)}}
	vm := start(t, h.Driver, cfg)
	w := h.NewWire(t, 1)
	early := nic("early", 77, w)
	assert.NilError(t, vm.Attach(t.Context(), early))
	w.Close()
	g := talk(t, vm)
	assert.Equal(t, g.ask(t, "read first file"), "there from the start")
	assert.Equal(t, g.ask(t, fmt.Sprintf("nic %s %s", early.MAC, w.Address)), "1500 1")
	detach(t, vm, "early")
	testManyNICs(t, h, vm, g)
	assert.Assert(t, errdefs.IsAlreadyExists(vm.Attach(t.Context(), cfg.Shares[0])))
	g.ask(t, "release first")
	detach(t, vm, "first")
	g.send(t, "poweroff")
	waitEnd(t, vm)
	assert.NilError(t, vm.Err())
}

func testPanic(t *testing.T, h Harness) {
	vm := start(t, h.Driver, h.Config(t))
	talk(t, vm).send(t, "panic")
	waitEnd(t, vm)
	var exit *hypervisor.ExitError
	assert.Assert(t, errors.As(vm.Err(), &exit), "%v", vm.Err())
	assert.Equal(t, exit.Status, "guest kernel panicked")
	assert.Assert(t, strings.Contains(strings.Join(exit.Console, "\n"), "Kernel panic"), "%q", exit.Console)
}

// start starts a VM that ends with the test at the latest.
func start(t *testing.T, driver hypervisor.Driver, cfg hypervisor.Config) hypervisor.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	vm, err := driver.Start(ctx, cfg)
	assert.NilError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("VMM: %q", vm.Info().Command)
			t.Logf("console: %q", vm.Console().Tail(20))
			t.Logf("end: %v", vm.Err())
		}
		check(t, vm.Kill())
		<-vm.Done()
	})
	return vm
}

// guest is the host's end of a talk with the test guest.
type guest struct {
	vm      hypervisor.VM
	answers *bufio.Reader
}

// talk waits for the guest.
func talk(t *testing.T, vm hypervisor.VM) *guest {
	t.Helper()
	g := &guest{vm, bufio.NewReader(vm.Agent())}
	assert.Equal(t, g.ask(t, "echo ready"), "ready")
	return g
}

func (g *guest) send(t *testing.T, request string) {
	t.Helper()
	assert.NilError(t, g.vm.Agent().SetDeadline(time.Now().Add(limit)))
	_, err := g.vm.Agent().Write([]byte(request + "\n"))
	assert.NilError(t, err)
}

func (g *guest) answer(t *testing.T) string {
	t.Helper()
	assert.NilError(t, g.vm.Agent().SetDeadline(time.Now().Add(limit)))
	line, err := g.answers.ReadString('\n')
	assert.NilError(t, err)
	status, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	assert.Equal(t, status, "ok", "%.200s", line)
	return text
}

func (g *guest) ask(t *testing.T, request string) string {
	t.Helper()
	g.send(t, request)
	return g.answer(t)
}

// attach plugs a share with a file called file, whose id is its tag.
func attach(t *testing.T, h Harness, vm hypervisor.VM, id, text string) {
	t.Helper()
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), []byte(text), 0o644))
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	assert.NilError(t, vm.Attach(ctx, hypervisor.Share{ID: id, Tag: id, Socket: h.ServeShare(t, dir)}))
}

func detach(t *testing.T, vm hypervisor.VM, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	assert.NilError(t, vm.Detach(ctx, id))
}

func waitEnd(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	select {
	case <-vm.Done():
	case <-time.After(limit):
		t.Fatal("the VM does not end")
	}
}

// waitConsole waits for a line, which travels apart from the agent's answers.
func waitConsole(t *testing.T, vm hypervisor.VM, line string) {
	t.Helper()
	for end := time.Now().Add(limit); !slices.Contains(vm.Console().Tail(50), line); {
		if time.Now().After(end) {
			t.Fatalf("not on the console: %q", line)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// expectEnded checks what the methods of a VM do after its end.
func expectEnded(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	select {
	case <-vm.Done():
	default:
		t.Fatal("Done is not closed")
	}
	ctx := t.Context()
	for name, err := range map[string]error{
		"pause":      vm.Pause(ctx),
		"resume":     vm.Resume(ctx),
		"attach":     vm.Attach(ctx, hypervisor.Share{ID: "late", Tag: "late", Socket: "/nowhere"}),
		"attach NIC": vm.Attach(ctx, nic("late", 1, Wire{Taps: make([]*os.File, 1)})),
		"resize":     resizeAfterEnd(ctx, vm),
	} {
		assert.Assert(t, errdefs.IsFailedPrecondition(err), "%s: %v", name, err)
	}
	assert.NilError(t, vm.Stop(ctx))
	assert.NilError(t, vm.Kill())
	_, err := vm.Agent().Write([]byte("x"))
	assert.Assert(t, errors.Is(err, net.ErrClosed) || err != nil)
	vm.Console().Tail(1)
}

func resizeAfterEnd(ctx context.Context, vm hypervisor.VM) error {
	r, ok := vm.(hypervisor.Resizer)
	if !ok {
		return errdefs.ErrFailedPrecondition
	}
	_, err := r.Resize(ctx, hypervisor.Size{VCPUs: 1 << 20})
	return err
}

// check is for goroutines, which must not end a test.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// expectNothingLeft compares goroutines, descriptors and children at the end of the
// test with now. Call it before anything that has a cleanup.
func expectNothingLeft(t *testing.T) {
	t.Helper()
	goroutines := goleak.IgnoreCurrent()
	before := held(t)
	t.Cleanup(func() {
		goleak.VerifyNone(t, goroutines)
		assert.DeepEqual(t, held(t), before)
	})
}

// held lists what this process holds that it would inherit or have to wait for.
func held(t *testing.T) []string {
	t.Helper()
	var all []string
	fds, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	for _, fd := range fds {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err != nil || strings.HasPrefix(target, "/proc/") || strings.HasPrefix(target, "anon_inode:[event") {
			continue // the listing itself, and the Go runtime's poller
		}
		all = append(all, "descriptor "+target)
	}
	children, err := filepath.Glob("/proc/self/task/*/children")
	assert.NilError(t, err)
	for _, file := range children {
		pids, _ := os.ReadFile(file) // a thread may end meanwhile
		for pid := range strings.FieldsSeq(string(pids)) {
			all = append(all, "child "+pid)
		}
	}
	slices.Sort(all)
	return all
}
