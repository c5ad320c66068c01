package hostcgroup

import (
	"path/filepath"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What the VM takes on the host beyond what the container in it may take, besides Config.Overhead.
const (
	// pageTables is the part of the VM's memory that goes with its size: the page tables of two
	// processes and, under TCG, the emulated TLBs.
	pageTables = 64
	// cpuOverhead is the part of a CPU that the guest's kernel, QEMU's own threads and the share server may
	// use beyond the container's quota: 1/cpuOverhead.
	cpuOverhead = 2
	// tasks is how many threads all processes of the cgroup may have, when the container's are
	// limited: its own are in the guest. QEMU has up to 64 for I/O, and one for each vCPU.
	tasks = 512
)

// limited tells whether a container wants something that is enforced on the host, too.
func limited(r *specs.LinuxResources) bool {
	if r == nil {
		return false
	}
	m, cpu := r.Memory, r.CPU
	return m != nil && (m.Limit != nil || m.Reservation != nil || m.Swap != nil) ||
		cpu != nil && (cpu.Shares != nil || cpu.Quota != nil || cpu.Period != nil) ||
		r.Pids != nil
}

// limits translates a container's limits to those of its VM on the host. Devices are not limited,
// as QEMU and the share server take none but what they are given; the memory's OOM killer stays, for a VMM
// that waits for memory could not even be asked why. What a VM has of CPU time, by quota and by shares, is limited when it has booted:
// a pod's first container may be one that has next to nothing, such as the sandbox of a pod of Kubernetes, and
// a busy machine would leave none for the boot.
func (g *Group) limits(r *specs.LinuxResources, vmMemory int64, booted bool) *cgroups.Resources {
	res := &cgroups.Resources{SkipDevices: g.noDevices}
	if r == nil {
		return res
	}
	if m := r.Memory; m != nil {
		limit, overhead := value(m.Limit), int64(0)
		if limit > 0 {
			res.Memory = vmMemory + vmMemory/pageTables + g.cfg.Overhead
			overhead = max(res.Memory-limit, 0) // a limit above what the VM has bounds nothing
		} else {
			res.Memory = min(limit, 0) // -1: no limit
		}
		if n := value(m.Reservation); n > 0 {
			res.MemoryReservation = n + overhead
		}
		if n := value(m.Swap); n > 0 && limit > 0 { // memory and swap together
			res.MemorySwap = max(n+overhead, res.Memory)
		} else {
			res.MemorySwap = min(n, 0)
		}
	}
	if cpu := r.CPU; cpu != nil && booted {
		if cpu.Shares != nil {
			res.CpuShares = *cpu.Shares
			res.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*cpu.Shares)
		}
		res.CpuQuota, res.CpuPeriod = g.quota(cpu)
	}
	if r.Pids != nil {
		n := int64(-1)
		if pids := value(r.Pids.Limit); pids > 0 {
			n = tasks
		}
		res.PidsLimit = &n
	}
	return res
}

// defaultPeriod is the kernel's, in µs.
const defaultPeriod = 100_000

// quota is the VM's. An update may leave the period as it is. g.mu is held.
func (g *Group) quota(cpu *specs.LinuxCPU) (quota int64, period uint64) {
	period = value(cpu.Period)
	if period != 0 {
		g.period = period
	}
	if quota = value(cpu.Quota); quota > 0 {
		p := g.period
		if p == 0 {
			p = defaultPeriod
		}
		quota += int64(p / cpuOverhead)
	}
	return quota, period
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// adapt drops what a host's kernel may be built without: v1's accounting of swap. The guest has its
// own limit.
func (g *Group) adapt(r *cgroups.Resources, paths map[string]string) {
	dir := paths["memory"]
	if r.MemorySwap != 0 && dir != "" && !cgroups.PathExists(filepath.Join(dir, "memory.memsw.limit_in_bytes")) {
		g.cfg.Log.Warn("the host's kernel does not account swap: linux.resources.memory.swap is kept by the guest only")
		r.MemorySwap = 0
	}
}
