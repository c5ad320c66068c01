// Package seccomp compiles the seccomp profile of a container's configuration to
// the program for the kernel of its guest. internal/bundle calls it, and internal/shareserver, which confines itself
// on the host by it. It runs on the
// host, where that is fast, and hands out nothing but instructions and flags: it
// loads nothing, and knows of the guest only that it is an amd64.
//
// The semantics are those of runc with libseccomp:
//   - A name that no table knows is skipped, and so is a rule whose action is the
//     default one. Of a system call's other rules the first without arguments decides
//     alone; else, of those that match, the one that libseccomp tries first.
//   - The conditions of a rule must all hold, but if two look at the same argument
//     each of them is a rule of its own.
//   - System calls with higher numbers than all that the profile names get ENOSYS if
//     the default action denies, so that programs fall back to what the profile knows.
//   - The 32-bit ABIs compare 32 bits; x86's old multiplexers socketcall and ipc are
//     filtered as the calls that they stand for.
//   - The ABI of the processor is always there. A system call of another ABI than
//     those of the profile kills the thread.
package seccomp

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// MaxInstructions is what the kernel takes.
const MaxInstructions = 4096

// maxRules bounds the work for one profile. A rule counts for each system call and ABI.
const maxRules = 1 << 16

// Filter is a compiled profile.
type Filter struct {
	// Program is an array of the kernel's struct sock_filter, little-endian.
	Program []byte
	Flags   uint32 // SECCOMP_FILTER_FLAG_*
}

// Error tells what is wrong with a field of the profile.
type Error struct {
	Field  string // such as "syscalls[3].args[0].op"
	Reason string
	// Unsupported tells that another runtime could honour the value.
	Unsupported bool
}

// Error implements error.
func (e *Error) Error() string { return e.Field + ": " + e.Reason }

func invalid(field, format string, args ...any) error {
	return &Error{Field: field, Reason: fmt.Sprintf(format, args...)}
}

func unsupported(field, format string, args ...any) error {
	return &Error{Field: field, Reason: fmt.Sprintf(format, args...), Unsupported: true}
}

