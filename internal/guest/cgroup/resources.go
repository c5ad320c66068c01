package cgroup

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/guest/fault"
)

// Resources are the limits of a group, as the files of cgroup v2 have them.
type Resources struct {
	settings []setting // in the order in which they are made
	amounts  amounts
	// usage is what the limits must be above of; 0: nothing is checked.
	checkMemory, checkSwap int64
	devices                []deviceRule
}

// setting is what is written to a file.
type setting struct {
	field       string // of linux.resources, for errors
	file, value string
	// better takes the place of this setting where its file exists.
	better *setting
	// optional settings are left out where the file is missing: nothing can be used then that
	// they would limit.
	optional bool
	// early settings may be refused by the kernel: they are made again later.
	early bool
}

// amounts are the values that the files of cgroup v2 hold together, or as a difference, and
// that an update may give one by one. 0 means that it was never given.
type amounts struct {
	limit, swap, quota int64
	period             uint64
}

func (r *Resources) set(field, file, value string) {
	r.settings = append(r.settings, setting{field: field, file: file, value: value})
}

// Translate makes cgroup v2 settings of an OCI specification's resources. nil
// means no limits but those on devices.
func Translate(spec *specs.LinuxResources) (*Resources, error) {
	return translate(spec, amounts{})
}

// translate completes what spec leaves out by what was given before.
func translate(spec *specs.LinuxResources, before amounts) (*Resources, error) {
	if spec == nil {
		spec = &specs.LinuxResources{}
	}
	devices, err := deviceRules(spec.Devices)
	if err != nil {
		return nil, err
	}
	r := &Resources{devices: devices, amounts: before}
	// Callers from before version 1.3 of the specification, which made 0 a limit, send it for none.
	if p := spec.Pids; p != nil && given(p.Limit) != 0 {
		r.set("pids.limit", "pids.max", orMax(*p.Limit))
	}
	if err := r.memory(spec.Memory); err != nil {
		return nil, err
	}
	r.blockIO(spec.BlockIO)
	r.cpu(spec.CPU)
	for _, l := range spec.HugepageLimits {
		if strings.ContainsAny(l.Pagesize, "/ ") {
			return nil, fault.New(errdefs.ErrInvalidArgument, "hugepageLimits: %q is no size", l.Pagesize)
		}
		limit := strconv.FormatUint(l.Limit, 10)
		r.set("hugepageLimits", "hugetlb."+l.Pagesize+".max", limit)
		r.settings = append(r.settings, setting{
			field: "hugepageLimits", file: "hugetlb." + l.Pagesize + ".rsvd.max", value: limit, optional: true,
		})
	}
	for _, device := range slices.Sorted(maps.Keys(spec.Rdma)) {
		if value := rdmaMax(spec.Rdma[device]); value != "" {
			r.set("rdma", "rdma.max", device+value)
		}
	}
	return r, r.unified(spec.Unified)
}

func (r *Resources) memory(m *specs.LinuxMemory) error {
	if m == nil {
		return nil
	}
	limit, swap := given(m.Limit), given(m.Swap)
	if m.CheckBeforeUpdate != nil && *m.CheckBeforeUpdate {
		r.checkMemory, r.checkSwap = max(limit, 0), max(swap, 0)
	}
	if limit != 0 || swap != 0 {
		if limit == -1 && swap == 0 {
			swap = -1 // who takes the limit of memory away does not expect one of swap
		}
		r.amounts.limit, r.amounts.swap = either(limit, r.amounts.limit), either(swap, r.amounts.swap)
		value, err := swapMax(r.amounts.limit, r.amounts.swap)
		if err != nil {
			return err
		}
		if value != "" {
			r.settings = append(r.settings, setting{
				field: "memory.swap", file: "memory.swap.max", value: value, optional: value == "max" || value == "0",
			})
		}
	}
	if limit != 0 {
		r.set("memory.limit", "memory.max", orMax(limit))
	}
	if low := given(m.Reservation); low != 0 {
		r.set("memory.reservation", "memory.low", orMax(low))
	}
	return nil
}

// swapMax is the limit of swap alone: the specification counts memory and swap together. ""
// means that there is none to set.
func swapMax(limit, both int64) (string, error) {
	switch {
	case both == 0:
		return "", nil
	case both == -1:
		return "max", nil
	case limit == -1:
		return strconv.FormatInt(both, 10), nil
	case limit == 0:
		return "", fault.New(errdefs.ErrInvalidArgument, "memory.swap: unable to set swap limit without memory limit")
	case both < limit:
		return "", fault.New(errdefs.ErrInvalidArgument,
			"memory.swap: memory+swap limit should be >= memory limit: %d is less than the memory limit %d", both, limit)
	}
	return strconv.FormatInt(both-limit, 10), nil
}

