package pod

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

// The VM and the pod's cgroup on the host are for all its containers, so what these ask for is added up:
// the VM has as much memory as all limits together and OverheadBytes, or, if a container has no
// limit, the default for all of those instead. Of vCPUs there are as many as all CPU quotas together, at least
// the default if a container has none, and at least as many as the highest cpuset names. On the
// host only what is limited for each container is limited for the pod: to the sum, with what a VM
// takes beyond that. The VM grows before a container is made in it, and never shrinks; the limits on
// the host go down again when a container is removed.

// defaultPeriod is the kernel's of a CPU quota, in µs.
const defaultPeriod = 100_000

// sizeFor turns the limits of containers, of which each may be nil, into the VM's size. Numbers in a
// cpuset that the host has no processors for make no vCPUs: under runc they would be an error, which
// the guest makes of them here. Quotas make no more vCPUs than the host has processors either,
// unless those of one container do.
func (p *Pod) sizeFor(all []*specs.LinuxResources) size {
	var cpus, memory float64
	var most, set int
	allCPUs, allMemory := true, true
	for _, r := range all {
		asked := bundle.SizeOf(r)
		if asked.QuotaCPUs > 0 {
			most, cpus = max(most, asked.QuotaCPUs), cpus+quotaOf(r)
		}
		set = max(set, asked.SetCPUs)
		memory += float64(asked.MemoryBytes)
		allCPUs, allMemory = allCPUs && asked.QuotaCPUs > 0, allMemory && asked.MemoryBytes > 0
	}
	s := size{vcpus: min(int(math.Ceil(min(cpus, math.MaxInt32)-1e-6)), max(most, runtime.NumCPU()))}
	if !allCPUs {
		s.vcpus = max(s.vcpus, p.cfg.DefaultVCPUs)
	}
	s.vcpus = max(s.vcpus, min(set, runtime.NumCPU()))
	switch limit := int64(min(memory, 1<<62)); {
	case allMemory:
		s.memory = sizeForLimit(limit)
	case limit > 0:
		s.memory = sizeForLimit(limit) - OverheadBytes + p.cfg.DefaultMemory
	default:
		s.memory = p.cfg.DefaultMemory
	}
	return s
}

// withCPUs is a size in which there are these many CPUs, as far as the host has them.
func (s size) withCPUs(n int) size {
	s.vcpus = max(s.vcpus, min(n, runtime.NumCPU()))
	return s
}

// affine is how many CPUs the containers that have not stopped, but for one that may be nil, name for their execs. On the
// pod's goroutine.
func (p *Pod) affine(but *container) (cpus int) {
	for _, c := range p.containers {
		if c != but && c.record.Status != state.Stopped {
			cpus = max(cpus, c.affinityCPUs)
		}
	}
	return cpus
}

// quotaOf is a CPU quota as a number of CPUs.
func quotaOf(r *specs.LinuxResources) float64 {
	period := uint64(defaultPeriod)
	if r.CPU.Period != nil && *r.CPU.Period != 0 {
		period = *r.CPU.Period
	}
	return float64(*r.CPU.Quota) / float64(period)
}

// sum is what containers ask of the host together. Of one it is what that asks for.
func sum(all []*specs.LinuxResources) *specs.LinuxResources {
	if len(all) == 1 {
		return all[0]
	}
	memory, cpu, pids := &specs.LinuxMemory{}, &specs.LinuxCPU{}, &specs.LinuxPids{}
	memory.Limit = sumOf(all, func(r *specs.LinuxResources) *int64 { return orNew(r.Memory).Limit })
	memory.Swap = sumOf(all, func(r *specs.LinuxResources) *int64 { return orNew(r.Memory).Swap })
	memory.Reservation = sumOf(all, func(r *specs.LinuxResources) *int64 { return orNew(r.Memory).Reservation })
	pids.Limit = sumOf(all, func(r *specs.LinuxResources) *int64 { return orNew(r.Pids).Limit })
	cpu.Quota = sumOf(all, func(r *specs.LinuxResources) *int64 {
		if c := orNew(r.CPU); c.Quota == nil || *c.Quota <= 0 {
			return c.Quota
		}
		return new(int64(min(quotaOf(r)*defaultPeriod, 1<<62)))
	})
	if cpu.Quota != nil && *cpu.Quota > 0 {
		cpu.Period = new(uint64(defaultPeriod))
	}
	shares := sumOf(all, func(r *specs.LinuxResources) *int64 {
		if c := orNew(r.CPU); c.Shares != nil && *c.Shares > 0 {
			return new(int64(min(*c.Shares, maxShares)))
		}
		return new(int64(defaultShares)) // which a cgroup has without being asked
	})
	cpu.Shares = new(uint64(min(*shares, maxShares)))
	r := &specs.LinuxResources{Memory: memory, CPU: cpu}
	if pids.Limit != nil {
		r.Pids = pids
	}
	return r
}

