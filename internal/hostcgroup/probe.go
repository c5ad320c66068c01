package hostcgroup

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Host is what a host has for cgroups of VMs.
type Host struct {
	Version int      // 1 or 2; 0: none
	Missing []string // controllers without which limits are refused
	Err     error    // why no cgroup can be made
}

// Probe looks at this host. It changes nothing.
func Probe() Host {
	if cgroups.IsCgroup2UnifiedMode() {
		return probeUnified()
	}
	h := Host{}
	for _, name := range []string{"cpu", "cpuacct", "memory", "pids"} {
		own, err := cgroups.GetOwnCgroupPath(name)
		if err != nil {
			h.Missing = append(h.Missing, name)
			continue
		}
		h.Version = 1
		if err := unix.Access(own, unix.W_OK); err != nil && h.Err == nil {
			h.Err = fmt.Errorf("%s: %w", own, err)
		}
	}
	return h
}

func probeUnified() Host {
	h := Host{Version: 2}
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		h.Err = err
		return h
	}
	const root = "/sys/fs/cgroup"
	parent := filepath.Join(root, filepath.Dir(own[""])) // where runc makes its own, too
	if err := unix.Access(parent, unix.W_OK); err != nil {
		h.Err = fmt.Errorf("%s: %w", parent, err)
	}
	data, err := cgroups.ReadFile(parent, "cgroup.controllers")
	if err != nil {
		h.Err = err
		return h
	}
	h.Missing = missing(data)
	return h
}

// missing lists what a cgroup.controllers does not.
func missing(controllers string) []string {
	return slices.DeleteFunc([]string{"cpu", "memory", "pids"}, func(name string) bool {
		return slices.Contains(strings.Fields(controllers), name)
	})
}
