package seccomp_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/bundle/seccomp"
)

// A machine runs a filter as the kernel does.
type machine struct{ vm *bpf.VM }

func newMachine(t testing.TB, f *seccomp.Filter) machine {
	t.Helper()
	assert.Equal(t, len(f.Program)%8, 0)
	assert.Assert(t, len(f.Program)/8 <= seccomp.MaxInstructions)
	var code []bpf.Instruction
	for p := f.Program; len(p) > 0; p = p[8:] {
		raw := bpf.RawInstruction{Op: binary.LittleEndian.Uint16(p), Jt: p[2], Jf: p[3], K: binary.LittleEndian.Uint32(p[4:])}
		in := raw.Disassemble()
		_, unknown := in.(bpf.RawInstruction)
		assert.Assert(t, !unknown, "%v", raw)
		code = append(code, in)
	}
	vm, err := bpf.NewVM(code)
	assert.NilError(t, err)
	return machine{vm}
}

// decide returns what the filter returns. The VM is for packets, whose words are
// big-endian; the kernel's are the processor's.
func (m machine) decide(t testing.TB, arch, nr uint32, args ...uint64) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], nr)
	binary.BigEndian.PutUint32(data[4:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	got, err := m.vm.Run(data)
	assert.NilError(t, err)
	return uint32(got)
}

const (
	amd64 = unix.AUDIT_ARCH_X86_64
	i386  = unix.AUDIT_ARCH_I386
	x32   = 1 << 30

	kill        = uint32(0)
	killProcess = uint32(0x80000000)
	trap        = uint32(0x30000)
	errno       = uint32(0x50000)
	trace       = uint32(0x7ff00000)
	logged      = uint32(0x7ffc0000)
	allow       = uint32(0x7fff0000)
	eperm       = errno | 1
	enosys      = errno | 38
)

func compile(t testing.TB, profile string) (*seccomp.Filter, error) {
	t.Helper()
	p := &specs.LinuxSeccomp{}
	assert.NilError(t, json.Unmarshal([]byte(profile), p), profile)
	return seccomp.Compile(p)
}

func mustCompile(t testing.TB, profile string) machine {
	t.Helper()
	f, err := compile(t, profile)
	assert.NilError(t, err)
	return newMachine(t, f)
}

type decision struct {
	arch, nr uint32
	args     []uint64
	want     uint32
}

func TestDecisions(t *testing.T) {
	args := func(a ...uint64) []uint64 { return a }
	const all = `"architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],`
	for name, tc := range map[string]struct {
		profile string
		want    []decision
	}{
		"default only": {`{"defaultAction":"SCMP_ACT_ALLOW"}`, []decision{
			{amd64, 0, nil, allow},
			{amd64, 100000, nil, allow},
			{amd64, x32, nil, kill},
			{amd64, 1<<32 - 1, nil, allow},
			{i386, 3, nil, kill},
			{unix.AUDIT_ARCH_AARCH64, 0, nil, kill},
		}},
		"every action": {`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
			{"names":["read"],"action":"SCMP_ACT_KILL"},
			{"names":["write"],"action":"SCMP_ACT_KILL_PROCESS"},
			{"names":["open"],"action":"SCMP_ACT_TRAP"},
			{"names":["close"],"action":"SCMP_ACT_ERRNO"},
			{"names":["stat"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
			{"names":["fstat"],"action":"SCMP_ACT_TRACE"},
			{"names":["lstat"],"action":"SCMP_ACT_TRACE","errnoRet":7},
			{"names":["poll"],"action":"SCMP_ACT_LOG"},
			{"names":["lseek"],"action":"SCMP_ACT_KILL_THREAD"},
			{"names":["mmap"],"action":"SCMP_ACT_ERRNO","errnoRet":0}]}`, []decision{
			{amd64, 0, nil, kill},
			{amd64, 1, nil, killProcess},
			{amd64, 2, nil, trap},
			{amd64, 3, nil, eperm},
			{amd64, 4, nil, enosys},
			{amd64, 5, nil, trace | 1},
			{amd64, 6, nil, trace | 7},
			{amd64, 7, nil, logged},
			{amd64, 8, nil, kill},
			{amd64, 9, nil, errno},
			{amd64, 10, nil, allow},
		}},
		"ENOSYS above what the profile knows": {`{"defaultAction":"SCMP_ACT_ERRNO",` + all + `"syscalls":[
			{"names":["read","statx","no_such_call"],"action":"SCMP_ACT_ALLOW"},
			{"names":["clone3"],"action":"SCMP_ACT_ERRNO"}]}`, []decision{
			{amd64, 0, nil, allow},
			{amd64, 1, nil, eperm},
			{amd64, 332, nil, allow},
			{amd64, 333, nil, eperm},
			{amd64, 435, nil, eperm}, // redundant, but known
			{amd64, 436, nil, enosys},
			{amd64, x32, nil, allow}, // read
			{amd64, x32 | 435, nil, eperm},
			{amd64, x32 | 512, nil, enosys},
			{i386, 3, nil, allow},
			{i386, 383, nil, allow},
			{i386, 436, nil, enosys},
		}},
		"no ENOSYS for a profile that allows": {`{"defaultAction":"SCMP_ACT_LOG","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO"}]}`, []decision{
			{amd64, 1, nil, logged},
			{amd64, 1000, nil, logged},
		}},
		"ENOSYS beside a killing default": {`{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[{"names":["write"],"action":"SCMP_ACT_ALLOW"}]}`, []decision{
			{amd64, 0, nil, killProcess},
			{amd64, 2, nil, enosys},
		}},
		"default errno": {`{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":95,"syscalls":[{"names":["write"],"action":"SCMP_ACT_ALLOW"}]}`, []decision{
			{amd64, 0, nil, errno | 95},
			{amd64, 2, nil, enosys},
		}},
		"operators": {`{"defaultAction":"SCMP_ACT_ALLOW",` + all + `"syscalls":[
			{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"op":"SCMP_CMP_EQ","value":8589934597}]},
			{"names":["write"],"action":"SCMP_ACT_ERRNO","args":[{"index":1,"op":"SCMP_CMP_NE","value":8589934597}]},
			{"names":["open"],"action":"SCMP_ACT_ERRNO","args":[{"index":2,"op":"SCMP_CMP_LT","value":8589934597}]},
			{"names":["close"],"action":"SCMP_ACT_ERRNO","args":[{"index":3,"op":"SCMP_CMP_LE","value":8589934597}]},
			{"names":["stat"],"action":"SCMP_ACT_ERRNO","args":[{"index":4,"op":"SCMP_CMP_GE","value":8589934597}]},
			{"names":["fstat"],"action":"SCMP_ACT_ERRNO","args":[{"index":5,"op":"SCMP_CMP_GT","value":8589934597}]},
			{"names":["lstat"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"op":"SCMP_CMP_MASKED_EQ","value":8589934607,"valueTwo":8589934597}]}]}`, []decision{
			{amd64, 0, args(0x200000005), eperm},
			{amd64, 0, args(5), allow},
			{amd64, 0, args(0x200000004), allow},
			{i386, 3, args(5), eperm},
			{amd64, 1, args(0, 0x200000005), allow},
			{amd64, 1, args(0, 5), eperm},
			{amd64, 1, args(0, 0x200000006), eperm},
			{amd64, 2, args(0, 0, 0x200000004), eperm},
			{amd64, 2, args(0, 0, 0x200000005), allow},
			{amd64, 2, args(0, 0, 0x1ffffffff), eperm},
			{amd64, 2, args(0, 0, 0x300000000), allow},
			{amd64, 3, args(0, 0, 0, 0x200000005), eperm},
			{amd64, 3, args(0, 0, 0, 0x200000006), allow},
			{amd64, 4, args(0, 0, 0, 0, 0x200000005), eperm},
			{amd64, 4, args(0, 0, 0, 0, 0x200000004), allow},
			{amd64, 4, args(0, 0, 0, 0, 0x300000000), eperm},
			{amd64, 4, args(0, 0, 0, 0, 0x1ffffffff), allow},
			{amd64, 5, args(0, 0, 0, 0, 0, 0x200000005), allow},
			{amd64, 5, args(0, 0, 0, 0, 0, 0x200000006), eperm},
			{amd64, 6, args(0x2000000f5), eperm},
			{amd64, 6, args(0xf5), allow},
			{amd64, 6, args(0x2000000f4), allow},
		}},
		"conditions of a rule must all hold, rules are alternatives": {`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
			{"names":["mmap"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"op":"SCMP_CMP_EQ","value":0},{"index":2,"op":"SCMP_CMP_MASKED_EQ","value":4,"valueTwo":0}]},
			{"names":["mmap"],"action":"SCMP_ACT_ALLOW","args":[{"index":1,"op":"SCMP_CMP_LE","value":10}]}]}`, []decision{
			{amd64, 9, args(0, 100, 3), allow},
			{amd64, 9, args(1, 100, 3), eperm},
			{amd64, 9, args(0, 100, 7), eperm},
			{amd64, 9, args(1, 10, 7), allow},
		}},
		"two conditions on one argument are alternatives": {`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
			{"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"op":"SCMP_CMP_EQ","value":0},{"index":0,"op":"SCMP_CMP_EQ","value":8}]}]}`, []decision{
			{amd64, 135, args(0), allow},
			{amd64, 135, args(8), allow},
			{amd64, 135, args(1), eperm},
		}},
		"a rule without conditions wins, the first of them": {`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
			{"names":["write"],"action":"SCMP_ACT_KILL","args":[{"index":0,"op":"SCMP_CMP_EQ","value":1}]},
			{"names":["write"],"action":"SCMP_ACT_LOG"},
			{"names":["write"],"action":"SCMP_ACT_TRAP"},
			{"names":["write"],"action":"SCMP_ACT_ERRNO"}]}`, []decision{
			{amd64, 1, args(1), logged},
		}},
		"x86 multiplexes": {`{"defaultAction":"SCMP_ACT_ERRNO",` + all + `"syscalls":[
			{"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"op":"SCMP_CMP_NE","value":40}]},
			{"names":["accept","semop"],"action":"SCMP_ACT_ALLOW"}]}`, []decision{
			{amd64, 41, args(40), eperm},
			{amd64, 41, args(2), allow},
			{i386, 359, args(40), eperm},
			{i386, 359, args(2), allow},
			{i386, 102, args(1), allow}, // the family is out of sight
			{i386, 102, args(5), allow},
			{i386, 102, args(2), eperm},
			{i386, 117, args(1), allow},
			{i386, 117, args(2), eperm},
		}},
		"x32 has numbers of its own": {`{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X32"],"syscalls":[{"names":["execve"],"action":"SCMP_ACT_ALLOW"}]}`, []decision{
			{amd64, 59, nil, allow}, // the processor's own ABI is always there
			{amd64, x32 | 520, nil, allow},
			{amd64, x32 | 59, nil, eperm},
			{i386, 11, nil, kill},
		}},
		"foreign architectures beside the own": {`{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_AARCH64","SCMP_ARCH_X86_64"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`, []decision{
			{amd64, 0, nil, allow},
			{unix.AUDIT_ARCH_AARCH64, 63, nil, kill},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m := mustCompile(t, tc.profile)
			for _, d := range tc.want {
				got := m.decide(t, d.arch, d.nr, d.args...)
				assert.Check(t, got == d.want, "arch %#x, call %#x %#x: %#x, want %#x", d.arch, d.nr, d.args, got, d.want)
			}
		})
	}
}

func TestNothingToDo(t *testing.T) {
	f, err := compile(t, `{}`)
	assert.NilError(t, err)
	assert.Assert(t, f == nil)
}

func TestFlags(t *testing.T) {
	for flags, want := range map[string]uint32{
		``:                                       unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
		`,"flags":null`:                          unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
		`,"flags":[]`:                            0,
		`,"flags":["SECCOMP_FILTER_FLAG_TSYNC"]`: 0,
		`,"flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW"]`: unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
	} {
		f, err := compile(t, `{"defaultAction":"SCMP_ACT_ALLOW"`+flags+`}`)
		assert.NilError(t, err)
		assert.Equal(t, f.Flags, want, flags)
	}
}

func TestErrors(t *testing.T) {
	rule := func(rest string) string {
		return `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_LOG"},` + rest + `]}`
	}
	arg := func(rest string) string {
		return rule(`{"names":["read"],"action":"SCMP_ACT_LOG","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"},` + rest + `]}`)
	}
	var many []string
	for i := range 3000 {
		many = append(many, fmt.Sprintf(`{"names":["write"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"op":"SCMP_CMP_EQ","value":%d}]}`, i))
	}
	for _, tc := range []struct {
		profile, field, reason string
		unsupported            bool
	}{
		{`{"syscalls":[{"names":["read"],"action":"SCMP_ACT_LOG"}]}`, "defaultAction", "must not be empty", false},
		{`{"defaultAction":"ALLOW"}`, "defaultAction", `"ALLOW" is not known`, false},
		{`{"defaultAction":"SCMP_ACT_NOTIFY"}`, "defaultAction", "SCMP_ACT_NOTIFY is not supported", true},
		{`{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}`, "defaultErrnoRet", "returns no errno", false},
		{`{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":65536}`, "defaultErrnoRet", "65536 is more than 65535", false},
		{`{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/s"}`, "listenerPath", "is not supported", true},
		{`{"defaultAction":"SCMP_ACT_ALLOW","listenerMetadata":"x"}`, "listenerMetadata", "is not supported", true},
		{`{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG","X"]}`, "flags[1]", `"X" is not known`, false},
		{`{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}`, "flags[0]", "SCMP_ACT_NOTIFY", true},
		{`{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86","amd64"]}`, "architectures[1]", `"amd64" is not known`, false},
		{`{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_S390X"]}`, "architectures", "none that an amd64 runs", true},
		{rule(`{"action":"SCMP_ACT_LOG"}`), "syscalls[1].names", "must not be empty", false},
		{rule(`{"names":["read",""],"action":"SCMP_ACT_LOG"}`), "syscalls[1].names[1]", "must not be empty", false},
		{rule(`{"names":["read"]}`), "syscalls[1].action", "must not be empty", false},
		{rule(`{"names":["read"],"action":"SCMP_ACT_NOTIFY"}`), "syscalls[1].action", "is not supported", true},
		{rule(`{"names":["read"],"action":"SCMP_ACT_KILL","errnoRet":1}`), "syscalls[1].errnoRet", "returns no errno", false},
		{rule(`{"names":["read"],"action":"SCMP_ACT_ERRNO","errnoRet":70000}`), "syscalls[1].errnoRet", "more than 65535", false},
		{arg(`{"index":6,"value":1,"op":"SCMP_CMP_EQ"}`), "syscalls[1].args[1].index", "6 is not an index", false},
		{arg(`{"index":1,"value":1,"op":"=="}`), "syscalls[1].args[1].op", `"==" is not known`, false},
		{arg(`{"index":1,"value":1}`), "syscalls[1].args[1].op", `"" is not known`, false},
		{rule(strings.Join(many, ",")), "syscalls", "more than the kernel's 4096", false},
		{
			rule(`{"names":["read"` + strings.Repeat(`,"read"`, 1<<16) + `],"action":"SCMP_ACT_LOG"}`),
			"syscalls[1]", "more than 65536 rules", false,
		},
	} {
		_, err := compile(t, tc.profile)
		var e *seccomp.Error
		assert.Assert(t, errors.As(err, &e), "%.200s: %v", tc.profile, err)
		assert.Equal(t, e.Field, tc.field)
		assert.ErrorContains(t, err, tc.reason)
		assert.Equal(t, e.Unsupported, tc.unsupported, tc.field)
	}
}

// Whatever Compile accepts is a program that ends, with an action of the profile.
func FuzzCompile(f *testing.F) {
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X32"],"syscalls":[{"names":["write","read"],"action":"SCMP_ACT_ALLOW",
		"args":[{"index":1,"value":7,"valueTwo":3,"op":"SCMP_CMP_MASKED_EQ"}]}]}`), uint32(1), uint64(3), uint64(3))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_LOG","syscalls":[{"names":["socket"],"action":"SCMP_ACT_TRACE","args":[{"index":0,"op":"SCMP_CMP_GT","value":5000000000}]}]}`),
		uint32(41), uint64(5000000001), uint64(0))
	f.Fuzz(func(t *testing.T, data []byte, nr uint32, a, b uint64) {
		p := &specs.LinuxSeccomp{}
		if json.Unmarshal(data, p) != nil {
			return
		}
		filter, err := seccomp.Compile(p)
		if err != nil || filter == nil {
			return
		}
		m := newMachine(t, filter)
		for _, arch := range []uint32{amd64, i386, nr} {
			for _, n := range []uint32{nr, nr % 512, x32 | nr%600} {
				switch got := m.decide(t, arch, n, a, b, a, b, a, b) &^ 0xffff; got {
				case kill, killProcess, trap, errno, trace, logged, allow:
				default:
					t.Errorf("%#x is no action", got)
				}
			}
		}
	})
}

