package cgroup_test

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/cgroup"
)

func TestTranslate(t *testing.T) {
	type m = specs.LinuxMemory
	type c = specs.LinuxCPU
	memory := func(m m) *specs.LinuxResources { return &specs.LinuxResources{Memory: &m} }
	cpu := func(c c) *specs.LinuxResources { return &specs.LinuxResources{CPU: &c} }
	pids := func(n int64) *specs.LinuxResources {
		return &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &n}}
	}
	disk := specs.LinuxWeightDevice{Weight: new(uint16(1000)), LeafWeight: new(uint16(20))}
	disk.Major, disk.Minor = 8, 16
	throttle := func(rate uint64) []specs.LinuxThrottleDevice {
		d := specs.LinuxThrottleDevice{Rate: rate}
		d.Major, d.Minor = 254, 1
		return []specs.LinuxThrottleDevice{d}
	}
	for _, tc := range []struct {
		name string
		spec *specs.LinuxResources
		want string // lines of "file value"
	}{
		{"nothing", nil, ""},
		{"zeros", &specs.LinuxResources{
			Memory: &m{Limit: new(int64(0)), Swap: new(int64(0)), Reservation: new(int64(0)), CheckBeforeUpdate: new(true)},
			CPU:    &c{Shares: new(uint64(0)), Quota: new(int64(0)), Period: new(uint64(0))},
			Pids:   &specs.LinuxPids{Limit: new(int64(0))}, BlockIO: &specs.LinuxBlockIO{Weight: new(uint16(0))},
		}, ""},
		{
			"memory", memory(m{Limit: new(int64(100)), Swap: new(int64(150)), Reservation: new(int64(50))}),
			"memory.swap.max 50\nmemory.max 100\nmemory.low 50",
		},
		{"no swap", memory(m{Limit: new(int64(100)), Swap: new(int64(100))}), "memory.swap.max 0\nmemory.max 100"},
		{"unlimited", memory(m{Limit: new(int64(-1))}), "memory.swap.max max\nmemory.max max"},
		{
			"all unlimited", memory(m{Limit: new(int64(-1)), Swap: new(int64(-1)), Reservation: new(int64(-1))}),
			"memory.swap.max max\nmemory.max max\nmemory.low max",
		},
		{"swap of unlimited memory", memory(m{Limit: new(int64(-1)), Swap: new(int64(7))}), "memory.swap.max 7\nmemory.max max"},
		{"not of v2", memory(m{Kernel: new(int64(1)), KernelTCP: new(int64(1)), Swappiness: new(uint64(1)), DisableOOMKiller: new(true)}), ""}, //nolint:staticcheck // deprecated
		{
			"cpu", cpu(c{Shares: new(uint64(1024)), Quota: new(int64(50000)), Period: new(uint64(20000)), Cpus: "0-1", Mems: "0"}),
			"cpu.weight 100\ncpu.max 50000 20000\ncpuset.cpus 0-1\ncpuset.mems 0",
		},
		{"quota only", cpu(c{Quota: new(int64(50000))}), "cpu.max 50000 100000"},
		{"no quota", cpu(c{Quota: new(int64(-1))}), "cpu.max max 100000"},
		{"period only", cpu(c{Period: new(uint64(1000))}), "cpu.max max 1000"},
		{"burst", cpu(c{Burst: new(uint64(0))}), "cpu.max.burst 0"},
		{"burst and quota", cpu(c{Burst: new(uint64(5)), Quota: new(int64(9))}), "cpu.max.burst 5\ncpu.max 9 100000\ncpu.max.burst 5"},
		{"idle", cpu(c{Idle: new(int64(1))}), "cpu.idle 1"},
		{"real time is not of v2", cpu(c{RealtimeRuntime: new(int64(1)), RealtimePeriod: new(uint64(1))}), ""},
		{"pids", pids(20), "pids.max 20"},
		{"no limit of pids", pids(-1), "pids.max max"},
		{"block I/O", &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{
			Weight: new(uint16(10)), LeafWeight: new(uint16(10)), WeightDevice: []specs.LinuxWeightDevice{disk},
			ThrottleReadBpsDevice: throttle(1), ThrottleWriteBpsDevice: throttle(2), ThrottleReadIOPSDevice: throttle(3), ThrottleWriteIOPSDevice: throttle(0),
		}}, `io.weight 1
or io.bfq.weight 10
io.weight 8:16 10000
or io.bfq.weight 8:16 1000
io.max 254:1 rbps=1
io.max 254:1 wbps=2
io.max 254:1 riops=3
io.max 254:1 wiops=max`},
		{
			"huge pages", &specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}}},
			"hugetlb.2MB.max 4194304\nhugetlb.2MB.rsvd.max 4194304",
		},
		{"rdma", &specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{
			"mlx5_1": {HcaHandles: new(uint32(3)), HcaObjects: new(uint32(4))}, "mlx5_0": {HcaObjects: new(uint32(0))}, "none": {},
		}}, "rdma.max mlx5_0 hca_object=0\nrdma.max mlx5_1 hca_handle=3 hca_object=4"},
		{"network is not of v2", &specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: new(uint32(1))}}, ""},
		{"unified comes last, by lines", &specs.LinuxResources{
			Memory:  &m{Limit: new(int64(100))},
			Unified: map[string]string{"memory.max": "7", "io.max": "8:0 rbps=1\n8:16 wbps=2\n", "cgroup.max.depth": "2"},
		}, "memory.max 100\ncgroup.max.depth 2\nio.max 8:0 rbps=1\nio.max 8:16 wbps=2\nmemory.max 7"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := cgroup.Translate(tc.spec)
			assert.NilError(t, err)
			assert.Equal(t, strings.Join(cgroup.Settings(r), "\n"), tc.want)
		})
	}
}

