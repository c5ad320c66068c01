package pod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "runv/api/agent/v1"
	"runv/internal/agentclient"
	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/hypervisor"
)

// UpdateResult is what an Update has led to.
type UpdateResult struct {
	InEffect    map[string]string // the guest's limits, by file of cgroup v2
	VCPUs       int               // of the VM
	MemoryBytes int64             // of the VM
	Warnings    []string          // what was ignored, or is not as it was asked for
}

// Update changes a container's limits, given as resources of a specification in JSON. Where they
// are more than the VM has, that grows first, as far as it can; it never shrinks.
func (p *Pod) Update(ctx context.Context, id string, resources []byte) (res UpdateResult, err error) {
	r, warnings, err := bundle.ParseResources(resources)
	if err != nil {
		return res, err
	}
	data, err := bundle.GuestResources(r)
	if err != nil {
		return res, err
	}
	release, err := p.sizing(ctx)
	if err != nil {
		return res, err
	}
	defer release()
	var limits *specs.LinuxResources // all that the container has then
	var after *specs.LinuxResources  // all that the pod has then
	err = p.operate(ctx, verbUpdate, id, func(ctx context.Context, vm *factory.VM) error {
		var before *specs.LinuxResources // of the pod
		var have, asked, want size       // of the VM: as it is, as the limits before wanted it, and those to come
		if err := p.do(ctx, func() error {
			c, err := p.find(id)
			if err != nil {
				return err
			}
			limits = bundle.Merge(c.limits, r)
			others := p.asked(c)
			old := append(slices.Clip(others), c.limits)
			next := append(slices.Clip(others), limits)
			before, after = sum(old), sum(next)
			have, asked, want = p.size(), p.sizeFor(old).withCPUs(p.affine(nil)), p.sizeFor(next).withCPUs(p.affine(nil))
			return nil
		}); err != nil {
			return err
		}
		now := have
		if want.exceeds(have, asked) {
			// The host must not kill the VMM for what it is about to get.
			if err := p.cfg.Cgroup.Limit(before, max(have.memory, want.memory)); err != nil {
				return err
			}
			var missing []string
			now, missing = p.grow(ctx, vm, have, want)
			warnings = append(warnings, missing...)
		}
		answer, err := vm.Agent.Containers.Update(ctx, &agentv1.UpdateRequest{Id: id, Resources: data})
		if err = agentclient.Error(err); err != nil {
			if now != have {
				err = fmt.Errorf("%w; the limits are as they were, the VM has grown to %s", err, now)
			}
			return errors.Join(err, p.cfg.Cgroup.Limit(before, now.memory))
		}
		res = UpdateResult{InEffect: limitsOf(answer), VCPUs: now.vcpus, MemoryBytes: now.memory, Warnings: warnings}
		return nil
	}, func(c *container) { c.limits = limits })
	if err != nil {
		return res, err
	}
	if err := p.cfg.Cgroup.Limit(after, res.MemoryBytes); err != nil {
		return res, fmt.Errorf("the limits in the VM are changed, those of the VM are not: %w", err)
	}
	return res, nil
}

// size is how large the VM is. On the pod's goroutine.
func (p *Pod) size() size { return size{vcpus: p.record.VCPUs, memory: p.record.MemoryBytes} }

// grow makes the VM as large as it can be up to the size, records what it has then, and tells what
// is missing.
func (p *Pod) grow(ctx context.Context, vm *factory.VM, have, want size) (now size, warnings []string) {
	want.vcpus, want.memory = max(have.vcpus, want.vcpus), max(have.memory, want.memory)
	resizer, ok := vm.VM.(hypervisor.Resizer)
	if !ok {
		return have, []string{fmt.Sprintf("the VM keeps its %s: its hypervisor cannot let it grow", have)}
	}
	got, err := resizer.Resize(ctx, hypervisor.Size{VCPUs: want.vcpus, MemoryBytes: want.memory})
	now = size{vcpus: got.VCPUs, memory: got.MemoryBytes}
	_ = p.do(context.WithoutCancel(ctx), func() error {
		p.log.Info("VM has grown", "from", have, "to", now, "asked", want, "err", err)
		p.record.VCPUs, p.record.MemoryBytes = now.vcpus, now.memory
		p.save()
		return nil
	})
	if now.vcpus < want.vcpus || now.memory < want.memory {
		warnings = append(warnings, fmt.Sprintf("the VM has %s, not the %s that the limits allow: %v", now, want, err))
	}
	online, err := vm.Agent.Guest.Online(ctx, &agentv1.OnlineRequest{Cpus: uint32(got.VCPUs), PluggedBytes: uint64(got.PluggedBytes)})
	switch err = agentclient.Error(err); {
	case err != nil:
		warnings = append(warnings, fmt.Sprintf("the VM has %s, but the guest may not use all of it: %v", now, err))
	case online.Cpus < uint32(got.VCPUs) || online.PluggedBytes < uint64(got.PluggedBytes):
		warnings = append(warnings, fmt.Sprintf("the VM has %s, of which the guest uses %d vCPUs and lacks %d MiB: %s", now,
			online.Cpus, (got.PluggedBytes-int64(min(online.PluggedBytes, uint64(got.PluggedBytes))))>>20, printable(online.Problem)))
	}
	return now, warnings
}

// String is for people.
func (s size) String() string { return fmt.Sprintf("%d vCPUs and %d MiB", s.vcpus, s.memory>>20) }

// Bounds of what the guest may say about limits.
const (
	maxLimits    = 256
	maxLimitText = 4096
)

// limitsOf takes what the guest tells, if it is text of a reasonable size.
func limitsOf(answer *agentv1.UpdateResponse) map[string]string {
	limits := make(map[string]string)
	for file, value := range answer.InEffect {
		if len(limits) < maxLimits && len(value) <= maxLimitText {
			limits[printable(file)] = strings.Map(visible, value)
		}
	}
	return limits
}