// Compile returns the filter for a profile, or nil for a profile that has neither a
// default action nor rules. All errors are *Error.
func Compile(p *specs.LinuxSeccomp) (*Filter, error) {
	if p.ListenerPath != "" {
		return nil, unsupported("listenerPath", "%s", noNotify)
	}
	if p.ListenerMetadata != "" {
		return nil, unsupported("listenerMetadata", "%s", noNotify)
	}
	if p.DefaultAction == "" && len(p.Syscalls) == 0 {
		return nil, nil
	}
	deny, err := action("defaultAction", "defaultErrnoRet", p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	flags, err := flags(p.Flags)
	if err != nil {
		return nil, err
	}
	abis, err := abisOf(p.Architectures)
	if err != nil {
		return nil, err
	}
	c := &compiler{def: deny, abis: abis}
	for i := range p.Syscalls {
		if err := c.add(fmt.Sprintf("syscalls[%d]", i), &p.Syscalls[i]); err != nil {
			return nil, err
		}
	}
	program := c.program()
	if len(program) > MaxInstructions {
		return nil, invalid("syscalls", "need %d instructions, which is more than the kernel's %d", len(program), MaxInstructions)
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, invalid("syscalls", "%v", err)
	}
	f := &Filter{Flags: flags}
	for _, in := range raw {
		f.Program = binary.LittleEndian.AppendUint16(f.Program, in.Op)
		f.Program = append(f.Program, in.Jt, in.Jf)
		f.Program = binary.LittleEndian.AppendUint32(f.Program, in.K)
	}
	return f, nil
}

// A cond is a condition of a rule; without an op there is none.
type cond struct {
	op          op
	value, mask uint64 // mask: of maskedEqual
}

// A rule is what one entry of the profile means for one system call.
type rule struct {
	action uint32
	args   [maxArgs]cond
}

func (r *rule) unconditional() bool { return r.args == [maxArgs]cond{} }

// calls are the rules of one ABI.
type calls struct {
	*abi
	rules   map[uint32][]rule // by the number, in the order of the profile
	highest uint32            // number that the profile names; 0: none
}

type compiler struct {
	def   uint32 // action
	abis  []*calls
	rules int // also those that were there already
	have  map[ruleKey]struct{}
}

// A ruleKey finds a rule that is there twice, which would cost instructions.
type ruleKey struct {
	abi *calls
	nr  uint32
	rule
}

// add adds an entry of the profile.
func (c *compiler) add(field string, s *specs.LinuxSyscall) error {
	act, err := action(field+".action", field+".errnoRet", s.Action, s.ErrnoRet)
	if err != nil {
		return err
	}
	if len(s.Names) == 0 {
		return invalid(field+".names", "must not be empty")
	}
	alternatives, err := conditions(field, s.Args)
	if err != nil {
		return err
	}
	for i, name := range s.Names {
		if name == "" {
			return invalid(fmt.Sprintf("%s.names[%d]", field, i), "must not be empty")
		}
		for _, abi := range c.abis {
			if nr, ok := abi.number(name); ok {
				abi.highest = max(abi.highest, nr)
			}
			if act == c.def {
				continue
			}
			for _, args := range alternatives {
				abi.each(name, args, func(nr uint32, args [maxArgs]cond) { c.put(abi, nr, rule{act, args}) })
				if c.rules > maxRules {
					return invalid(field, "is too much: the profile has more than %d rules", maxRules)
				}
			}
		}
	}
	return nil
}

func (c *compiler) put(abi *calls, nr uint32, r rule) {
	if abi.narrow {
		for i := range r.args {
			r.args[i].value &= 1<<32 - 1
			r.args[i].mask &= 1<<32 - 1
		}
	}
	for i := range r.args {
		if a := &r.args[i]; a.op == maskedEqual && a.mask == 0 {
			*a = cond{} // always true
		}
	}
	c.rules++
	key := ruleKey{abi, nr, r}
	if _, ok := c.have[key]; ok {
		return
	}
	if c.have == nil {
		c.have = make(map[ruleKey]struct{})
	}
	c.have[key] = struct{}{}
	abi.rules[nr] = append(abi.rules[nr], r)
}

// denies tells whether the default action is one that takes a system call away.
func (c *compiler) denies() bool {
	switch c.def &^ actionData {
	case retAllow, retLog, retTrace:
		return false
	}
	return true
}

// Offsets in the kernel's struct seccomp_data, of 32-bit words.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

func load(off uint32) bpf.Instruction   { return bpf.LoadAbsolute{Off: off, Size: 4} }
func ret(action uint32) bpf.Instruction { return bpf.RetConstant{Val: action} }

// program puts the ABIs one after the other. All code ends in a return, so that
// pieces can be joined without labels.
func (c *compiler) program() []bpf.Instruction {
	code := []bpf.Instruction{ret(retKillThread)}
	for _, arch := range []uint32{unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_X86_64} {
		segments := c.segments(arch)
		if segments == nil {
			continue
		}
		section := append([]bpf.Instruction{load(offNumber)}, search(segments)...)
		code = slices.Concat([]bpf.Instruction{
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: arch, SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(section))},
		}, section, code)
	}
	return append([]bpf.Instruction{load(offArch)}, code...)
}

// A segment is what happens to the numbers from first on, until the next segment.
type segment struct {
	first uint32
	code  []bpf.Instruction
}

// segments divides all numbers that the kernel reports with this architecture; nil
// if the profile is not for it.
func (c *compiler) segments(arch uint32) []segment {
	var list []segment
	add := func(first uint32, code ...bpf.Instruction) {
		n := len(list)
		switch {
		case n > 0 && list[n-1].first == first:
			list[n-1].code = code
		case n > 0 && slices.Equal(list[n-1].code, code):
		default:
			list = append(list, segment{first, code})
		}
	}
	x32 := false
	for _, abi := range c.abis {
		if abi.arch != arch {
			continue
		}
		x32 = x32 || abi.bit != 0
		add(abi.bit, ret(c.def))
		numbers := make([]uint32, 0, len(abi.rules))
		for nr := range abi.rules {
			numbers = append(numbers, nr)
		}
		slices.Sort(numbers)
		for i, nr := range numbers {
			add(nr, decide(abi.rules[nr], c.def, abi.narrow)...)
			if i+1 == len(numbers) || numbers[i+1] != nr+1 {
				add(nr+1, ret(c.def))
			}
		}
		if c.denies() && abi.highest != 0 {
			add(abi.highest+1, ret(retErrno|uint32(unix.ENOSYS)))
		}
	}
	if arch == unix.AUDIT_ARCH_X86_64 && !x32 {
		add(x32Bit, ret(retKillThread))
		// A tracer skips a system call by making its number -1.
		add(1<<32-1, ret(c.def))
	}
	return list
}