func (r *Resources) blockIO(b *specs.LinuxBlockIO) {
	if b == nil {
		return
	}
	weigh := func(field, device string, weight *uint16) {
		if weight == nil || *weight == 0 {
			return
		}
		r.settings = append(r.settings, setting{
			field: field, file: "io.weight", value: device + strconv.FormatUint(ioWeight(*weight), 10),
			better: &setting{field: field, file: "io.bfq.weight", value: device + strconv.FormatUint(uint64(*weight), 10)},
		})
	}
	weigh("blockIO.weight", "", b.Weight)
	for _, d := range b.WeightDevice {
		weigh("blockIO.weightDevice", fmt.Sprintf("%d:%d ", d.Major, d.Minor), d.Weight)
	}
	for _, t := range []struct {
		field, key string
		devices    []specs.LinuxThrottleDevice
	}{
		{"blockIO.throttleReadBpsDevice", "rbps", b.ThrottleReadBpsDevice},
		{"blockIO.throttleWriteBpsDevice", "wbps", b.ThrottleWriteBpsDevice},
		{"blockIO.throttleReadIOPSDevice", "riops", b.ThrottleReadIOPSDevice},
		{"blockIO.throttleWriteIOPSDevice", "wiops", b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range t.devices {
			r.set(t.field, "io.max", fmt.Sprintf("%d:%d %s=%s", d.Major, d.Minor, t.key, rate(d.Rate)))
		}
	}
}

// rate has no 0, which the kernel does not take: in cgroup v1 it took a limit away.
func rate(n uint64) string {
	if n == 0 {
		return "max"
	}
	return strconv.FormatUint(n, 10)
}

// ioWeight maps the weights of cgroup v1 and BFQ, 10 to 1000, linearly onto 1 to 10000.
func ioWeight(weight uint16) uint64 {
	return 1 + (uint64(min(max(weight, 10), 1000))-10)*9999/990
}

func (r *Resources) cpu(c *specs.LinuxCPU) {
	if c == nil {
		return
	}
	if c.Idle != nil {
		r.set("cpu.idle", "cpu.idle", strconv.FormatInt(*c.Idle, 10))
	}
	if c.Shares != nil && *c.Shares != 0 {
		r.set("cpu.shares", "cpu.weight", strconv.FormatUint(cpuWeight(*c.Shares), 10))
	}
	quota, period := given(c.Quota), given(c.Period)
	if c.Burst != nil {
		burst := setting{field: "cpu.burst", file: "cpu.max.burst", value: strconv.FormatUint(*c.Burst, 10)}
		if quota != 0 || period != 0 {
			// A burst must not be more than its quota at any time: whether the new one can be set
			// before or after the new quota depends on both.
			early := burst
			early.early = true
			r.settings = append(r.settings, early)
			defer func() { r.settings = append(r.settings, burst) }()
		} else {
			r.settings = append(r.settings, burst)
		}
	}
	if quota != 0 || period != 0 {
		a := &r.amounts
		a.quota, a.period = either(quota, a.quota), either(period, a.period)
		field := "cpu.quota"
		if quota == 0 {
			field = "cpu.period"
		}
		r.set(field, "cpu.max", orMax(either(a.quota, -1))+" "+strconv.FormatUint(either(a.period, defaultPeriod), 10))
	}
	if c.Cpus != "" {
		r.set("cpu.cpus", "cpuset.cpus", c.Cpus)
	}
	if c.Mems != "" {
		r.set("cpu.mems", "cpuset.mems", c.Mems)
	}
}

// defaultPeriod is the kernel's, in µs.
const defaultPeriod = 100_000

// cpuWeight maps cgroup v1's shares, 2 to 262144, onto 1 to 10000 so that both defaults, 1024
// and 100, meet, with the formula that crun and runc (from 1.3.2) share. A straight line would
// give a container with the default of v1 less than half of the weight that one has without any.
func cpuWeight(shares uint64) uint64 {
	switch {
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34)))
}

func rdmaMax(l specs.LinuxRdma) string {
	value := ""
	if l.HcaHandles != nil {
		value += " hca_handle=" + strconv.FormatUint(uint64(*l.HcaHandles), 10)
	}
	if l.HcaObjects != nil {
		value += " hca_object=" + strconv.FormatUint(uint64(*l.HcaObjects), 10)
	}
	return value
}

// ownFiles are files of a group itself, and not of a controller, that a specification may set.
// The rest is how the agent controls the group.
var ownFiles = []string{"cgroup.max.depth", "cgroup.max.descendants"}

func (r *Resources) unified(files map[string]string) error {
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if strings.ContainsAny(file, "/ ") || !strings.Contains(file, ".") ||
			strings.HasPrefix(file, "cgroup.") && !slices.Contains(ownFiles, file) {
			return fault.New(errdefs.ErrInvalidArgument, "unified[%q]: not a controller's file", file)
		}
		for line := range strings.Lines(files[file]) {
			r.set("unified["+strconv.Quote(file)+"]", file, strings.TrimSuffix(line, "\n"))
		}
	}
	return nil
}

// given is the value, or 0 if there is none.
func given[T any](p *T) (value T) {
	if p != nil {
		value = *p
	}
	return value
}

// either is a, or b where a was not given.
func either[T comparable](a, b T) T {
	var none T
	if a == none {
		return b
	}
	return a
}

func orMax(n int64) string {
	if n < 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}