// What cgroup v2 has in one file or as a difference an update may give in parts.
func TestUpdatesBuildOnWhatWasGiven(t *testing.T) {
	memory := func(limit, swap *int64) *specs.LinuxResources {
		return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: limit, Swap: swap}}
	}
	cpu := func(quota *int64, period *uint64) *specs.LinuxResources {
		return &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: quota, Period: period}}
	}
	n, u := func(n int64) *int64 { return &n }, func(n uint64) *uint64 { return &n }
	r, err := cgroup.Translate(nil)
	assert.NilError(t, err)
	for _, step := range []struct {
		spec *specs.LinuxResources
		want string // "!" and an error
	}{
		{memory(nil, n(100)), "!memory.swap: unable to set swap limit without memory limit"},
		{memory(n(100), nil), "memory.max 100"},
		{memory(nil, n(150)), "memory.swap.max 50"},
		{memory(n(120), nil), "memory.swap.max 30\nmemory.max 120"},
		{memory(n(200), nil), "!memory.swap: memory+swap limit should be >= memory limit"},
		{memory(n(0), n(0)), ""},
		{memory(nil, n(130)), "memory.swap.max 10"},
		{memory(n(-1), nil), "memory.swap.max max\nmemory.max max"},
		{cpu(nil, u(5000)), "cpu.max max 5000"},
		{cpu(n(7000), nil), "cpu.max 7000 5000"},
		{cpu(nil, u(6000)), "cpu.max 7000 6000"},
		{cpu(n(-1), u(0)), "cpu.max max 6000"},
		{cpu(n(2000), u(3000)), "cpu.max 2000 3000"},
	} {
		next, err := cgroup.Next(r, step.spec)
		if text, wrong := strings.CutPrefix(step.want, "!"); wrong {
			assert.ErrorContains(t, err, text)
			assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			continue
		}
		assert.NilError(t, err)
		assert.Equal(t, strings.Join(cgroup.Settings(next), "\n"), step.want)
		r = next
	}
}

func TestTranslateRefuses(t *testing.T) {
	for name, spec := range map[string]*specs.LinuxResources{
		"swap without limit": {Memory: &specs.LinuxMemory{Swap: new(int64(1))}},
		"swap below limit":   {Memory: &specs.LinuxMemory{Limit: new(int64(2)), Swap: new(int64(1))}},
		"path":               {Unified: map[string]string{"../memory.max": "1"}},
		"no controller":      {Unified: map[string]string{"memory": "1"}},
		"core file":          {Unified: map[string]string{"cgroup.procs": "1"}},
		"device type":        {Devices: []specs.LinuxDeviceCgroup{{Type: "x"}}},
		"access to a device": {Devices: []specs.LinuxDeviceCgroup{{Access: "rx"}}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := cgroup.Translate(spec)
			assert.Assert(t, err != nil)
		})
	}
}

