package factory_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gotest.tools/v3/assert"

	"runv/internal/factory"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/fake"
	"runv/internal/transport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func config(t *testing.T) hypervisor.Config {
	return hypervisor.Config{ID: "p", Accel: hypervisor.TCG, VCPUs: 1, MemoryBytes: 512 << 20, RunDir: t.TempDir()}
}

func get(t *testing.T, timeout time.Duration, guest func(*fake.VM, net.Conn)) (*factory.VM, *fake.Driver, error) {
	t.Helper()
	driver := &fake.Driver{Guest: guest}
	vm, err := factory.Direct{Driver: driver, BootTimeout: timeout}.Get(t.Context(), config(t), func(hypervisor.VM) {})
	return vm, driver, err
}

func TestGetReturnsWhenTheAgentAnswers(t *testing.T) {
	vm, _, err := get(t, 10*time.Second, func(_ *fake.VM, channel net.Conn) {
		if s, err := transport.Guest(channel); err == nil {
			<-s.Done()
		}
	})
	assert.NilError(t, err)
	assert.Equal(t, len(vm.Phases), 2)
	assert.NilError(t, vm.Agent.Close())
	assert.NilError(t, vm.Stop(t.Context()))
}

// listen reads until the channel ends.
func listen(channel net.Conn) {
	for {
		if _, err := channel.Read(make([]byte, 1<<10)); err != nil {
			return
		}
	}
}

func TestGetFailsWithTheGuestsLastWords(t *testing.T) {
	for _, tc := range []struct {
		name    string
		timeout time.Duration
		guest   func(*fake.VM, net.Conn)
		want    string
	}{
		{"silent", 50 * time.Millisecond, func(vm *fake.VM, channel net.Conn) {
			vm.Print("waiting for godot")
			listen(channel)
		}, "agent did not answer in 50ms; console: waiting for godot"},
		{"panic", time.Minute, func(vm *fake.VM, _ net.Conn) {
			vm.Print("Kernel panic - not syncing")
			go vm.Crash("exit status 1")
		}, "Kernel panic - not syncing"},
		{"power off", time.Minute, func(vm *fake.VM, _ net.Conn) {
			vm.Print("bye")
			go vm.PowerOff()
		}, "powered itself off during boot; console: bye"},
		{"deaf", time.Minute, func(_ *fake.VM, channel net.Conn) { channel.Close() }, "agent handshake"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, driver, err := get(t, tc.timeout, tc.guest)
			assert.ErrorContains(t, err, tc.want)
			for _, vm := range driver.VMs() {
				<-vm.Done()
			}
		})
	}
}

func TestGetEndsWithItsContext(t *testing.T) {
	driver := &fake.Driver{Guest: func(_ *fake.VM, channel net.Conn) { listen(channel) }}
	gone := errors.New("caller is gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(gone) })
	_, err := factory.Direct{Driver: driver, BootTimeout: time.Minute}.Get(ctx, config(t), func(hypervisor.VM) {})
	assert.ErrorIs(t, err, gone)
	<-driver.VMs()[0].Done()
}
