package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu/qmp"
	"runv/internal/unixsock"
)

const (
	retryInterval = 5 * time.Millisecond
	maxTag        = 36 // bytes, VIRTIO 1.2, section 5.11.4
)

func validateShare(s hypervisor.Share) error {
	if err := hypervisor.ValidateDeviceID(s.ID); err != nil {
		return err
	}
	if s.Tag == "" || len(s.Tag) > maxTag {
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

// plugShare plugs a share into a slot.
func (v *vm) plugShare(ctx context.Context, s hypervisor.Share, at slot, undo *undoList) error {
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
		v.closeFile(ctx, chardev) // gone if chardev-add took it
		return err
	}
	undo.add(func(ctx context.Context) error { return v.removeChardev(ctx, s.ID) })
	return v.execute(ctx, "device_add", map[string]any{
		"driver": "vhost-user-fs-pci", "id": deviceName(s.ID), "chardev": chardev, "tag": s.Tag, "queue-size": shareQueueSize,
		"bus": at.bus(), "addr": at.addr(),
	})
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
