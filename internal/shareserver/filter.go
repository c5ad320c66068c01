package shareserver

import (
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/bundle/seccomp"
)

// setFilter forbids all system calls that the server does not need, to all threads, for good.
func setFilter() error {
	f, err := seccomp.Compile(profile())
	if err != nil {
		return fmt.Errorf("compile seccomp filter: %w", err)
	}
	if err := loadFilter(f.Program); err != nil {
		return fmt.Errorf("load seccomp filter: %w", err)
	}
	return nil
}

// profile is what the server may do. A call that nobody makes who has not taken the process over ends it; others do not
// exist, which is what libraries expect of an older kernel.
func profile() *specs.LinuxSeccomp {
	enosys := uint(unix.ENOSYS)
	p := &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: &enosys,
		Architectures:   []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{
			{Action: specs.ActAllow, Names: runtimeCalls()},
			{Action: specs.ActAllow, Names: transportCalls()},
			{Action: specs.ActAllow, Names: fileCalls()},
			{Action: specs.ActKillProcess, Names: hostileCalls()},
			// Threads, but no processes.
			{Action: specs.ActAllow, Names: []string{"clone"}, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: unix.CLONE_THREAD, ValueTwo: unix.CLONE_THREAD, Op: specs.OpMaskedEqual},
			}},
			{Action: specs.ActKillProcess, Names: []string{"clone"}, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: unix.CLONE_THREAD, ValueTwo: 0, Op: specs.OpMaskedEqual},
			}},
		},
	}
	// Memory, but none to execute.
	for name, protection := range map[string]uint{"mmap": 2, "mprotect": 2} {
		p.Syscalls = append(p.Syscalls,
			specs.LinuxSyscall{Action: specs.ActAllow, Names: []string{name}, Args: []specs.LinuxSeccompArg{
				{Index: protection, Value: unix.PROT_EXEC, ValueTwo: 0, Op: specs.OpMaskedEqual},
			}},
			specs.LinuxSyscall{Action: specs.ActKillProcess, Names: []string{name}, Args: []specs.LinuxSeccompArg{
				{Index: protection, Value: unix.PROT_EXEC, ValueTwo: unix.PROT_EXEC, Op: specs.OpMaskedEqual},
			}})
	}
	// The file attributes of chattr(1), which the guest may read and set.
	for _, request := range []uint64{unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS, fsxGet, fsxSet} {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{
			Action: specs.ActAllow, Names: []string{"ioctl"},
			Args: []specs.LinuxSeccompArg{{Index: 1, Value: request, Op: specs.OpEqualTo}},
		})
	}
	return p
}

const (
	fsxGet = 0x801c581f // FS_IOC_FSGETXATTR, linux/fs.h
	fsxSet = 0x401c5820 // FS_IOC_FSSETXATTR
)

// runtimeCalls are those of Go's runtime.
func runtimeCalls() []string {
	return []string{
		"clock_gettime", "clock_nanosleep", "exit", "exit_group", "futex", "getpid", "getrandom", "getrusage", "gettid",
		"gettimeofday", "madvise", "mincore", "munmap", "nanosleep", "restart_syscall", "rt_sigaction", "rt_sigprocmask",
		"rt_sigreturn", "sched_getaffinity", "sched_yield", "sigaltstack", "tgkill", "prctl",
	}
}

// transportCalls are those of internal/vhostuser and of the standard library for sockets.
func transportCalls() []string {
	return []string{
		"accept4", "close", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "fcntl", "getpeername",
		"getsockname", "getsockopt", "read", "recvmsg", "sendmsg", "setsockopt", "shutdown", "write",
	}
}

// fileCalls are those of internal/sharefs.
func fileCalls() []string {
	return []string{
		"copy_file_range", "fallocate", "fchmod", "fchmodat", "fchownat", "fdatasync", "fgetxattr", "flistxattr", "flock",
		"fremovexattr", "fsetxattr", "fstat", "fstatfs", "fsync", "ftruncate", "getdents64", "getxattr", "linkat", "listxattr", "lseek",
		"mkdirat", "mknodat", "name_to_handle_at", "newfstatat", "open_by_handle_at", "openat", "preadv", "preadv2", "pwritev",
		"pwritev2", "readlinkat", "removexattr", "renameat2", "setfsgid", "setfsuid", "setxattr", "statx", "symlinkat",
		"syncfs", "unlinkat", "utimensat",
	}
}

// hostileCalls start programs, reach for other processes, the network and mounts, or are large and new parts of
// the kernel. Nobody makes them by mistake.
func hostileCalls() []string {
	return []string{
		"execve", "execveat", "fork", "vfork",
		"ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "pidfd_open", "kill", "tkill",
		"socket", "socketpair", "connect", "bind", "listen",
		"mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "mount_setattr", "fsopen", "fsconfig", "fsmount", "fspick",
		"unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register",
		"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
		"add_key", "request_key", "keyctl", "acct", "iopl", "ioperm", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid",
		"setgroups", "capset", "pkey_mprotect", "memfd_create", "settimeofday", "clock_settime",
	}
}