// Each operator against its meaning, at and around all borders of the halves.
func TestOperatorsMeanWhatTheySay(t *testing.T) {
	values := []uint64{0, 1, 2, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1, 5 << 32, 5<<32 + 7, 1<<63 - 1, 1 << 63, 1<<64 - 2, 1<<64 - 1}
	for op, holds := range map[specs.LinuxSeccompOperator]func(a, v, two uint64) bool{
		specs.OpEqualTo:      func(a, v, _ uint64) bool { return a == v },
		specs.OpNotEqual:     func(a, v, _ uint64) bool { return a != v },
		specs.OpLessThan:     func(a, v, _ uint64) bool { return a < v },
		specs.OpLessEqual:    func(a, v, _ uint64) bool { return a <= v },
		specs.OpGreaterThan:  func(a, v, _ uint64) bool { return a > v },
		specs.OpGreaterEqual: func(a, v, _ uint64) bool { return a >= v },
		specs.OpMaskedEqual:  func(a, v, two uint64) bool { return a&v == two&v },
	} {
		for _, v := range values {
			two := v ^ 0x100000001
			f, err := seccomp.Compile(&specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow,
				Architectures: []specs.Arch{specs.ArchX86},
				Syscalls: []specs.LinuxSyscall{{
					Names: []string{"read"}, Action: specs.ActErrno,
					Args: []specs.LinuxSeccompArg{{Index: 2, Value: v, ValueTwo: two, Op: op}, {Index: 4, Value: 9, Op: specs.OpEqualTo}},
				}},
			})
			assert.NilError(t, err)
			m := newMachine(t, f)
			for _, a := range values {
				for _, other := range []uint64{9, 8} {
					want, want32 := allow, allow
					if other == 9 && holds(a, v, two) {
						want = eperm
					}
					if other == 9 && holds(uint64(uint32(a)), uint64(uint32(v)), uint64(uint32(two))) {
						want32 = eperm
					}
					got := m.decide(t, amd64, 0, 0, 0, a, 0, other)
					assert.Equal(t, got, want, "%s: %#x and %#x, %d", op, a, v, other)
					got = m.decide(t, i386, 3, 0, 0, a, 0, other)
					assert.Equal(t, got, want32, "%s, 32 bits: %#x and %#x, %d", op, a, v, other)
				}
			}
		}
	}
}

