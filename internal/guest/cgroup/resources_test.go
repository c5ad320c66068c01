package cgroup_test

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/cgroup"
)

func TestTranslate(t *testing.T) {
	for _, tc := range []struct {
		name string
		spec *specs.LinuxResources
		want map[string]string
	}{
		{"nothing", nil, map[string]string{}},
		{
			"memory", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(100)), Swap: new(int64(150)), Reservation: new(int64(50))}},
			map[string]string{"memory.max": "100", "memory.swap.max": "50", "memory.low": "50"},
		},
		{
			"no swap", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(100)), Swap: new(int64(100))}},
			map[string]string{"memory.max": "100", "memory.swap.max": "0"},
		},
		{
			"unlimited", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(-1)), Swap: new(int64(-1))}, Pids: &specs.LinuxPids{Limit: new(int64(-1))}},
			map[string]string{"memory.max": "max", "memory.swap.max": "max", "pids.max": "max"},
		},
		{
			"cpu", &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: new(uint64(1024)), Quota: new(int64(50000)), Period: new(uint64(100000)), Cpus: "0-1"}},
			map[string]string{"cpu.weight": "39", "cpu.max": "50000 100000", "cpuset.cpus": "0-1"},
		},
		{"quota only", &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(50000))}}, map[string]string{"cpu.max": "50000"}},
		{"period only", &specs.LinuxResources{CPU: &specs.LinuxCPU{Period: new(uint64(1000))}}, map[string]string{"cpu.max": "max 1000"}},
		{"unified", &specs.LinuxResources{Unified: map[string]string{"memory.high": "7"}}, map[string]string{"memory.high": "7"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := cgroup.Translate(tc.spec)
			assert.NilError(t, err)
			assert.DeepEqual(t, cgroup.Files(r), tc.want)
		})
	}
}

func TestTranslateRefuses(t *testing.T) {
	for name, spec := range map[string]*specs.LinuxResources{
		"swap without limit": {Memory: &specs.LinuxMemory{Swap: new(int64(1))}},
		"swap below limit":   {Memory: &specs.LinuxMemory{Limit: new(int64(2)), Swap: new(int64(1))}},
		"path":               {Unified: map[string]string{"../memory.max": "1"}},
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

func TestWeight(t *testing.T) {
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 1024: 39, 262144: 10000, 1 << 40: 10000} {
		assert.Equal(t, cgroup.Weight(shares), want, "%d", shares)
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
