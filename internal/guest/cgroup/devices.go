package cgroup

import (
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// deviceRule allows or denies access to devices. A negative number matches all.
type deviceRule struct {
	allow        bool
	kind         int32 // BPF_DEVCG_DEV_*; 0: both
	major, minor int64
	access       int32 // BPF_DEVCG_ACC_*
}

// What every container may use, whatever its rules say: any node may be made, and those that its
// /dev has may be opened. Callers count on the tun device, too. /dev/console is a pts; the node
// 5:1 would be the console of the VM.
var defaultDevices = []deviceRule{
	{true, unix.BPF_DEVCG_DEV_CHAR, -1, -1, unix.BPF_DEVCG_ACC_MKNOD},
	{true, unix.BPF_DEVCG_DEV_BLOCK, -1, -1, unix.BPF_DEVCG_ACC_MKNOD},
	{true, unix.BPF_DEVCG_DEV_CHAR, 1, 3, allAccess},    // null
	{true, unix.BPF_DEVCG_DEV_CHAR, 1, 5, allAccess},    // zero
	{true, unix.BPF_DEVCG_DEV_CHAR, 1, 7, allAccess},    // full
	{true, unix.BPF_DEVCG_DEV_CHAR, 1, 8, allAccess},    // random
	{true, unix.BPF_DEVCG_DEV_CHAR, 1, 9, allAccess},    // urandom
	{true, unix.BPF_DEVCG_DEV_CHAR, 5, 0, allAccess},    // tty
	{true, unix.BPF_DEVCG_DEV_CHAR, 5, 2, allAccess},    // ptmx
	{true, unix.BPF_DEVCG_DEV_CHAR, 10, 200, allAccess}, // net/tun
	{true, unix.BPF_DEVCG_DEV_CHAR, 136, -1, allAccess}, // pts
}

const allAccess = unix.BPF_DEVCG_ACC_MKNOD | unix.BPF_DEVCG_ACC_READ | unix.BPF_DEVCG_ACC_WRITE

var deviceKinds = map[string]int32{
	"":  0,
	"a": 0,
	"b": unix.BPF_DEVCG_DEV_BLOCK,
	"c": unix.BPF_DEVCG_DEV_CHAR,
	"u": unix.BPF_DEVCG_DEV_CHAR,
}

// deviceRules returns the rules in order; a later one wins. Without a rule
// nothing is allowed.
func deviceRules(list []specs.LinuxDeviceCgroup) ([]deviceRule, error) {
	var rules []deviceRule
	for _, d := range list {
		kind, ok := deviceKinds[d.Type]
		if !ok {
			return nil, fmt.Errorf("devices: unknown type %q", d.Type)
		}
		r := deviceRule{allow: d.Allow, kind: kind, major: -1, minor: -1}
		if d.Major != nil {
			r.major = *d.Major
		}
		if d.Minor != nil {
			r.minor = *d.Minor
		}
		if d.Access == "" {
			r.access = allAccess
		}
		for _, c := range d.Access {
			i := strings.IndexRune("mrw", c) // in the order of the BPF_DEVCG_ACC_* bits
			if i < 0 {
				return nil, fmt.Errorf("devices: unknown access %q", d.Access)
			}
			r.access |= 1 << i
		}
		rules = append(rules, r)
	}
	return append(rules, defaultDevices...), nil
}

// Registers of the program.
const (
	regKind = iota + regContext + 1
	regAccess
	regMajor
	regMinor
	regScratch
)

// deviceProgram compiles the rules into a program of type cgroup_device. Its
// context has three 32-bit words: the access in the upper and the kind in the lower half
// of the first, then major and minor.
func deviceProgram(rules []deviceRule) []byte {
	a := &assembler{}
	a.load(regKind, 0)
	a.emit(unix.BPF_ALU|unix.BPF_MOV|unix.BPF_X, regAccess, regKind, 0, 0)
	a.alu(unix.BPF_AND, regKind, 0xffff)
	a.alu(unix.BPF_RSH, regAccess, 16)
	a.load(regMajor, 4)
	a.load(regMinor, 8)
	for _, r := range slices.Backward(rules) {
		rule := &assembler{}
		// Conditions, each skipping the rest of the rule; the distances are known at the end.
		type condition struct {
			op, reg uint8
			imm     int32
		}
		var conditions []condition
		if r.kind != 0 {
			conditions = append(conditions, condition{unix.BPF_JNE, regKind, r.kind})
		}
		if r.major >= 0 {
			conditions = append(conditions, condition{unix.BPF_JNE, regMajor, int32(r.major)})
		}
		if r.minor >= 0 {
			conditions = append(conditions, condition{unix.BPF_JNE, regMinor, int32(r.minor)})
		}
		result := int32(0)
		if r.allow {
			result = 1
		}
		const exitLen, accessLen = 2, 3
		for i, c := range conditions {
			rest := len(conditions) - 1 - i + accessLen + exitLen
			rule.jump(c.op, c.reg, c.imm, int16(rest))
		}
		// An allowing rule must allow all of the access, a denying one deny any.
		rule.emit(unix.BPF_ALU|unix.BPF_MOV|unix.BPF_X, regScratch, regAccess, 0, 0)
		if r.allow {
			rule.alu(unix.BPF_AND, regScratch, ^r.access)
			rule.jump(unix.BPF_JNE, regScratch, 0, exitLen)
		} else {
			rule.alu(unix.BPF_AND, regScratch, r.access)
			rule.jump(unix.BPF_JEQ, regScratch, 0, exitLen)
		}
		rule.exit(result)
		a.code = append(a.code, rule.code...)
	}
	a.exit(0)
	return a.code
}

// allowsAll tells whether the rules need no program.
func allowsAll(rules []deviceRule) bool {
	for _, r := range slices.Backward(rules) {
		if r.kind == 0 && r.major < 0 && r.minor < 0 && r.access == allAccess {
			return r.allow
		}
		if !r.allow {
			return false
		}
	}
	return false
}

// limitDevices makes the kernel apply the rules to the group's processes.
func (g *Group) limitDevices(rules []deviceRule) error {
	if allowsAll(rules) {
		return nil
	}
	if err := attach(g.fd, unix.BPF_PROG_TYPE_CGROUP_DEVICE, unix.BPF_CGROUP_DEVICE, deviceProgram(rules)); err != nil {
		return fmt.Errorf("apply device rules: %w", err)
	}
	return nil
}