// The weights are those of runc since 1.3.2.
func TestWeight(t *testing.T) {
	for shares, want := range map[uint64]uint64{
		0: 1, 2: 1, 3: 2, 4: 2, 100: 17, 512: 59, 1024: 100, 2048: 174, 65536: 3023, 262143: 10000, 262144: 10000, 1 << 40: 10000,
	} {
		assert.Equal(t, cgroup.CPUWeight(shares), want, "%d", shares)
	}
	last := uint64(0)
	for shares := uint64(2); shares <= 262144; shares++ {
		weight := cgroup.CPUWeight(shares)
		assert.Assert(t, weight >= max(last, 1) && weight <= 10000, "%d: %d", shares, weight)
		last = weight
	}
	for weight, want := range map[uint16]uint64{0: 1, 10: 1, 500: 4950, 1000: 10000, 65535: 10000} {
		assert.Equal(t, cgroup.IOWeight(weight), want, "%d", weight)
	}
}

// device is a request to use a device.
type device struct {
	kind, access, major, minor uint32
}

func TestDeviceRules(t *testing.T) {
	const r, w, m = unix.BPF_DEVCG_ACC_READ, unix.BPF_DEVCG_ACC_WRITE, unix.BPF_DEVCG_ACC_MKNOD
	const c, b = unix.BPF_DEVCG_DEV_CHAR, unix.BPF_DEVCG_DEV_BLOCK
	all := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	none := specs.LinuxDeviceCgroup{Access: "rwm"}
	fuse := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: new(int64(10)), Minor: new(int64(229)), Access: "rw"}
	noMem := specs.LinuxDeviceCgroup{Type: "c", Major: new(int64(1)), Minor: new(int64(1)), Access: "w"}
	for _, tc := range []struct {
		name  string
		rules []specs.LinuxDeviceCgroup
		dev   device
		want  bool
	}{
		{"null by default", nil, device{c, r | w, 1, 3}, true},
		{"disk by default", nil, device{b, r, 8, 0}, false},
		{"any node", nil, device{b, m, 8, 0}, true},
		{"pts", nil, device{c, r | w, 136, 77}, true},
		{"null of the wrong kind", nil, device{b, r, 1, 3}, false},
		{"null after deny", []specs.LinuxDeviceCgroup{none}, device{c, r, 1, 3}, true},
		{"fuse", []specs.LinuxDeviceCgroup{none, fuse}, device{c, r | w, 10, 229}, true},
		{"fuse's neighbour", []specs.LinuxDeviceCgroup{none, fuse}, device{c, r | w, 10, 230}, false},
		{"all", []specs.LinuxDeviceCgroup{none, all}, device{b, r | w, 8, 0}, true},
		{"all but one", []specs.LinuxDeviceCgroup{all, noMem}, device{c, r | w, 1, 1}, false},
		{"the rest of that one", []specs.LinuxDeviceCgroup{all, noMem}, device{c, r, 1, 1}, true},
		{"others", []specs.LinuxDeviceCgroup{all, noMem}, device{c, w, 1, 2}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, err := cgroup.DeviceProgram(tc.rules)
			assert.NilError(t, err)
			assert.Equal(t, interpret(t, code, tc.dev), tc.want)
		})
	}
}

// interpret runs the few instructions that the compiler emits.
func interpret(t *testing.T, code []byte, dev device) bool {
	t.Helper()
	context := map[int16]uint32{0: dev.access<<16 | dev.kind, 4: dev.major, 8: dev.minor}
	var reg [11]uint32
	for pc := 0; pc*8 < len(code); pc++ {
		in := code[pc*8:]
		op, dst, src := in[0], in[1]&15, in[1]>>4
		off := int16(uint16(in[2]) | uint16(in[3])<<8)
		imm := uint32(in[4]) | uint32(in[5])<<8 | uint32(in[6])<<16 | uint32(in[7])<<24
		switch op {
		case unix.BPF_LDX | unix.BPF_W | unix.BPF_MEM:
			reg[dst] = context[off]
		case unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X:
			reg[dst] = reg[src]
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			reg[dst] &= imm
		case unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K:
			reg[dst] >>= imm
		case unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K:
			reg[dst] = imm
		case unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K:
			if reg[dst] != imm {
				pc += int(off)
			}
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			if reg[dst] == imm {
				pc += int(off)
			}
		case unix.BPF_JMP | unix.BPF_EXIT:
			return reg[0] == 1
		default:
			t.Fatalf("unknown instruction %#x", op)
		}
	}
	t.Fatal("program does not end")
	return false
}
