package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu/qmp"
	"runv/internal/unixsock"
)

const (
	detachTimeout = 30 * time.Second // for the guest to let go of a device
	undoTimeout   = 5 * time.Second
	retryInterval = 5 * time.Millisecond
	maxTag        = 36 // bytes, VIRTIO 1.2, section 5.11.4
)

var deviceIDPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// device is what is plugged, or being plugged, into a port.
type device struct {
	port    int
	deleted chan struct{} // closed when the guest has let go of it
	once    sync.Once
	busy    bool // an Attach or Detach is at work; guarded by vm.mu
	asked   bool // the guest was asked to let go; guarded by vm.mu
}

func newDevice(port int) *device {
	return &device{port: port, deleted: make(chan struct{})}
}

func (d *device) setDeleted() { d.once.Do(func() { close(d.deleted) }) }

func validateShare(s hypervisor.Share) error {
	switch {
	case !deviceIDPattern.MatchString(s.ID):
		return hypervisor.Errorf(errdefs.ErrInvalidArgument, "device id %q: small letters, digits and dashes only, at most 32", s.ID)
	case s.Tag == "" || len(s.Tag) > maxTag:
		return hypervisor.Errorf(errdefs.ErrInvalidArgument, "share %s: tag %q: not between 1 and %d bytes", s.ID, s.Tag, maxTag)
	}
	return nil
}

// dialShare connects to a share's daemon. The caller closes the result.
func dialShare(ctx context.Context, s hypervisor.Share) (*os.File, error) {
	conn, err := unixsock.Dial(ctx, filepath.Dir(s.Socket), filepath.Base(s.Socket), "unix")
	if err != nil {
		return nil, fmt.Errorf("connect share %s: %w", s.ID, err)
	}
	defer conn.Close()
	f, err := conn.File() // a duplicate
	if err != nil {
		return nil, fmt.Errorf("connect share %s: %w", s.ID, err)
	}
	return f, nil
}

// Attach implements hypervisor.VM.
func (v *vm) Attach(ctx context.Context, dev hypervisor.Device) error {
	share, ok := dev.(hypervisor.Share)
	if !ok {
		return hypervisor.Errorf(errdefs.ErrNotImplemented,
			"attach %s %s: the qemu driver does not plug devices of this kind", dev.DeviceKind(), dev.DeviceID())
	}
	if err := v.attachShare(ctx, share); err != nil {
		return fmt.Errorf("attach share %s: %w", share.ID, err)
	}
	return nil
}

func (v *vm) attachShare(ctx context.Context, s hypervisor.Share) (err error) {
	if err := validateShare(s); err != nil {
		return err
	}
	d, err := v.reserve(s.ID)
	if err != nil {
		return err
	}
	undo := []func(context.Context) error{
		func(context.Context) error { v.drop(s.ID); return nil },
	}
	defer func() {
		if err == nil {
			v.idle(d)
			return
		}
		// What QEMU may have done is taken back even when ctx has ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		for _, u := range slices.Backward(undo) {
			if uerr := u(ctx); uerr != nil && !errors.Is(uerr, errdefs.ErrFailedPrecondition) {
				err = errors.Join(err, uerr)
			}
		}
	}()

	f, err := dialShare(ctx, s)
	if err != nil {
		return err
	}
	defer f.Close()
	chardev := chardevName(s.ID)
	if err := v.sendFile(ctx, chardev, f); err != nil {
		return err
	}
	if err := v.execute(ctx, "chardev-add", map[string]any{
		"id": chardev,
		"backend": map[string]any{"type": "socket", "data": map[string]any{
			"addr":   map[string]any{"type": "fd", "data": map[string]any{"str": chardev}},
			"server": false,
		}},
	}); err != nil {
		_ = v.execute(ctx, "closefd", map[string]string{"fdname": chardev}) // gone if chardev-add took it
		return err
	}
	undo = append(undo, func(ctx context.Context) error { return v.removeChardev(ctx, s.ID) })
	if err := v.execute(ctx, "device_add", map[string]string{
		"driver": "vhost-user-fs-pci", "id": deviceName(s.ID), "chardev": chardev, "tag": s.Tag, "bus": portName(d.port),
	}); err != nil {
		return err
	}
	return nil
}

// sendFile is qmp.Client.SendFile within commandTimeout.
func (v *vm) sendFile(ctx context.Context, name string, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return v.ended(v.qmp.SendFile(ctx, name, f))
}

// removeChardev removes a share's backend. QEMU lets go of it a moment after it
// told that the device is deleted, so a refusal is not final before ctx ends.
func (v *vm) removeChardev(ctx context.Context, id string) error {
	for {
		err := v.execute(ctx, "chardev-remove", map[string]string{"id": chardevName(id)})
		var refused *qmp.Error
		if err == nil || !errors.As(err, &refused) {
			return err
		}
		timer := time.NewTimer(retryInterval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
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
	if err := v.removeChardev(ctx, id); err != nil {
		return err
	}
	v.drop(id)
	return nil
}

// reserve takes a free port for a new device, which is busy until idle or drop.
func (v *vm) reserve(id string) (*device, error) {
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
	var used [portCount]bool
	for _, d := range v.devices {
		used[d.port] = true
	}
	for port, taken := range used {
		if !taken {
			d := newDevice(port)
			d.busy = true
			v.devices[id] = d
			return d, nil
		}
	}
	return nil, hypervisor.Errorf(errdefs.ErrResourceExhausted, "all %d hot-plug ports are in use", portCount)
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