// search finds the segment of the number, which is loaded, in a binary tree.
func search(segments []segment) []bpf.Instruction {
	if len(segments) == 1 {
		return segments[0].code
	}
	middle := len(segments) / 2
	left, right := search(segments[:middle]), search(segments[middle:])
	if first := segments[middle].first; len(left) <= maxSkip {
		return slices.Concat([]bpf.Instruction{
			bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: first, SkipTrue: uint8(len(left))},
		}, left, right)
	} else {
		return slices.Concat([]bpf.Instruction{
			bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: first, SkipFalse: 1},
			bpf.Jump{Skip: uint32(len(left))},
		}, left, right)
	}
}

// maxSkip is how far a conditional jump reaches.
const maxSkip = 255

// decide tries the rules of one system call.
func decide(rules []rule, def uint32, narrow bool) []bpf.Instruction {
	if i := slices.IndexFunc(rules, func(r rule) bool { return r.unconditional() }); i >= 0 {
		return []bpf.Instruction{ret(rules[i].action)}
	}
	var code []bpf.Instruction
	for _, r := range slices.SortedStableFunc(slices.Values(rules), before) {
		body := []bpf.Instruction{ret(r.action)}
		for i := maxArgs - 1; i >= 0; i-- {
			if a := r.args[i]; a.op != 0 {
				body = a.guard(uint32(i), narrow, body)
			}
		}
		code = append(code, body...)
	}
	return append(code, ret(def))
}

// before orders the rules of a system call as libseccomp tries them: by their first
// conditions, that on the later argument first, equality before less before greater,
// the narrower before the wider; a rule with more conditions comes after one that
// begins alike.
func before(a, b rule) int {
	for i := range maxArgs {
		x, y := a.args[i], b.args[i]
		switch {
		case x == y:
			continue
		case x.op == 0 || y.op == 0:
			// The other's next condition is on a later argument, or it has none left.
			if x.op == 0 {
				return -1
			}
			return 1
		}
		if c := cmp.Compare(y.op.rank(), x.op.rank()); c != 0 {
			return c
		}
		if x.op.rank() == rankLess {
			x, y = y, x
		}
		if c := cmp.Compare(y.value, x.value); c != 0 {
			return c
		}
	}
	return 0
}

// guard makes body run only if the condition holds for an argument, and else skips
// it. body is short: the rest of one rule.
func (a cond) guard(index uint32, narrow bool, body []bpf.Instruction) []bpf.Instruction {
	low := offArgs + 8*index
	lo, hi := uint32(a.value), uint32(a.value>>32)
	skip := uint8(len(body))
	var code []bpf.Instruction
	// The upper halves decide unless they are equal.
	test := func(c bpf.JumpTest, v uint32, onTrue, onFalse uint8) bpf.Instruction {
		return bpf.JumpIf{Cond: c, Val: v, SkipTrue: onTrue, SkipFalse: onFalse}
	}
	switch a.op {
	case equal:
		if !narrow {
			code = append(code, load(low+4), test(bpf.JumpEqual, hi, 0, 2+skip))
		}
		code = append(code, load(low), test(bpf.JumpEqual, lo, 0, skip))
	case notEqual:
		if !narrow {
			code = append(code, load(low+4), test(bpf.JumpEqual, hi, 0, 2))
		}
		code = append(code, load(low), test(bpf.JumpEqual, lo, skip, 0))
	case greater, greaterEqual:
		if !narrow {
			code = append(code, load(low+4), test(bpf.JumpGreaterThan, hi, 3, 0), test(bpf.JumpEqual, hi, 0, 2+skip))
		}
		code = append(code, load(low), test(a.op.lowTest(), lo, 0, skip))
	case less, lessEqual:
		if !narrow {
			code = append(code, load(low+4), test(bpf.JumpGreaterThan, hi, 3+skip, 0), test(bpf.JumpEqual, hi, 0, 2))
		}
		code = append(code, load(low), test(a.op.lowTest(), lo, skip, 0))
	case maskedEqual:
		and := func(mask uint64) bpf.Instruction {
			return bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: uint32(mask)}
		}
		if !narrow {
			code = append(code, load(low+4), and(a.mask>>32), test(bpf.JumpEqual, hi, 0, 3+skip))
		}
		code = append(code, load(low), and(a.mask), test(bpf.JumpEqual, lo, 0, skip))
	}
	return append(code, body...)
}