// Shares of CPU time, as cgroup v1 has them.
const (
	defaultShares = 1024
	maxShares     = 262144
)

// sumOf adds limits up. Without one for each there is none for all: -1 if others have one, or else nil.
func sumOf(all []*specs.LinuxResources, of func(*specs.LinuxResources) *int64) *int64 {
	var total int64
	given, without := false, len(all) == 0
	for _, r := range all {
		limit := of(orNew(r))
		given = given || limit != nil && *limit != 0
		if limit == nil || *limit <= 0 {
			without = true
			continue
		}
		total = min(total, math.MaxInt64-*limit) + *limit
	}
	switch {
	case !given:
		return nil
	case without:
		return new(int64(-1))
	}
	return &total
}

func orNew[T any](p *T) *T {
	if p == nil {
		p = new(T)
	}
	return p
}

// asked lists the limits of the containers that have not stopped, but for one that may be nil. On the
// pod's goroutine.
func (p *Pod) asked(but *container) (all []*specs.LinuxResources) {
	for _, c := range p.containers {
		if c != but && c.record.Status != state.Stopped {
			all = append(all, c.limits)
		}
	}
	return all
}

// sizing lets one caller at a time change the VM's size and the pod's limits, until release is called.
func (p *Pod) sizing(ctx context.Context) (release func(), err error) {
	select {
	case p.sizer <- struct{}{}:
		return func() { <-p.sizer }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// makeRoom makes the VM, and what it may take of the host, large enough for a container that joins the
// others. What a container without limits could have is no reason to fail.
func (p *Pod) makeRoom(ctx context.Context, c *container, vm *factory.VM) error {
	release, err := p.sizing(ctx)
	if err != nil {
		return err
	}
	defer release()
	var others, all []*specs.LinuxResources
	var have, want, before size
	if err := p.do(ctx, func() error {
		others = p.asked(c)
		all = append(slices.Clip(others), c.limits)
		have, before, want = p.size(), p.sizeFor(others).withCPUs(p.affine(c)), p.sizeFor(all).withCPUs(p.affine(nil))
		return nil
	}); err != nil {
		return err
	}
	now := have
	var missing []string
	// The host must not kill the VMM for what it is about to get.
	if err := p.cfg.Cgroup.Limit(sum(all), max(have.memory, want.memory)); err != nil {
		return err
	}
	if want.exceeds(have, before) {
		now, missing = p.grow(ctx, vm, have, want)
	}
	asked := bundle.SizeOf(c.limits)
	switch {
	case asked.QuotaCPUs > 0 && now.vcpus < want.vcpus:
		err = noRoom("cpu.quota", now, want, missing)
	case asked.MemoryBytes > 0 && len(missing) > 0:
		err = noRoom("memory.limit", now, want, missing)
	case asked.QuotaCPUs > 0 && len(missing) > 0:
		err = noRoom("cpu.quota", now, want, missing)
	case now.memory != want.memory: // as it has turned out
		err = p.cfg.Cgroup.Limit(sum(all), now.memory)
	}
	for _, m := range missing {
		p.log.Warn("room for container", "container", c.record.ID, "missing", m)
	}
	return err
}

// noRoom tells that the VM is too small for another container.
func noRoom(field string, now, want size, why []string) error {
	text := fmt.Sprintf("linux.resources.%s: the pod's containers need a VM of %s together, but it has %s", field, want, now)
	return rpcerror.New(errdefs.ErrResourceExhausted, strings.Join(append([]string{text}, why...), "; "))
}

// exceeds tells whether to ask for more than the VM has. What could not be reached before is not asked
// for again, unless more is wanted.
func (s size) exceeds(have, before size) bool {
	return s.vcpus > max(have.vcpus, before.vcpus) || s.memory > max(have.memory, before.memory)
}

// setLimits limits the VM on the host to what its containers ask for now.
func (p *Pod) setLimits(ctx context.Context) error {
	release, err := p.sizing(ctx)
	if err != nil {
		return err
	}
	defer release()
	var all []*specs.LinuxResources
	var have size
	if err := p.do(ctx, func() error { all, have = p.asked(nil), p.size(); return nil }); err != nil || len(all) == 0 {
		return err
	}
	return p.cfg.Cgroup.Limit(sum(all), have.memory)
}

// lowerLimits lowers the limits and the scores on the host after a container has gone. On the pod's goroutine.
func (p *Pod) lowerLimits() {
	if p.state != Running || !p.live() {
		return
	}
	p.setScores()
	p.pending++ // the cgroup stays that long
	go func() {
		defer p.post(func() { p.pending-- })
		ctx, cancel := context.WithTimeout(context.Background(), guestCall)
		defer cancel()
		if err := p.setLimits(ctx); err != nil {
			p.log.Warn("lower limits", "err", err)
		}
	}()
}
