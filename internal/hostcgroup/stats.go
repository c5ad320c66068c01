package hostcgroup

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fscommon"
	"golang.org/x/sys/unix"
)

// Stats is what a VM takes of the host. Times are in nanoseconds, sizes in bytes.
type Stats struct {
	Path                        string // of the cgroup; empty: there is none, and what follows up to OOMKills is zero
	CPUUsage, CPUUser, CPUSys   uint64
	ThrottledPeriods, Throttled uint64
	MemoryUsage                 uint64
	MemoryLimit                 uint64 // math.MaxUint64: none
	Pids, PidsLimit             uint64 // of threads; limit 0: none
	OOMKills                    uint64 // since the beginning
	// Guest is how much of the guest's memory the host holds, Overhead what the VMM and its helpers
	// hold for themselves.
	Guest, Overhead uint64
}

// Stats reads what the cgroup uses, and what of that the processes of the VM, the VMM first, use
// for the guest and for themselves.
func (g *Group) Stats(vm []int) (Stats, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := Stats{}
	for _, pid := range vm {
		// The memory that the VMM shares is the guest's; its helpers share the same.
		own, shared := memoryOf(pid)
		s.Overhead += own
		s.Guest = max(s.Guest, shared)
	}
	if g.manager == nil {
		return s, nil
	}
	st, err := g.manager.Stats(&cgroups.StatsOptions{Controllers: cgroups.CPU | cgroups.Memory | cgroups.Pids})
	if err != nil {
		return s, fmt.Errorf("read cgroup %s: %w", g.record, err)
	}
	s.Path = g.record.String()
	cpu := st.CpuStats
	s.CPUUsage, s.CPUUser, s.CPUSys = cpu.CpuUsage.TotalUsage, cpu.CpuUsage.UsageInUsermode, cpu.CpuUsage.UsageInKernelmode
	s.ThrottledPeriods, s.Throttled = cpu.ThrottlingData.ThrottledPeriods, cpu.ThrottlingData.ThrottledTime
	s.MemoryUsage, s.MemoryLimit = st.MemoryStats.Usage.Usage, st.MemoryStats.Usage.Limit
	if s.MemoryLimit >= unlimited {
		s.MemoryLimit = math.MaxUint64
	}
	s.Pids, s.PidsLimit = st.PidsStats.Current, st.PidsStats.Limit
	s.OOMKills = g.oomKills() - g.kills
	return s, nil
}

// unlimited is a limit that v1 shows as a large number.
const unlimited = 1 << 62

// memoryOf reads how much memory a process has of its own, and how much it shares. A process that
// has gone has none.
func memoryOf(pid int) (own, shared uint64) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 {
			continue
		}
		kib, _ := strconv.ParseUint(fields[1], 10, 54)
		switch fields[0] {
		case "RssAnon:", "RssFile:":
			own += kib << 10
		case "RssShmem:":
			shared = kib << 10
		}
	}
	return own, shared
}

// oomKills is the kernel's count. g.mu is held.
func (g *Group) oomKills() uint64 {
	n, err := g.manager.OOMKillCount()
	if err != nil {
		return 0 // no memory controller
	}
	return n
}

// OOM tells whether the kernel has killed a process of the cgroup for want of memory, and of which
// limit; empty: it has not.
func (g *Group) OOM() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.manager == nil || g.oomKills() <= g.kills {
		return ""
	}
	const killed = "killed by the host's kernel for want of memory"
	// The limit may be one of a cgroup above.
	for dir := g.manager.Path("memory"); isCgroup(dir); dir = filepath.Dir(dir) {
		if limit, reached := reachedLimit(dir); reached {
			return fmt.Sprintf("%s: limit %d MiB of cgroup %s", killed, limit>>20, dir)
		}
	}
	return killed + ": no limit of a cgroup, the host itself had none left"
}

func isCgroup(dir string) bool {
	var sfs unix.Statfs_t
	return dir != "" && unix.Statfs(dir, &sfs) == nil &&
		(sfs.Type == unix.CGROUP_SUPER_MAGIC || sfs.Type == unix.CGROUP2_SUPER_MAGIC)
}

// reachedLimit tells whether a cgroup has a limit of memory that was reached.
func reachedLimit(dir string) (limit uint64, reached bool) {
	limit, err := fscommon.GetCgroupParamUint(dir, "memory.limit_in_bytes")
	if err == nil {
		failures, err := fscommon.GetCgroupParamUint(dir, "memory.failcnt")
		return limit, err == nil && limit < unlimited && failures > 0
	}
	limit, err = fscommon.GetCgroupParamUint(dir, "memory.max")
	if err != nil || limit == math.MaxUint64 {
		return 0, false
	}
	events, err := fscommon.GetValueByKey(dir, "memory.events.local", "oom")
	return limit, err == nil && events > 0
}
