package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// allowing is a profile that allows all but what its rules say.
func allowing(rules ...specs.LinuxSyscall) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
			Syscalls:      rules,
		}
	}
}

func syscalls(action specs.LinuxSeccompAction, names ...string) specs.LinuxSyscall {
	return specs.LinuxSyscall{Names: names, Action: action}
}

func with(r specs.LinuxSyscall, errno uint, args ...specs.LinuxSeccompArg) specs.LinuxSyscall {
	r.ErrnoRet, r.Args = &errno, args
	return r
}

// TestSeccompKills is a container whose program must not ask for the system's name.
func TestSeccompKills(t *testing.T) {
	e := harness.New(t)
	for _, action := range []specs.LinuxSeccompAction{specs.ActKill, specs.ActKillProcess} {
		r := e.Run("run", "--bundle", e.Bundle([]string{"uname"}, allowing(syscalls(action, "uname"))), "web")
		assert.Equal(t, r.Code, 159, "128 and SIGSYS: %s", r.Stderr)
	}
}

// TestSeccompExec checks that the container's filter is that of processes which are
// added, as a root without no_new_privs and as a user with it.
func TestSeccompExec(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) { s.Process.NoNewPrivileges = false }, allowing(
		syscalls(specs.ActErrno, "mkdir"),
		with(syscalls(specs.ActErrno, "chmod", "fchmodat"), 38),
		syscalls(specs.ActKillProcess, "sync"),
	))
	e.OK("run", "--detach", "--bundle", bundle, "box")
	const script = "mkdir /tmp/a; chmod 700 /tmp; sync; echo $?; grep -E '^(NoNewPrivs|Seccomp|CapEff):' /proc/self/status"
	for _, tc := range []struct{ user, noNewPrivs, caps string }{
		{"0", "0", "0000000020000420"},
		{"1000", "1", "0000000000000000"},
		{"1000", "0", "0000000000000000"},
	} {
		args := []string{"exec", "--user", tc.user}
		if tc.noNewPrivs == "1" {
			args = append(args, "--no-new-privs")
		}
		r := e.Run(append(args, "box", "sh", "-c", script)...)
		assert.Equal(t, r.Code, 0, r.Stderr)
		assert.Equal(t, r.Stdout, "159\nCapEff:\t"+tc.caps+"\nNoNewPrivs:\t"+tc.noNewPrivs+"\nSeccomp:\t2\n")
		assert.Assert(t, cmp.Contains(r.Stderr, "Operation not permitted"))
		assert.Assert(t, cmp.Contains(r.Stderr, "Function not implemented"))
	}
}

// engineProfile is like those that engines send by default: it allows what programs
// need, clone without new namespaces, some personalities, and denies the rest.
func engineProfile() *specs.LinuxSeccomp {
	enosys := uint(38)
	profile := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls: []specs.LinuxSyscall{
			syscalls(specs.ActAllow, strings.Fields(`accept accept4 access alarm arch_prctl bind brk capget capset chdir chmod chown chown32
				clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3
				epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 execve execveat exit exit_group faccessat faccessat2
				fadvise64 fallocate fchdir fchmod fchmodat fchown fchownat fcntl fcntl64 fdatasync flock fork fstat fstatfs
				fsync ftruncate futex getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpgid getpgrp
				getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt
				get_thread_area gettid gettimeofday getuid ioctl kill lchown link linkat listen lseek lstat madvise mkdir
				mkdirat mmap mmap2 mprotect mremap msync munmap nanosleep newfstatat open openat openat2 pause pipe pipe2 poll
				ppoll prctl pread64 preadv prlimit64 pselect6 pwrite64 read readlink readlinkat readv recvfrom recvmsg rename
				renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn
				rt_sigsuspend rt_sigtimedwait sched_getaffinity sched_yield select sendfile sendmsg sendto setgid setgroups
				setitimer setpgid setpriority setresgid setresuid set_robust_list setsid set_tid_address setuid shutdown
				sigaltstack socketpair stat statfs statx symlink symlinkat sync sysinfo tgkill time timer_create
				timerfd_create times truncate umask uname unlink unlinkat utimensat vfork wait4 waitid waitpid write writev
				nosuchcall`)...),
			syscalls(specs.ActAllow, "clone"),
			syscalls(specs.ActAllow, "socket"),
			with(syscalls(specs.ActErrno, "clone3"), enosys),
		},
	}
	profile.Syscalls[1].Args = []specs.LinuxSeccompArg{{Index: 0, Value: 0x7e020000, ValueTwo: 0, Op: specs.OpMaskedEqual}}
	profile.Syscalls[2].Args = []specs.LinuxSeccompArg{{Index: 0, Value: 46, Op: specs.OpNotEqual}}
	for _, persona := range []uint64{0, 8, 0x20000, 0xffffffff} {
		r := syscalls(specs.ActAllow, "personality")
		r.Args = []specs.LinuxSeccompArg{{Index: 0, Value: persona, Op: specs.OpEqualTo}}
		profile.Syscalls = append(profile.Syscalls, r)
	}
	return profile
}

