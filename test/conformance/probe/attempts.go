package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

func ptr[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }

// paths tries what runtimes mask or make read-only.
func paths(p *printer) {
	for path := range strings.FieldsSeq(`/proc/acpi /proc/asound /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list
		/proc/timer_stats /proc/sched_debug /proc/scsi /sys/firmware /sys/devices/virtual/powercap
		/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger /etc/masked /etc/readonly /data/masked`) {
		p.line("%s %s read %s write %s", path, describe(path), tryRead(path), tryWrite(path))
	}
}

// tryRead opens a file or directory, and tells how it ended and whether something is in it.
func tryRead(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return reason(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.IsDir() {
		names, err := f.Readdirnames(1)
		if err == nil && len(names) > 0 {
			return "full"
		}
		return "empty"
	}
	n, err := f.Read(make([]byte, 1))
	if n > 0 {
		return "full"
	}
	if err != nil && err.Error() != "EOF" {
		return reason(err)
	}
	return "empty"
}

// tryWrite opens a file for writing, without writing, or makes and removes a file in a directory.
func tryWrite(path string) string {
	fi, err := os.Lstat(path)
	if err != nil {
		return reason(err)
	}
	if !fi.IsDir() {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NOFOLLOW, 0)
		if err == nil {
			unix.Close(fd)
		}
		return reason(err)
	}
	file := filepath.Join(path, ".probe")
	fd, err := unix.Open(file, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err == nil {
		unix.Close(fd)
		err = os.Remove(file)
	}
	return reason(err)
}

func writes(p *printer) {
	for path := range strings.FieldsSeq(`/ /bin /etc /etc/passwd /tmp /root /dev /dev/shm /dev/mqueue /dev/null /proc/self/oom_score_adj
		/proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward /sys /sys/kernel /sys/class/net/lo/mtu /data /volume /one /mnt /run`) {
		p.line("%s %s", path, tryWrite(path))
	}
}

// nodes makes device nodes and opens them, which the cgroup may forbid.
func nodes(p *printer) {
	dir := ""
	for _, candidate := range []string{"/tmp", "/dev/shm", "/dev"} {
		if d, err := os.MkdirTemp(candidate, "probe"); err == nil {
			dir = d
			break
		}
	}
	if dir == "" {
		p.line("nowhere to make nodes")
		return
	}
	defer os.RemoveAll(dir)
	for _, node := range []struct {
		name         string
		mode         uint32
		major, minor uint32
	}{
		{"null", unix.S_IFCHR, 1, 3},
		{"mem", unix.S_IFCHR, 1, 1},
		{"kmsg", unix.S_IFCHR, 1, 11},
		{"tty", unix.S_IFCHR, 5, 0},
		{"console", unix.S_IFCHR, 5, 1},
		{"ptmx", unix.S_IFCHR, 5, 2},
		{"pts", unix.S_IFCHR, 136, 0},
		{"tun", unix.S_IFCHR, 10, 200},
		{"fuse", unix.S_IFCHR, 10, 229},
		{"kvm", unix.S_IFCHR, 10, 232},
		{"loop", unix.S_IFBLK, 7, 0},
		{"sda", unix.S_IFBLK, 8, 0},
		{"ram", unix.S_IFBLK, 1, 0},
		{"fifo", unix.S_IFIFO, 0, 0},
	} {
		path := filepath.Join(dir, node.name)
		err := unix.Mknod(path, node.mode|0o600, int(unix.Mkdev(node.major, node.minor)))
		if err != nil {
			p.line("%s mknod %s", node.name, reason(err))
			continue
		}
		p.line("%s mknod ok, read %s, write %s", node.name, tryOpen(path, unix.O_RDONLY), tryOpen(path, unix.O_WRONLY))
	}
}

func tryOpen(path string, mode int) string {
	fd, err := unix.Open(path, mode|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err == nil {
		unix.Close(fd)
	}
	return reason(err)
}

// syscalls makes calls that need a privilege, or that filters forbid, with arguments that do no
// harm. Each runs on a thread of its own, which ends with it.
func syscalls(p *printer) {
	var none uintptr
	bad := ^uintptr(0)
	for _, call := range []struct {
		name string
		nr   uintptr
		args [5]uintptr
	}{
		{"acct", unix.SYS_ACCT, [5]uintptr{}},
		{"add_key", unix.SYS_ADD_KEY, [5]uintptr{}},
		{"adjtimex", unix.SYS_ADJTIMEX, [5]uintptr{}},
		{"bpf", unix.SYS_BPF, [5]uintptr{bad}},
		{"chroot", unix.SYS_CHROOT, [5]uintptr{str("/"), 0}},
		{"clone3", unix.SYS_CLONE3, [5]uintptr{}},
		{"delete_module", unix.SYS_DELETE_MODULE, [5]uintptr{str("nosuch"), 0}},
		{"fanotify_init", unix.SYS_FANOTIFY_INIT, [5]uintptr{0, 0}},
		{"finit_module", unix.SYS_FINIT_MODULE, [5]uintptr{bad, 0, 0}},
		{"fsopen", unix.SYS_FSOPEN, [5]uintptr{str("tmpfs"), 0}},
		{"get_mempolicy", unix.SYS_GET_MEMPOLICY, [5]uintptr{}},
		{"io_uring_setup", unix.SYS_IO_URING_SETUP, [5]uintptr{}},
		{"ioperm", unix.SYS_IOPERM, [5]uintptr{0, 1, 1}},
		{"iopl", unix.SYS_IOPL, [5]uintptr{3}},
		{"kcmp", unix.SYS_KCMP, [5]uintptr{1, 1, 0, 0, 0}},
		{"kexec_load", unix.SYS_KEXEC_LOAD, [5]uintptr{0, bad}},
		{"keyctl", unix.SYS_KEYCTL, [5]uintptr{bad}},
		{"mlock", unix.SYS_MLOCK, [5]uintptr{none, 1 << 40}},
		{"mount", unix.SYS_MOUNT, [5]uintptr{str("none"), str("/nosuch"), str("tmpfs"), 0, 0}},
		{"mount_setattr", unix.SYS_MOUNT_SETATTR, [5]uintptr{bad, str(""), 0, 0, 0}},
		{"move_pages", unix.SYS_MOVE_PAGES, [5]uintptr{1}},
		{"name_to_handle_at", unix.SYS_NAME_TO_HANDLE_AT, [5]uintptr{bad, str("/"), 0, 0, 0}},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, [5]uintptr{bad, none, 0}},
		{"open_tree", unix.SYS_OPEN_TREE, [5]uintptr{bad, str("/nosuch"), 1}},
		{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, [5]uintptr{}},
		{"personality", unix.SYS_PERSONALITY, [5]uintptr{0xffffffff}},
		{"pivot_root", unix.SYS_PIVOT_ROOT, [5]uintptr{str("/nosuch"), str("/nosuch")}},
		{"process_vm_readv", unix.SYS_PROCESS_VM_READV, [5]uintptr{1}},
		{"ptrace", unix.SYS_PTRACE, [5]uintptr{bad}},
		{"quotactl", unix.SYS_QUOTACTL, [5]uintptr{}},
		{"reboot", unix.SYS_REBOOT, [5]uintptr{}},
		{"request_key", unix.SYS_REQUEST_KEY, [5]uintptr{}},
		{"setdomainname", unix.SYS_SETDOMAINNAME, [5]uintptr{none, bad}},
		{"sethostname", unix.SYS_SETHOSTNAME, [5]uintptr{none, bad}},
		{"setns", unix.SYS_SETNS, [5]uintptr{bad, 0}},
		{"setpriority", unix.SYS_SETPRIORITY, [5]uintptr{0, 0, ^uintptr(4)}}, // nice -5
		{"settimeofday", unix.SYS_SETTIMEOFDAY, [5]uintptr{1, 0}},
		{"swapoff", unix.SYS_SWAPOFF, [5]uintptr{str("/nosuch")}},
		{"syslog", unix.SYS_SYSLOG, [5]uintptr{10}},
		{"umount2", unix.SYS_UMOUNT2, [5]uintptr{str("/nosuch"), 0}},
		{"unshare fs", unix.SYS_UNSHARE, [5]uintptr{unix.CLONE_FS}},
		{"unshare mount", unix.SYS_UNSHARE, [5]uintptr{unix.CLONE_NEWNS}},
		{"unshare uts", unix.SYS_UNSHARE, [5]uintptr{unix.CLONE_NEWUTS}},
		{"unshare cgroup", unix.SYS_UNSHARE, [5]uintptr{unix.CLONE_NEWCGROUP}},
		{"userfaultfd", unix.SYS_USERFAULTFD, [5]uintptr{bad}},
		{"socket packet", unix.SYS_SOCKET, [5]uintptr{unix.AF_PACKET, unix.SOCK_RAW, 0}},
		{"socket raw", unix.SYS_SOCKET, [5]uintptr{unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}},
		{"socket ping", unix.SYS_SOCKET, [5]uintptr{unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP}},
		{"socket inet6", unix.SYS_SOCKET, [5]uintptr{unix.AF_INET6, unix.SOCK_STREAM, 0}},
		{"socket netlink", unix.SYS_SOCKET, [5]uintptr{unix.AF_NETLINK, unix.SOCK_RAW, 0}},
		{"socket vsock", unix.SYS_SOCKET, [5]uintptr{unix.AF_VSOCK, unix.SOCK_STREAM, 0}},
		{"socket odd", unix.SYS_SOCKET, [5]uintptr{99999, 0, 0}},
	} {
		p.line("%s %s", call.name, onThread(func() error {
			r, _, errno := unix.RawSyscall6(call.nr, call.args[0], call.args[1], call.args[2], call.args[3], call.args[4], 0)
			if errno == 0 && strings.HasPrefix(call.name, "socket") {
				unix.Close(int(r))
			}
			return errno
		}))
	}
	p.line("setgroups %s", onThread(func() error {
		_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		return errno
	}))
	p.line("setuid %s", onThread(func() error {
		_, _, errno := unix.RawSyscall(unix.SYS_SETUID, 12345, 0, 0)
		return errno
	}))
	p.line("nofile beyond %s", reason(raiseLimit(unix.RLIMIT_NOFILE)))
	p.line("rtprio %s", onThread(func() error {
		return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	}))
	user := exec.Command("/bin/true")
	user.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
	p.line("clone user %s", reason(user.Run()))
	p.line("kill init %s", reason(unix.Kill(1, 0)))
}

// onThread runs f on a thread that ends with it, so that what f changes is gone.
func onThread(f func() error) string {
	c := make(chan error)
	go func() {
		runtime.LockOSThread()
		c <- f()
	}()
	return reason(<-c)
}

// str makes a C string that lives as long as the program.
func str(s string) uintptr {
	b := append([]byte(s), 0)
	strs = append(strs, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

var strs [][]byte

func raiseLimit(resource int) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(resource, &l); err != nil {
		return err
	}
	old := l
	l.Max++
	if err := unix.Setrlimit(resource, &l); err != nil {
		return err
	}
	return unix.Setrlimit(resource, &old)
}