// A profile as large as engines' defaults stays small and shallow.
func TestLargeProfile(t *testing.T) {
	var names []string
	nr := map[string]uint32{}
	for i, line := range strings.Split(readTable(t), "\n") {
		fields := strings.Fields(line)
		if len(fields) != 4 || fields[0] == "#" || fields[1] == "-" {
			continue
		}
		n, err := strconv.Atoi(fields[1])
		assert.NilError(t, err)
		nr[fields[0]] = uint32(n)
		if i%7 != 0 {
			names = append(names, fields[0])
		}
	}
	f, err := seccomp.Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls:      []specs.LinuxSyscall{{Names: names, Action: specs.ActAllow}},
	})
	assert.NilError(t, err)
	assert.Assert(t, len(f.Program)/8 < 1024, "%d instructions", len(f.Program)/8)
	m := newMachine(t, f)
	for _, name := range names {
		assert.Equal(t, m.decide(t, amd64, nr[name]), allow, name)
		delete(nr, name)
	}
	for name, n := range nr {
		assert.Equal(t, m.decide(t, amd64, n), eperm, name)
	}
}

func readTable(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("syscalls.txt")
	assert.NilError(t, err)
	return string(data)
}

// The table has what the version of x/sys in use has: an update tells of new calls.
func TestTable(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "golang.org/x/sys").Output()
	assert.NilError(t, err)
	table := readTable(t)
	for column, file := range map[string]string{`(\d+|-)`: "zsysnum_linux_amd64.go", `(?:\d+|-) (\d+|-)`: "zsysnum_linux_386.go"} {
		path := filepath.Join(strings.TrimSpace(string(out)), "unix", file)
		source, err := os.ReadFile(path)
		assert.NilError(t, err)
		calls := regexp.MustCompile(`(?m)^\s+SYS_(\w+)\s+= (\d+)`).FindAllStringSubmatch(string(source), -1)
		assert.Assert(t, len(calls) > 350)
		for _, call := range calls {
			name := strings.ToLower(call[1])
			row := regexp.MustCompile(`(?m)^` + name + ` ` + column).FindStringSubmatch(table)
			assert.Assert(t, row != nil, "%s is not in the table", name)
			assert.Equal(t, row[1], call[2], name)
		}
	}
	lines := strings.Split(strings.TrimSpace(table), "\n")
	for _, line := range lines[1:] {
		assert.Assert(t, regexp.MustCompile(`^[a-z0-9_]+( (\d+|-)){3}$`).MatchString(line), line)
	}
}
