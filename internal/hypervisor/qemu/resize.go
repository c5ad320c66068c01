package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"runv/internal/hypervisor"
)

// Resize implements hypervisor.Resizer. Memory comes in pieces of dimmUnit.
func (v *vm) Resize(ctx context.Context, want hypervisor.Size) (hypervisor.Size, error) {
	select {
	case v.resizer <- struct{}{}:
		defer func() { <-v.resizer }()
	case <-ctx.Done():
		return v.sized(), fmt.Errorf("resize VM %s: %w", v.id, context.Cause(ctx))
	}
	// A command that is given up may be carried out all the same, and the size would not be known:
	// each has its own deadline.
	ctx = context.WithoutCancel(ctx)
	err := errors.Join(v.growMemory(ctx, want.MemoryBytes), v.growVCPUs(ctx, want.VCPUs))
	if err != nil {
		err = fmt.Errorf("resize VM %s: %w", v.id, err)
	}
	return v.sized(), err
}

func (v *vm) sized() hypervisor.Size {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.size
}

func (v *vm) grown(vcpus int, memory int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.size.VCPUs += vcpus
	v.size.MemoryBytes += memory
	v.size.PluggedBytes += memory
}

// growMemory plugs one piece: each takes one of the slots.
func (v *vm) growMemory(ctx context.Context, want int64) (err error) {
	have := v.sized()
	missing := want - have.MemoryBytes
	if missing <= 0 {
		return nil
	}
	room := v.limits.MemoryBytes - have.MemoryBytes
	piece := min(inDIMMs(missing), room)
	if piece > 0 {
		if err := v.plugMemory(ctx, piece); err != nil {
			return fmt.Errorf("plug %d MiB of memory: %w", piece>>20, err)
		}
	}
	if missing > piece {
		return hypervisor.Errorf(errdefs.ErrResourceExhausted, "%d MiB of memory are more than the %d MiB that the VM can have",
			want>>20, (have.MemoryBytes+room)>>20)
	}
	return nil
}

// inDIMMs rounds up to what can be plugged, in bytes.
func inDIMMs(n int64) int64 { return (n + dimmUnit - 1) / dimmUnit * dimmUnit }

func (v *vm) plugMemory(ctx context.Context, size int64) error {
	id := fmt.Sprintf("dimm%d", v.sized().PluggedBytes/dimmUnit) // the number of what is there already
	backend := "mem-" + id
	if err := v.execute(ctx, "object-add", map[string]any{
		"qom-type": "memory-backend-memfd", "id": backend, "share": true, "size": size,
	}); err != nil {
		return err
	}
	err := v.execute(ctx, "device_add", map[string]any{"driver": "pc-dimm", "id": id, "memdev": backend})
	if err == nil {
		v.grown(0, size)
		return nil
	}
	if uerr := v.execute(ctx, "object-del", map[string]string{"id": backend}); uerr != nil && !errors.Is(uerr, errdefs.ErrFailedPrecondition) {
		err = errors.Join(err, uerr)
	}
	return err
}

// pluggable is a processor that there is or can be.
type pluggable struct {
	Type    string           `json:"type"`
	Props   map[string]int64 `json:"props"` // where it goes
	QOMPath string           `json:"qom-path"`
}

func (v *vm) growVCPUs(ctx context.Context, want int) error {
	have := v.sized().VCPUs
	if want <= have {
		return nil
	}
	var all []pluggable
	if err := v.query(ctx, "query-hotpluggable-cpus", &all); err != nil {
		return err
	}
	free := slices.DeleteFunc(all, func(p pluggable) bool { return p.QOMPath != "" })
	slices.Reverse(free) // QEMU lists the highest first
	for i, p := range free[:min(len(free), want-have)] {
		arguments := map[string]any{"driver": p.Type, "id": fmt.Sprintf("cpu%d", have+i)}
		for name, value := range p.Props {
			arguments[name] = value
		}
		if err := v.execute(ctx, "device_add", arguments); err != nil {
			return fmt.Errorf("plug vcpu: %w", err)
		}
		v.grown(1, 0)
	}
	if want > v.limits.VCPUs {
		return hypervisor.Errorf(errdefs.ErrResourceExhausted, "%d vcpus are more than the %d that the VM can have", want, v.limits.VCPUs)
	}
	if got := v.sized().VCPUs; got < want {
		return hypervisor.Errorf(errdefs.ErrResourceExhausted, "no more than %d vcpus can be plugged", got)
	}
	return nil
}

// query calls a QMP command for its answer, within commandTimeout.
func (v *vm) query(ctx context.Context, command string, result any) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return v.ended(v.qmp.Execute(ctx, command, nil, result))
}

var _ hypervisor.Resizer = (*vm)(nil)
