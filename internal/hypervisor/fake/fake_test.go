package fake_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/fake"
	"runv/internal/hypervisor/hvtest"
	"runv/internal/hypervisor/hvtest/testguest/protocol"
)

func TestConformance(t *testing.T) {
	hvtest.Run(t, hvtest.Harness{
		Driver: &fake.Driver{Guest: func(vm *fake.VM, channel net.Conn) {
			_ = protocol.Serve(channel, guest{vm}) // ends with the VM
		}},
		Config: config,
		ServeShare: func(_ *testing.T, dir string) string {
			return dir // the guest below reads it
		},
		NewWire: func(_ *testing.T, queues int) hvtest.Wire {
			return hvtest.Wire{Taps: make([]*os.File, queues)} // nobody looks at them
		},
		KillVMM: func(_ *testing.T, vm hypervisor.VM) {
			vm.(*fake.VM).Crash("signal: killed")
		},
	})
}

func config(t *testing.T) hypervisor.Config {
	return hypervisor.Config{
		ID: "test", Accel: hypervisor.TCG, VCPUs: 1, MemoryBytes: 64 << 20, RunDir: t.TempDir(),
	}
}

// guest is a test guest in this process.
type guest struct{ vm *fake.VM }

func (g guest) Console(text string) error {
	g.vm.Print(text)
	return nil
}

func (g guest) Read(tag, file string) (string, error) {
	for _, dev := range g.vm.Devices() {
		if share, ok := dev.(hypervisor.Share); ok && share.Tag == tag {
			text, err := os.ReadFile(filepath.Join(share.Socket, file))
			return string(text), err
		}
	}
	return "", fmt.Errorf("no share %s", tag)
}

func (g guest) Size() (int, int64, error) {
	size := g.vm.Size()
	return size.VCPUs, size.MemoryBytes >> 20, nil
}

func (guest) Release(string) error { return nil }

func (g guest) NIC(mac, _ string) (mtu, queues int, err error) {
	for _, dev := range g.vm.Devices() {
		if nic, ok := dev.(hypervisor.NIC); ok && nic.MAC.String() == mac {
			return max(nic.MTU, 1500), len(nic.Taps), nil
		}
	}
	return 0, 0, fmt.Errorf("no network device %s", mac)
}

func (g guest) NICs() (n int, err error) {
	for _, dev := range g.vm.Devices() {
		if dev.DeviceKind() == hypervisor.KindNIC {
			n++
		}
	}
	return n, nil
}

func (guest) Busy(time.Duration) error { return nil }

func (g guest) PowerOff() error {
	g.vm.PowerOff()
	return nil
}

func (g guest) Panic() error {
	g.vm.Print("Kernel panic - not syncing: sysrq triggered crash")
	g.vm.Crash("guest kernel panicked")
	return nil
}

func TestHooks(t *testing.T) {
	refused := errors.New("refused")
	driver := &fake.Driver{
		OnStart: func(_ context.Context, cfg hypervisor.Config) error {
			if cfg.ID == "bad" {
				return refused
			}
			return nil
		},
		OnAttach: func(context.Context, hypervisor.Device) error { return refused },
	}
	cfg := config(t)
	cfg.ID = "bad"
	_, err := driver.Start(t.Context(), cfg)
	assert.ErrorIs(t, err, refused)

	vm, err := driver.Start(t.Context(), config(t))
	assert.NilError(t, err)
	assert.ErrorIs(t, vm.Attach(t.Context(), hypervisor.Share{ID: "a", Tag: "a"}), refused)
	assert.NilError(t, vm.Pause(t.Context()))
	assert.Equal(t, len(driver.VMs()), 1)
	assert.Assert(t, driver.VMs()[0].Paused())
	driver.VMs()[0].Crash("exit status 3")
	<-vm.Done()
	assert.ErrorContains(t, vm.Err(), "exit status 3")
}
