package seccomp_test

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/bundle/seccomp"
)

// libseccomp compiles profiles with the library of that name: the oracle.
type libseccomp struct {
	mu     sync.Mutex
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr strings.Builder
}

func newLibseccomp(t testing.TB) *libseccomp {
	t.Helper()
	l := &libseccomp{}
	l.start(t)
	t.Cleanup(l.end)
	return l
}

func (l *libseccomp) start(t testing.TB) {
	t.Helper()
	l.stderr.Reset()
	l.cmd = exec.Command("/usr/bin/python3", "testdata/libseccomp.py")
	l.cmd.Stderr = &l.stderr
	var err error
	l.in, err = l.cmd.StdinPipe()
	assert.NilError(t, err)
	out, err := l.cmd.StdoutPipe()
	assert.NilError(t, err)
	l.out = bufio.NewReader(out)
	assert.NilError(t, l.cmd.Start(), "install python3-seccomp")
}

func (l *libseccomp) end() {
	_ = l.in.Close()
	_ = l.cmd.Wait()
}

// compile returns libseccomp's program, or false when it refuses the profile, or never ends with it.
func (l *libseccomp) compile(t testing.TB, p *specs.LinuxSeccomp) (machine, bool) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	line, err := json.Marshal(p)
	assert.NilError(t, err)
	_, err = l.in.Write(append(line, '\n'))
	assert.NilError(t, err)
	answer, err := l.out.ReadString('\n')
	if err != nil {
		l.end()
		assert.Equal(t, l.cmd.ProcessState.String(), "signal: alarm clock", "%s", &l.stderr)
		l.start(t)
		return machine{}, false
	}
	if strings.HasPrefix(answer, "refused: ") {
		return machine{}, false
	}
	program, err := hex.DecodeString(strings.TrimSpace(answer))
	assert.NilError(t, err)
	return newMachine(t, &seccomp.Filter{Program: program}), true
}

// A named is a system call and its numbers as a guest may use them: amd64, x32, i386.
type named struct {
	name             string
	amd64, x32, i386 uint32
}

// oracleCalls are few, so that the rules of random profiles meet. The last two have the highest numbers:
// profiles that name them leave the rule of what a profile does not know, which is runc's and not
// libseccomp's, out of the comparison.
var oracleCalls = []named{
	{"read", 0, x32, 3},
	{"write", 1, x32 | 1, 4},
	{"execve", 59, x32 | 520, 11},
	{"ptrace", 101, x32 | 521, 26},
	{"personality", 135, x32 | 135, 136},
	{"clone", 56, x32 | 56, 120},
	{"socket", 41, x32 | 41, 359},
	{"openat2", 437, x32 | 437, 437},
	{"execveat", 322, x32 | 545, 358},
}

// oracleValues are those around which comparisons differ.
var oracleValues = []uint64{0, 1, 2, 3, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1, 1<<63 - 1, 1 << 63, 1<<64 - 2, 1<<64 - 1}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// randomProfile makes a profile that both compilers take.
func randomProfile(r *rand.Rand) *specs.LinuxSeccomp {
	actions := []specs.LinuxSeccompAction{
		specs.ActAllow, specs.ActErrno, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActLog, specs.ActTrace,
	}
	operators := []specs.LinuxSeccompOperator{
		specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
	}
	act := func() (specs.LinuxSeccompAction, *uint) {
		a := pick(r, actions)
		if (a == specs.ActErrno || a == specs.ActTrace) && r.IntN(2) == 0 {
			return a, new(uint(r.IntN(4)))
		}
		return a, nil
	}
	p := &specs.LinuxSeccomp{Architectures: [][]specs.Arch{
		nil, {specs.ArchX86_64}, {specs.ArchX86_64, specs.ArchX86}, {specs.ArchX86_64, specs.ArchX86, specs.ArchX32}, {specs.ArchX32},
	}[r.IntN(5)]}
	p.DefaultAction, p.DefaultErrnoRet = act()
	for range 1 + r.IntN(6) {
		s := specs.LinuxSyscall{}
		s.Action, s.ErrnoRet = act()
		for range 1 + r.IntN(2) {
			s.Names = append(s.Names, pick(r, oracleCalls[:len(oracleCalls)-2]).name)
		}
		for range r.IntN(4) {
			s.Args = append(s.Args, specs.LinuxSeccompArg{
				Index: uint(r.IntN(3)), Op: pick(r, operators), Value: pick(r, oracleValues), ValueTwo: pick(r, oracleValues),
			})
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	last := specs.ActErrno
	if p.DefaultAction == specs.ActErrno {
		last = specs.ActAllow
	}
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"openat2", "execveat"}, Action: last})
	return p
}

