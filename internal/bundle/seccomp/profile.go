package seccomp

import (
	"fmt"
	"maps"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const noNotify = "is not supported: no process in the guest can ask an agent on the host"

// What a filter can return; the kernel's SECCOMP_RET_*.
const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000

	actionData = 0xffff // the part of an action that holds an errno
)

var actions = map[specs.LinuxSeccompAction]uint32{
	specs.ActKill:        retKillThread,
	specs.ActKillThread:  retKillThread,
	specs.ActKillProcess: retKillProcess,
	specs.ActTrap:        retTrap,
	specs.ActErrno:       retErrno,
	specs.ActTrace:       retTrace,
	specs.ActLog:         retLog,
	specs.ActAllow:       retAllow,
}

// Actions lists the actions that a profile may name.
func Actions() []string { return names(actions) }

// Operators lists the operators that conditions may have.
func Operators() []string { return names(operators) }

// Archs lists the architectures that a profile may name. Those that an amd64 does
// not run have no effect.
func Archs() []string { return slices.Sorted(maps.Keys(archs)) }

// Flags lists the flags that a profile may have.
func Flags() []string { return names(flagBits) }

func names[K ~string, V any](m map[K]V) []string {
	list := make([]string, 0, len(m))
	for k := range m {
		list = append(list, string(k))
	}
	slices.Sort(list)
	return list
}

// quote bounds what a message repeats.
func quote[T ~string](s T) string {
	if len(s) > 64 {
		s = s[:64] + "..."
	}
	return fmt.Sprintf("%q", string(s))
}

// action returns what the kernel is to return; the field names are for errors.
func action(field, errnoField string, a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	act, ok := actions[a]
	switch {
	case a == specs.ActNotify:
		return 0, unsupported(field, "%s %s", a, noNotify)
	case a == "":
		return 0, invalid(field, "must not be empty")
	case !ok:
		return 0, invalid(field, "%s is not known", quote(a))
	case act != retErrno && act != retTrace:
		if errno != nil {
			return 0, invalid(errnoField, "%s returns no errno", a)
		}
		return act, nil
	case errno == nil:
		return act | uint32(unix.EPERM), nil
	case *errno > actionData:
		return 0, invalid(errnoField, "%d is more than %d", *errno, actionData)
	}
	return act | uint32(*errno), nil
}

// flagTSync is accepted for the sake of runc, which does so: a container's process
// has one thread when it begins, whatever the flag says.
const flagTSync specs.LinuxSeccompFlag = "SECCOMP_FILTER_FLAG_TSYNC"

var flagBits = map[specs.LinuxSeccompFlag]uint32{
	flagTSync:                       0,
	specs.LinuxSeccompFlagLog:       unix.SECCOMP_FILTER_FLAG_LOG,
	specs.LinuxSeccompFlagSpecAllow: unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
}

// flags returns the bits; a profile that says nothing of flags gets SPEC_ALLOW.
func flags(list []specs.LinuxSeccompFlag) (uint32, error) {
	if list == nil {
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil
	}
	var bits uint32
	for i, f := range list {
		field := fmt.Sprintf("flags[%d]", i)
		bit, ok := flagBits[f]
		switch {
		case f == specs.LinuxSeccompFlagWaitKillableRecv:
			return 0, unsupported(field, "%s is for SCMP_ACT_NOTIFY, which is not supported", f)
		case !ok:
			return 0, invalid(field, "%s is not known", quote(f))
		}
		bits |= bit
	}
	return bits, nil
}

// An op compares an argument with a value.
type op int

const (
	_ op = iota
	notEqual
	less
	lessEqual
	equal
	greaterEqual
	greater
	maskedEqual
)

var operators = map[specs.LinuxSeccompOperator]op{
	specs.OpNotEqual:     notEqual,
	specs.OpLessThan:     less,
	specs.OpLessEqual:    lessEqual,
	specs.OpEqualTo:      equal,
	specs.OpGreaterEqual: greaterEqual,
	specs.OpGreaterThan:  greater,
	specs.OpMaskedEqual:  maskedEqual,
}

// The ranks of operators in libseccomp's order of rules.
const (
	rankGreater = iota
	rankLess
	rankEqual
)

func (o op) rank() int {
	switch o {
	case greater, greaterEqual:
		return rankGreater
	case less, lessEqual:
		return rankLess
	}
	return rankEqual
}

// lowTest is how the lower halves decide: an argument that is less is one that is
// not greater or equal.
func (o op) lowTest() bpf.JumpTest {
	if o == greaterEqual || o == less {
		return bpf.JumpGreaterOrEqual
	}
	return bpf.JumpGreaterThan
}

// maxArgs is how many arguments a system call can have.
const maxArgs = 6

// conditions returns the sets of conditions of which one must hold: usually a single
// set, but one for each condition if two are about the same argument.
func conditions(field string, args []specs.LinuxSeccompArg) ([][maxArgs]cond, error) {
	var all [maxArgs]cond
	var each [][maxArgs]cond
	twice := false
	for i, a := range args {
		at := fmt.Sprintf("%s.args[%d]", field, i)
		if a.Index >= maxArgs {
			return nil, invalid(at+".index", "%d is not an index from 0 to %d", a.Index, maxArgs-1)
		}
		op, ok := operators[a.Op]
		if !ok {
			return nil, invalid(at+".op", "%s is not known", quote(a.Op))
		}
		c := cond{op: op, value: a.Value}
		if op == maskedEqual {
			c.mask, c.value = a.Value, a.ValueTwo&a.Value
		}
		twice = twice || all[a.Index].op != 0
		all[a.Index] = c
		one := [maxArgs]cond{}
		one[a.Index] = c
		each = append(each, one)
	}
	if twice {
		return each, nil
	}
	return [][maxArgs]cond{all}, nil
}
