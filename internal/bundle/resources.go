package bundle

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// maxCPUs bounds the numbers of processors and memory nodes: what kernels are built for.
const maxCPUs = 8192

// ParseResources validates resources on their own, as update takes them. Fields in errors and
// warnings are relative to the resources. Errors as Load.
func ParseResources(data []byte) (r *specs.LinuxResources, warnings []string, err error) {
	c := &checker{doc: "resources"}
	r = &specs.LinuxResources{}
	if err := decode(c, data, r); err != nil {
		return nil, nil, err
	}
	if err := c.apply(reflect.ValueOf(r), "linux.resources", ""); err != nil {
		return nil, nil, err
	}
	if len(r.Devices) > 0 {
		c.warn("devices: ignored: an update does not change them")
	}
	if err := c.resources(r, ""); err != nil {
		return nil, nil, err
	}
	return r, c.warnings, nil
}

// Merge returns the limits that a container has after an update, of those that the size of its VM
// and its limits on the host follow from: memory, CPU and pids. Both may be nil, and neither is
// changed. What is 0 in the update is not given, as in the guest.
func Merge(before, update *specs.LinuxResources) *specs.LinuxResources {
	merged := &specs.LinuxResources{Memory: &specs.LinuxMemory{}, CPU: &specs.LinuxCPU{}}
	for _, r := range []*specs.LinuxResources{before, update} {
		if r == nil {
			continue
		}
		if m := r.Memory; m != nil {
			give(&merged.Memory.Limit, m.Limit)
			give(&merged.Memory.Reservation, m.Reservation)
			give(&merged.Memory.Swap, m.Swap)
			if m.Limit != nil && *m.Limit == -1 && (m.Swap == nil || *m.Swap == 0) {
				merged.Memory.Swap = m.Limit // as in the guest
			}
		}
		if c := r.CPU; c != nil {
			give(&merged.CPU.Shares, c.Shares)
			give(&merged.CPU.Quota, c.Quota)
			give(&merged.CPU.Period, c.Period)
			if c.Cpus != "" {
				merged.CPU.Cpus = c.Cpus
			}
		}
		if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit != 0 {
			merged.Pids = r.Pids
		}
	}
	return merged
}

func give[T comparable](to **T, value *T) {
	var zero T
	if value != nil && *value != zero {
		*to = value
	}
}

// resources validates what does not depend on the guest, nor on resources that were given before.
func (c *checker) resources(r *specs.LinuxResources, at string) error {
	for i, d := range r.Devices {
		field := fmt.Sprintf("%sdevices[%d]", at, i)
		switch {
		case !slices.Contains([]string{"", "a", "b", "c"}, d.Type):
			return c.invalid(field+".type", "%s is not one of a, b, c", quote(d.Type))
		case strings.Trim(d.Access, "rwm") != "":
			return c.invalid(field+".access", "%s holds more than r, w and m", quote(d.Access))
		case d.Major != nil && (*d.Major < -1 || *d.Major > math.MaxUint32):
			return c.invalid(field+".major", "%d is not a major number", *d.Major)
		case d.Minor != nil && (*d.Minor < -1 || *d.Minor > math.MaxUint32):
			return c.invalid(field+".minor", "%d is not a minor number", *d.Minor)
		}
	}
	for _, check := range []func() error{
		func() error { return c.memory(r.Memory, at+"memory.") },
		func() error { return c.cpu(r.CPU, at+"cpu.") },
		func() error { return c.blockIO(r.BlockIO, at+"blockIO.") },
		func() error { return c.others(r, at) },
		func() error { return c.unified(r.Unified, at+"unified") },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) memory(m *specs.LinuxMemory, at string) error {
	if m == nil {
		return nil
	}
	for _, f := range []struct {
		name  string
		value *int64
	}{{"limit", m.Limit}, {"reservation", m.Reservation}, {"swap", m.Swap}} {
		if f.value != nil && *f.value < -1 {
			return c.invalid(at+f.name, "%d is less than -1", *f.value)
		}
	}
	if positive(m.Limit) && positive(m.Swap) && *m.Swap < *m.Limit {
		return c.invalid(at+"swap", "%d is less than the memory limit %d", *m.Swap, *m.Limit)
	}
	return nil
}

// cpu has the kernel's bounds.
func (c *checker) cpu(cpu *specs.LinuxCPU, at string) error {
	if cpu == nil {
		return nil
	}
	switch {
	case cpu.Period != nil && *cpu.Period != 0 && (*cpu.Period < 1000 || *cpu.Period > 1_000_000):
		return c.invalid(at+"period", "%d is not between 1000 and 1000000 µs", *cpu.Period)
	case positive(cpu.Quota) && *cpu.Quota < 1000:
		return c.invalid(at+"quota", "%d is less than 1000 µs", *cpu.Quota)
	case cpu.Burst != nil && positive(cpu.Quota) && *cpu.Burst > uint64(*cpu.Quota):
		return c.invalid(at+"burst", "%d is more than the quota %d", *cpu.Burst, *cpu.Quota)
	case cpu.Idle != nil && *cpu.Idle != 0 && *cpu.Idle != 1:
		return c.invalid(at+"idle", "%d is neither 0 nor 1", *cpu.Idle)
	case cpu.Idle != nil && *cpu.Idle == 1 && cpu.Shares != nil && *cpu.Shares != 0:
		return c.invalid(at+"shares", "cannot be given together with idle: an idle group has no weight")
	}
	for _, l := range []struct{ field, text string }{{"cpus", cpu.Cpus}, {"mems", cpu.Mems}} {
		if l.text == "" {
			continue
		}
		if _, err := highest(l.text); err != nil {
			return c.invalid(at+l.field, "%s: %v", quote(l.text), err)
		}
	}
	return nil
}

// highest is the highest number in a list like "0-3,7".
func highest(list string) (int, error) {
	most := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, aErr := strconv.ParseUint(first, 10, 32)
		b, bErr := strconv.ParseUint(last, 10, 32)
		switch {
		case aErr != nil || bErr != nil:
			return 0, errors.New("is not a list of numbers and ranges, such as 0-2,5")
		case b < a:
			return 0, fmt.Errorf("the range %s is reversed", part)
		case b >= maxCPUs:
			return 0, fmt.Errorf("%d is not below %d", b, maxCPUs)
		}
		most = max(most, int(b))
	}
	return most, nil
}

