package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Resources are the limits of a group, as the files of cgroup v2 have them.
type Resources struct {
	files   []setting
	devices []deviceRule
}

type setting struct{ file, value string }

func (r *Resources) set(file, value string) { r.files = append(r.files, setting{file, value}) }

// Translate makes cgroup v2 settings of an OCI specification's resources. nil
// means no limits but those on devices.
func Translate(spec *specs.LinuxResources) (*Resources, error) {
	if spec == nil {
		spec = &specs.LinuxResources{}
	}
	devices, err := deviceRules(spec.Devices)
	if err != nil {
		return nil, err
	}
	r := &Resources{devices: devices}
	if err := r.memory(spec.Memory); err != nil {
		return nil, err
	}
	r.cpu(spec.CPU)
	if spec.Pids != nil && spec.Pids.Limit != nil {
		r.set("pids.max", limit(*spec.Pids.Limit))
	}
	for _, file := range sortedKeys(spec.Unified) {
		if strings.Contains(file, "/") || !strings.Contains(file, ".") || strings.HasPrefix(file, "cgroup.") {
			return nil, fmt.Errorf("unified resource %q: not a controller's file", file)
		}
		r.set(file, spec.Unified[file])
	}
	return r, nil
}

func (r *Resources) memory(m *specs.LinuxMemory) error {
	if m == nil {
		return nil
	}
	if m.Reservation != nil && *m.Reservation != 0 {
		r.set("memory.low", limit(*m.Reservation))
	}
	var hard int64
	if m.Limit != nil {
		hard = *m.Limit
	}
	if hard != 0 {
		r.set("memory.max", limit(hard))
	}
	// The specification counts memory and swap together, cgroup v2 swap alone.
	if m.Swap == nil || *m.Swap == 0 {
		return nil
	}
	switch swap := *m.Swap; {
	case swap < 0:
		r.set("memory.swap.max", "max")
	case hard <= 0:
		return errors.New("memory.swap: needs a memory limit")
	case swap < hard:
		return errors.New("memory.swap: must not be less than the memory limit")
	default:
		r.set("memory.swap.max", strconv.FormatInt(swap-hard, 10))
	}
	return nil
}

func (r *Resources) cpu(c *specs.LinuxCPU) {
	if c == nil {
		return
	}
	if c.Shares != nil && *c.Shares != 0 {
		r.set("cpu.weight", strconv.FormatUint(weight(*c.Shares), 10))
	}
	if (c.Quota != nil && *c.Quota != 0) || (c.Period != nil && *c.Period != 0) {
		value := "max"
		if c.Quota != nil && *c.Quota > 0 {
			value = strconv.FormatInt(*c.Quota, 10)
		}
		if c.Period != nil && *c.Period != 0 {
			value += " " + strconv.FormatUint(*c.Period, 10)
		}
		r.set("cpu.max", value)
	}
	if c.Burst != nil {
		r.set("cpu.max.burst", strconv.FormatUint(*c.Burst, 10))
	}
	if c.Idle != nil {
		r.set("cpu.idle", strconv.FormatInt(*c.Idle, 10))
	}
	if c.Cpus != "" {
		r.set("cpuset.cpus", c.Cpus)
	}
	if c.Mems != "" {
		r.set("cpuset.mems", c.Mems)
	}
}

// weight maps cgroup v1's shares, 2 to 262144, linearly onto 1 to 10000.
func weight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

func limit(n int64) string {
	if n <= 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (r *Resources) apply(g *Group) error {
	for _, s := range r.files {
		err := write(g.dir, s.file, s.value)
		// A kernel without swap has no limit for it, and needs none.
		if errors.Is(err, fs.ErrNotExist) && s.file == "memory.swap.max" {
			continue
		}
		if err != nil {
			return fmt.Errorf("limit resources: %w", err)
		}
	}
	return g.limitDevices(r.devices)
}
