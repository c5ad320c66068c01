package seccomp

import (
	_ "embed" // the table
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// x32Bit is set in the numbers of x32's system calls.
const x32Bit = 1 << 30

// An abi is one way to call the kernel of an amd64.
type abi struct {
	column int    // in the table
	arch   uint32 // as the kernel reports it
	bit    uint32 // in all numbers
	narrow bool   // arguments have 32 bits
	muxed  bool   // has socketcall and ipc
}

// The order is that of the numbers where two have the same architecture.
var known = []struct {
	name specs.Arch
	abi
}{
	{specs.ArchX86_64, abi{column: 0, arch: unix.AUDIT_ARCH_X86_64}},
	{specs.ArchX32, abi{column: 2, arch: unix.AUDIT_ARCH_X86_64, bit: x32Bit, narrow: true}},
	{specs.ArchX86, abi{column: 1, arch: unix.AUDIT_ARCH_I386, narrow: true, muxed: true}},
}

// archs are the architectures that runc knows; true: a guest runs it.
var archs = map[string]bool{
	string(specs.ArchX86_64): true, string(specs.ArchX86): true, string(specs.ArchX32): true,
	string(specs.ArchARM): false, string(specs.ArchAARCH64): false,
	string(specs.ArchMIPS): false, string(specs.ArchMIPS64): false, string(specs.ArchMIPS64N32): false,
	string(specs.ArchMIPSEL): false, string(specs.ArchMIPSEL64): false, string(specs.ArchMIPSEL64N32): false,
	string(specs.ArchPPC): false, string(specs.ArchPPC64): false, string(specs.ArchPPC64LE): false,
	string(specs.ArchRISCV64): false, string(specs.ArchS390): false, string(specs.ArchS390X): false,
}

// abisOf returns the ABIs of a list of architectures, the processor's own always.
func abisOf(list []specs.Arch) ([]*calls, error) {
	want := map[specs.Arch]bool{specs.ArchX86_64: true}
	native := len(list) == 0
	for i, a := range list {
		runs, ok := archs[string(a)]
		if !ok {
			return nil, invalid(fmt.Sprintf("architectures[%d]", i), "%s is not known", quote(a))
		}
		want[a] = true
		native = native || runs
	}
	if !native {
		return nil, unsupported("architectures", "name none that an amd64 runs")
	}
	var abis []*calls
	for i := range known {
		if k := &known[i]; want[k.name] {
			abis = append(abis, &calls{abi: &k.abi, rules: make(map[uint32][]rule)})
		}
	}
	return abis, nil
}

//go:embed syscalls.txt
var table string

// noNumber stands in the table for a system call that an ABI has not.
const noNumber = -1

// numbers are the columns of the table by name. It takes a part of a millisecond, so
// only those do it who have a profile.
var numbers = sync.OnceValue(func() map[string][3]int {
	m := make(map[string][3]int, strings.Count(table, "\n"))
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if fields[0] == "#" {
			continue
		}
		var row [3]int
		for i := range row {
			n, err := strconv.Atoi(fields[i+1])
			if err != nil {
				n = noNumber
			}
			row[i] = n
		}
		m[fields[0]] = row
	}
	return m
})

func (a *abi) direct(name string) (uint32, bool) {
	row, ok := numbers()[name]
	if !ok || row[a.column] == noNumber {
		return 0, false
	}
	return uint32(row[a.column]) | a.bit, true
}

// number is what counts for the highest number that a profile names: a multiplexed
// call has none, as for libseccomp.
func (a *abi) number(name string) (uint32, bool) {
	if _, _, ok := a.mux(name); ok {
		return 0, false
	}
	return a.direct(name)
}

// each calls f with each number that the system call has, and with the conditions
// for it.
func (a *abi) each(name string, args [maxArgs]cond, f func(nr uint32, args [maxArgs]cond)) {
	if nr, ok := a.direct(name); ok {
		f(nr, args)
	}
	if nr, call, ok := a.mux(name); ok {
		args[0] = cond{op: equal, value: call}
		f(nr, args)
	}
}

// mux returns the number of the multiplexer and the value of its first argument.
func (a *abi) mux(name string) (nr uint32, call uint64, ok bool) {
	if !a.muxed {
		return 0, 0, false
	}
	for _, m := range []struct {
		name  string
		calls map[string]uint64
	}{{"socketcall", socketcalls}, {"ipc", ipcs}} {
		if call, ok := m.calls[name]; ok {
			nr, _ := a.direct(m.name)
			return nr, call, true
		}
	}
	return 0, 0, false
}

// What x86's multiplexers stand for: linux/net.h, linux/ipc.h.
var (
	socketcalls = map[string]uint64{
		"socket": 1, "bind": 2, "connect": 3, "listen": 4, "accept": 5, "getsockname": 6, "getpeername": 7,
		"socketpair": 8, "send": 9, "recv": 10, "sendto": 11, "recvfrom": 12, "shutdown": 13, "setsockopt": 14,
		"getsockopt": 15, "sendmsg": 16, "recvmsg": 17, "accept4": 18, "recvmmsg": 19, "sendmmsg": 20,
	}
	ipcs = map[string]uint64{
		"semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4, "msgsnd": 11, "msgrcv": 12, "msgget": 13,
		"msgctl": 14, "shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24,
	}
)
