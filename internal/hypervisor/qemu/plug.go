package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu/qmp"
)

const (
	detachTimeout = 30 * time.Second // for the guest to let go of a device
	undoTimeout   = 5 * time.Second
)

// slot is where a device can be plugged: its number among all slots of all bridges.
type slot int

// Slots. A kernel gives a bridge addresses for what may be plugged behind it one day only if something is there
// already; as 1 MiB is the least that a bridge can have, that is room enough for all others. So the agent channel
// is the first behind the first bridge, and the first share the first behind the second, which there is not without
// shares.
const (
	bridgeSlots = 31 // of a bridge's 32, all but that of its own controller
	bridgeCount = 2

	channelSlot slot = 0
	shareSlot   slot = bridgeSlots
)

func (s slot) bus() string { return bridgeName(int(s) / bridgeSlots) }

func (s slot) addr() string { return "0x" + strconv.FormatInt(int64(s)%bridgeSlots+1, 16) }

func bridgeName(i int) string { return "bridge" + strconv.Itoa(i) }

// bridges is how many bridges a machine has.
func bridges(shares int) int {
	if shares == 0 {
		return 1
	}
	return bridgeCount
}

// slotOfShare is where the i-th share of Config.Shares is.
func slotOfShare(i int) slot { return shareSlot + slot(i) }

// device is what is plugged, or being plugged, into a slot.
type device struct {
	kind    hypervisor.DeviceKind
	slot    slot
	deleted chan struct{} // closed when the guest has let go of it
	once    sync.Once
	busy    bool // an Attach or Detach is at work; guarded by vm.mu
	asked   bool // the guest was asked to let go; guarded by vm.mu
}

func newDevice(kind hypervisor.DeviceKind, at slot) *device {
	return &device{kind: kind, slot: at, deleted: make(chan struct{})}
}

func (d *device) setDeleted() { d.once.Do(func() { close(d.deleted) }) }

// undoList is what takes back what was done, in reverse.
type undoList []func(context.Context) error

func (u *undoList) add(f func(context.Context) error) { *u = append(*u, f) }

// run undoes all and joins the errors with err. What a VM that has ended keeps is no error.
func (u *undoList) run(ctx context.Context, err error) error {
	for _, f := range slices.Backward(*u) {
		if uerr := f(ctx); uerr != nil && !errors.Is(uerr, errdefs.ErrFailedPrecondition) {
			err = errors.Join(err, uerr)
		}
	}
	return err
}

// Attach implements hypervisor.VM.
func (v *vm) Attach(ctx context.Context, dev hypervisor.Device) error {
	if err := v.attach(ctx, dev); err != nil {
		return fmt.Errorf("attach %s %s: %w", dev.DeviceKind(), dev.DeviceID(), err)
	}
	return nil
}

func (v *vm) attach(ctx context.Context, dev hypervisor.Device) error {
	var plug func(ctx context.Context, at slot, undo *undoList) error
	var err error
	switch dev := dev.(type) {
	case hypervisor.Share:
		err = validateShare(dev)
		plug = func(ctx context.Context, at slot, undo *undoList) error { return v.plugShare(ctx, dev, at, undo) }
	case hypervisor.NIC:
		err = dev.Validate()
		plug = func(ctx context.Context, at slot, undo *undoList) error { return v.plugNIC(ctx, dev, at, undo) }
	default:
		return hypervisor.Errorf(errdefs.ErrNotImplemented, "the qemu driver does not plug devices of this kind")
	}
	if err != nil {
		return err
	}
	id := dev.DeviceID()
	d, err := v.reserve(id, dev.DeviceKind())
	if err != nil {
		return err
	}
	var undo undoList
	if err := plug(ctx, d.slot, &undo); err != nil {
		// What QEMU may have done is taken back even when ctx has ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		err = undo.run(ctx, err)
		v.drop(id)
		return err
	}
	v.idle(d)
	return nil
}

// sendFile is qmp.Client.SendFile within commandTimeout.
func (v *vm) sendFile(ctx context.Context, name string, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return v.ended(v.qmp.SendFile(ctx, name, f))
}

// closeFile makes QEMU close a file that it was sent, unless something has taken it.
func (v *vm) closeFile(ctx context.Context, name string) {
	_ = v.execute(ctx, "closefd", map[string]string{"fdname": name})
}

// Detach implements hypervisor.VM.
func (v *vm) Detach(ctx context.Context, id string) error {
	if err := v.detach(ctx, id); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	return nil
}

func (v *vm) detach(ctx context.Context, id string) error {
	d, again, err := v.claim(id)
	if err != nil {
		return err
	}
	defer v.idle(d)
	ctx, cancel := context.WithTimeout(ctx, detachTimeout)
	defer cancel()
	var refused *qmp.Error
	err = v.execute(ctx, "device_del", map[string]string{"id": deviceName(id)})
	if err != nil && (!again || !errors.As(err, &refused)) { // refused as it is under way already
		return err
	}
	select {
	case <-d.deleted:
	case <-v.done:
		return hypervisor.Errorf(errdefs.ErrFailedPrecondition, "VM has ended")
	case <-ctx.Done():
		return fmt.Errorf("wait for the guest: %w", context.Cause(ctx))
	}
	remove := v.removeChardev
	if d.kind == hypervisor.KindNIC {
		remove = v.removeNetdev
	}
	if err := remove(ctx, id); err != nil {
		return err
	}
	v.drop(id)
	return nil
}

// reserve takes a free slot for a new device, which is busy until idle or drop.
func (v *vm) reserve(id string, kind hypervisor.DeviceKind) (*device, error) {
	select {
	case <-v.done:
		return nil, hypervisor.Errorf(errdefs.ErrFailedPrecondition, "VM has ended")
	default:
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.devices[id]; ok {
		return nil, hypervisor.Errorf(errdefs.ErrAlreadyExists, "device is there already")
	}
	used := map[slot]bool{channelSlot: true}
	for _, d := range v.devices {
		used[d.slot] = true
	}
	for at := range slot(v.slots) {
		if !used[at] {
			d := newDevice(kind, at)
			d.busy = true
			v.devices[id] = d
			return d, nil
		}
	}
	return nil, hypervisor.Errorf(errdefs.ErrResourceExhausted, "all %d slots for devices are in use", v.slots)
}

// claim makes a device busy for a Detach. again tells that the guest was asked
// before.
func (v *vm) claim(id string) (d *device, again bool, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	d, ok := v.devices[id]
	switch {
	case !ok:
		return nil, false, hypervisor.Errorf(errdefs.ErrNotFound, "no such device")
	case d.busy:
		return nil, false, hypervisor.Errorf(errdefs.ErrFailedPrecondition, "device is being attached or detached")
	}
	again = d.asked
	d.busy, d.asked = true, true
	return d, again, nil
}

func (v *vm) idle(d *device) {
	v.mu.Lock()
	d.busy = false
	v.mu.Unlock()
}

func (v *vm) drop(id string) {
	v.mu.Lock()
	delete(v.devices, id)
	v.mu.Unlock()
}