const minWeight, maxWeight = 10, 1000 // of block I/O

func (c *checker) blockIO(b *specs.LinuxBlockIO, at string) error {
	if b == nil {
		return nil
	}
	weight := func(field string, w *uint16) error {
		if w != nil && *w != 0 && (*w < minWeight || *w > maxWeight) {
			return c.invalid(field, "%d is not between %d and %d", *w, minWeight, maxWeight)
		}
		return nil
	}
	number := func(field string, major, minor int64) error {
		switch {
		case major < 0 || major >= 1<<12:
			return c.invalid(field+".major", "%d is not a major number", major)
		case minor < 0 || minor >= 1<<20:
			return c.invalid(field+".minor", "%d is not a minor number", minor)
		}
		return nil
	}
	if err := weight(at+"weight", b.Weight); err != nil {
		return err
	}
	for i, d := range b.WeightDevice {
		field := fmt.Sprintf("%sweightDevice[%d]", at, i)
		if err := errors.Join(number(field, d.Major, d.Minor), weight(field+".weight", d.Weight)); err != nil {
			return err
		}
	}
	for _, t := range []struct {
		field   string
		devices []specs.LinuxThrottleDevice
	}{
		{"throttleReadBpsDevice", b.ThrottleReadBpsDevice},
		{"throttleWriteBpsDevice", b.ThrottleWriteBpsDevice},
		{"throttleReadIOPSDevice", b.ThrottleReadIOPSDevice},
		{"throttleWriteIOPSDevice", b.ThrottleWriteIOPSDevice},
	} {
		for i, d := range t.devices {
			if err := number(fmt.Sprintf("%s%s[%d]", at, t.field, i), d.Major, d.Minor); err != nil {
				return err
			}
		}
	}
	return nil
}

var (
	pageSize   = regexp.MustCompile(`^[1-9][0-9]{0,9}[KMG]B$`)
	rdmaDevice = regexp.MustCompile(`^[!-~]{1,64}$`) // a word: the kernel's lines are made of words
)

func (c *checker) others(r *specs.LinuxResources, at string) error {
	if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit < -1 {
		return c.invalid(at+"pids.limit", "%d is less than -1", *r.Pids.Limit)
	}
	for i, l := range r.HugepageLimits {
		if !pageSize.MatchString(l.Pagesize) {
			return c.invalid(fmt.Sprintf("%shugepageLimits[%d].pageSize", at, i), "%s is not a size such as 2MB", quote(l.Pagesize))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Rdma)) {
		if !rdmaDevice.MatchString(name) {
			return c.invalid(at+"rdma["+quote(name)+"]", "is not the name of a device")
		}
	}
	return nil
}

var unifiedFile = regexp.MustCompile(`^[a-zA-Z0-9_]+(\.[a-zA-Z0-9_]+)+$`)

// unified lets through the files of controllers, and of a group's own those that do not
// interfere with the agent, which kills, freezes and moves by the others.
func (c *checker) unified(files map[string]string, at string) error {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		field := at + "[" + quote(name) + "]"
		switch {
		case !unifiedFile.MatchString(name):
			return c.invalid(field, "is not of the form CONTROLLER.PARAMETER")
		case strings.HasPrefix(name, "cgroup.") && name != "cgroup.max.depth" && name != "cgroup.max.descendants":
			return c.refused(field, "is not supported: the agent controls the container by it")
		}
		if err := c.text(field, files[name]); err != nil {
			return err
		}
	}
	return nil
}

func positive(n *int64) bool { return n != nil && *n > 0 }