// holds tells whether a condition holds, by the manual of libseccomp. The 32-bit ABIs compare 32 bits.
func holds(a specs.LinuxSeccompArg, arg uint64, narrow bool) bool {
	v, two := a.Value, a.ValueTwo
	if narrow {
		arg, v, two = arg&(1<<32-1), v&(1<<32-1), two&(1<<32-1)
	}
	switch a.Op {
	case specs.OpEqualTo:
		return arg == v
	case specs.OpNotEqual:
		return arg != v
	case specs.OpLessThan:
		return arg < v
	case specs.OpLessEqual:
		return arg <= v
	case specs.OpGreaterThan:
		return arg > v
	case specs.OpGreaterEqual:
		return arg >= v
	}
	return arg&v == two&v
}

// possible are the actions that a profile asks for in this call: those of all rules that match, or
// else the default one.
func possible(p *specs.LinuxSeccomp, name string, narrow bool, args []uint64) (all []uint32) {
	bits := func(a specs.LinuxSeccompAction, data *uint) uint32 {
		code := map[specs.LinuxSeccompAction]uint32{
			specs.ActAllow: allow, specs.ActErrno: errno, specs.ActKillProcess: killProcess,
			specs.ActKillThread: kill, specs.ActTrap: trap, specs.ActLog: logged, specs.ActTrace: trace,
		}[a]
		switch {
		case a != specs.ActErrno && a != specs.ActTrace:
			return code
		case data == nil:
			return code | 1
		}
		return code | uint32(*data)
	}
	def := bits(p.DefaultAction, p.DefaultErrnoRet)
	for _, s := range p.Syscalls {
		act := bits(s.Action, s.ErrnoRet)
		if act == def || !slices.Contains(s.Names, name) {
			continue
		}
		seen := map[uint]bool{}
		matching := 0
		for _, a := range s.Args {
			seen[a.Index] = true
			if holds(a, args[a.Index], narrow) {
				matching++
			}
		}
		// Two conditions on one argument make each condition a rule of its own.
		if matching == len(s.Args) || len(seen) < len(s.Args) && matching > 0 {
			all = append(all, act)
		}
	}
	if all == nil {
		all = append(all, def)
	}
	return all
}

// A comparison counts decisions about system calls, and those that the two compilers' programs
// make differently.
type comparison struct{ profiles, decisions, differ int }

// profile compares the two for one profile, unless libseccomp refuses that. Ours must decide as a rule
// says that matches. libseccomp 2.5 does not always do so when several rules compare the upper
// half of one argument, and when rules of several actions match, which of them wins follows from
// how it orders its tree; both are rare.
func (c *comparison) profile(t testing.TB, l *libseccomp, p *specs.LinuxSeccomp, r *rand.Rand) {
	t.Helper()
	text, err := json.Marshal(p)
	assert.NilError(t, err)
	want, ok := l.compile(t, p)
	if !ok {
		return
	}
	c.profiles++
	f, err := seccomp.Compile(p)
	assert.NilError(t, err, "%s", text)
	got := newMachine(t, f)
	values := func() []uint64 {
		v := make([]uint64, 3)
		for i := range v {
			v[i] = pick(r, oracleValues)
		}
		return v
	}
	abis := map[specs.Arch]bool{specs.ArchX86_64: true}
	for _, a := range p.Architectures {
		abis[a] = true
	}
	for _, call := range oracleCalls {
		for range 60 {
			args := values()
			for _, at := range []struct {
				abi      specs.Arch
				arch, nr uint32
			}{{specs.ArchX86_64, amd64, call.amd64}, {specs.ArchX32, amd64, call.x32}, {specs.ArchX86, i386, call.i386}} {
				g, w := got.decide(t, at.arch, at.nr, args...), want.decide(t, at.arch, at.nr, args...)
				may := []uint32{kill}
				if abis[at.abi] {
					may = possible(p, call.name, at.abi != specs.ArchX86_64, args)
				}
				c.decisions++
				if g != w {
					c.differ++
				}
				if !slices.Contains(may, g) {
					t.Fatalf("%s %s, arguments %#x: %#x, libseccomp %#x, asked for %#x\n%s", at.abi, call.name, args, g, w, may, text)
				}
			}
		}
	}
}

func TestLikeLibseccomp(t *testing.T) {
	l := newLibseccomp(t)
	const profiles = 400
	var c comparison
	for seed := range uint64(profiles) {
		r := rand.New(rand.NewPCG(seed, 0))
		c.profile(t, l, randomProfile(r), r)
	}
	t.Logf("%+v", c)
	assert.Assert(t, c.profiles > profiles/2, "libseccomp takes %d of %d", c.profiles, profiles)
	assert.Assert(t, c.differ < c.decisions/1000, "%d of %d decisions differ", c.differ, c.decisions)
}

// FuzzLikeLibseccomp looks for a profile in whose call we decide as no rule says.
func FuzzLikeLibseccomp(f *testing.F) {
	l := newLibseccomp(f)
	f.Add(uint64(1), uint64(1))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		r := rand.New(rand.NewPCG(a, b))
		new(comparison).profile(t, l, randomProfile(r), r)
	})
}