// probe is a program that makes the system calls that its arguments name and prints
// how each ended.
const probe = `package main

import (
	"fmt"
	"os"
	"syscall"
)

func main() {
	for _, arg := range os.Args[1:] {
		var nr uintptr
		var a [3]uintptr
		if _, err := fmt.Sscanf(arg, "%d,%d,%d,%d", &nr, &a[0], &a[1], &a[2]); err != nil {
			fmt.Println(err)
		}
		_, _, errno := syscall.RawSyscall(nr, a[0], a[1], a[2])
		fmt.Println(arg, int(errno))
	}
}
`

// probes are system calls that do nothing, whatever the filter says: the kernel's own
// errors differ from the filters'.
var probes = []string{
	"135,4294967295,0,0",  // personality: allowed
	"135,5,0,0",           // personality: denied
	"56,268435968,0,0",    // clone with CLONE_NEWUSER: denied; with CLONE_FS, the kernel's EINVAL
	"41,46,0,0",           // socket of a family that is denied
	"41,99999,0,0",        // and of another that nobody has
	"435,0,0,0",           // clone3: ENOSYS
	"155,0,0,0",           // pivot_root: denied
	"450,0,0,0",           // newer than the profile: ENOSYS
	"1000,0,0,0",          // newer than all
	"3,1000,0,0",          // close: the kernel's EBADF
	"8,1000,0,0",          // lseek: EBADF
	"8,1000,4294967296,7", // lseek
}

// TestSeccompLikeRunc runs the same bundles under both runcs, which have libseccomp, and in a
// VM, and compares what a program sees.
func TestSeccompLikeRunc(t *testing.T) {
	e := harness.New(t)
	runcs := e.Runcs()
	source := filepath.Join(e.Dir, "probe.go")
	assert.NilError(t, os.WriteFile(source, []byte(probe), 0o600))
	program := filepath.Join(e.Dir, "probe")
	build := exec.Command("go", "build", "-o", program, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	data, err := os.ReadFile(program)
	assert.NilError(t, err)

	lseek := func(action specs.LinuxSeccompAction, errno uint, args ...specs.LinuxSeccompArg) specs.LinuxSyscall {
		return with(syscalls(action, "lseek"), errno, args...)
	}
	arg := func(index uint, op specs.LinuxSeccompOperator, value uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: index, Op: op, Value: value}
	}
	for name, edit := range map[string]func(*specs.Spec){
		"like an engine's": func(s *specs.Spec) { s.Linux.Seccomp = engineProfile() },
		"all must hold":    allowing(lseek(specs.ActErrno, 71, arg(0, specs.OpGreaterThan, 999), arg(1, specs.OpEqualTo, 1<<32))),
		"rules in turn": allowing(
			lseek(specs.ActErrno, 72, arg(1, specs.OpLessThan, 1)),
			lseek(specs.ActErrno, 73, arg(1, specs.OpGreaterEqual, 1<<32)),
		),
		"one argument twice": allowing(lseek(specs.ActErrno, 74, arg(1, specs.OpEqualTo, 0), arg(1, specs.OpEqualTo, 7))),
		"all of a call":      allowing(lseek(specs.ActErrno, 75, arg(1, specs.OpLessEqual, 0)), lseek(specs.ActErrno, 76)),
	} {
		t.Run(name, func(t *testing.T) {
			bundle := e.Bundle(append([]string{"/probe"}, probes...), func(s *specs.Spec) {
				// The test machine has no CAP_SYS_RESOURCE, and cgroup v1.
				s.Process.Rlimits = nil
				s.Mounts = s.Mounts[:2]
			}, edit)
			assert.NilError(t, os.WriteFile(filepath.Join(bundle, "rootfs", "probe"), data, 0o755))
			r := e.Run("run", "--bundle", bundle, "box")
			assert.Equal(t, r.Code, 0, r.Stderr)
			anyRunc(e, bundle)
			for _, runc := range runcs {
				want := runc.Run("run", "--bundle", bundle, "box"+ownSuffix(runc.Name))
				assert.Equal(t, want.Code, 0, "%s: %s", runc.Name, want.Stderr)
				assert.Equal(t, r.Stdout, want.Stdout, runc.Name)
			}
		})
	}
}

// TestSeccompOfEngines runs a shell under a profile that denies what it does not name.
func TestSeccompOfEngines(t *testing.T) {
	e := harness.New(t)
	for _, noNewPrivs := range []bool{false, true} {
		bundle := e.Bundle([]string{"sh", "-c", "echo $(ls / | grep -c bin); unshare -u true; mount -t tmpfs x /tmp; exit 3"}, func(s *specs.Spec) {
			s.Process.NoNewPrivileges = noNewPrivs
			s.Linux.Seccomp = engineProfile()
		})
		r := e.Run("run", "--bundle", bundle, "box")
		assert.Equal(t, r.Code, 3, r.Stderr)
		assert.Equal(t, r.Stdout, "1\n")
		assert.Equal(t, strings.Count(strings.ToLower(r.Stderr), "not permitted")+strings.Count(r.Stderr, "denied"), 2, r.Stderr)
	}
}
