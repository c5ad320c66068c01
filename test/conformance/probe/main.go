// Command probe runs in a container and prints all that it sees of it, in sections of lines:
//
//	== name
//	line
//
// It is static and runs alike under runc and in a VM. What is random or counts something (pids,
// inodes, ids of mounts, memory in use) is left out or named by its kind, so that two runs of
// one runtime print the same. It changes nothing that outlives it.
//
//	probe [SECTION...]
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// section is one thing to look at.
type section struct {
	name string
	look func(*printer)
}

func main() {
	out := bufio.NewWriter(os.Stdout)
	p := &printer{out}
	for _, s := range sections() {
		if len(os.Args) > 1 && !slices.Contains(os.Args[1:], s.name) {
			continue
		}
		fmt.Fprintln(out, "== "+s.name)
		s.look(p)
	}
	if out.Flush() != nil {
		os.Exit(1)
	}
}

// sections are those of this process, of the container's init unless it is this process, and of
// what is around them.
func sections() []section {
	all := of("self", "/proc/self", unix.Getpid())
	if unix.Getpid() != 1 {
		all = append(all, of("init", "/proc/1", 1)...)
	}
	return append(all,
		section{"prctl", prctls},
		section{"session", session},
		section{"stdio", stdio},
		section{"uname", uname},
		section{"net", network},
		section{"sysctl", sysctls},
		section{"dev", devices},
		section{"places", places},
		section{"paths", paths},
		section{"writes", writes},
		section{"nodes", nodes},
		section{"syscalls", syscalls},
	)
}

// of are the sections of one process.
func of(who, proc string, pid int) []section {
	file := func(name string) section {
		return section{who + "." + name, func(p *printer) { p.file(filepath.Join(proc, name)) }}
	}
	return []section{
		{who + ".status", func(p *printer) { status(p, proc) }},
		file("limits"), file("cgroup"), file("uid_map"), file("gid_map"), file("setgroups"),
		file("oom_score_adj"), file("timens_offsets"), file("personality"),
		{who + ".mountinfo", func(p *printer) { mountinfo(p, proc) }},
		{who + ".attr", func(p *printer) { attributes(p, proc) }},
		{who + ".environ", func(p *printer) { words(p, proc, "environ") }},
		{who + ".cmdline", func(p *printer) { words(p, proc, "cmdline") }},
		{who + ".links", func(p *printer) { links(p, proc) }},
		{who + ".fd", func(p *printer) { descriptors(p, proc) }},
		{who + ".sched", func(p *printer) { schedule(p, pid) }},
	}
}

type printer struct{ out *bufio.Writer }

func (p *printer) line(format string, args ...any) { fmt.Fprintf(p.out, format+"\n", args...) }

// file prints a file's lines, or why it has none.
func (p *printer) file(path string) {
	data, err := os.ReadFile(path)
	if err != nil {
		p.line("%s", reason(err))
		return
	}
	for line := range strings.Lines(string(data)) {
		p.line("%s", strings.TrimSpace(line))
	}
}

// reason is the name of the error number in err, "ok" for none.
func reason(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		if errno == 0 {
			return "ok"
		}
		if name := unix.ErrnoName(errno); name != "" {
			return name
		}
	}
	return err.Error()
}

// counters are the lines of a status that tell sizes and counts of the moment, or a pid.
var counters = regexp.MustCompile(`^(Name|State|Tgid|Ngid|Pid|TracerPid|FDSize|Vm|Rss|HugetlbPages|CoreDumping|THP_enabled|` +
	`untag_mask|Threads|SigQ|SigCgt|NStgid|NSpid|NSpgid|NSsid|voluntary_ctxt|nonvoluntary_ctxt|Mems_allowed|x86_Thread)`)

func status(p *printer, proc string) {
	data, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		p.line("%s", reason(err))
		return
	}
	for line := range strings.Lines(string(data)) {
		if counters.MatchString(line) {
			continue
		}
		if set, ok := strings.CutPrefix(line, "SigIgn:"); ok {
			line = "SigIgn: " + ignored(set)
		}
		p.line("%s", strings.Join(strings.Fields(line), " "))
	}
}

// ignored is a set of signals without the two that the C library keeps to itself: glibc's
// posix_spawn leaves them ignored, and whoever is below a make that uses it inherits that.
func ignored(set string) string {
	n, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
	if err != nil {
		return set
	}
	return fmt.Sprintf("%016x", n&^(1<<(32-1)|1<<(33-1)))
}

// mountinfo prints, of each mount, in two lines: its place, options and propagation; and which
// part of which file system is there, with its options.
func mountinfo(p *printer, proc string) {
	data, err := os.ReadFile(filepath.Join(proc, "mountinfo"))
	if err != nil {
		p.line("%s", reason(err))
		return
	}
	for line := range strings.Lines(string(data)) {
		mount, fsys, ok := strings.Cut(strings.TrimSpace(line), " - ")
		f, t := strings.Fields(mount), strings.SplitN(fsys, " ", 3)
		if !ok || len(f) < 6 || len(t) < 3 {
			p.line("odd: %s", line)
			continue
		}
		propagation := "private"
		if len(f) > 6 {
			var kinds []string
			for _, tag := range f[6:] {
				kind, _, _ := strings.Cut(tag, ":")
				kinds = append(kinds, kind)
			}
			propagation = strings.Join(kinds, ",")
		}
		p.line("%s is %s %s", f[4], sorted(f[5]), propagation)
		p.line("%s shows %s of %s %s, %s", f[4], f[3], t[0], t[1], sorted(t[2]))
	}
}

func sorted(options string) string {
	list := strings.Split(options, ",")
	// Some kernels list this one, which is tmpfs's way everywhere.
	list = slices.DeleteFunc(list, func(option string) bool { return option == "inode64" })
	slices.Sort(list)
	return strings.Join(list, ",")
}

func attributes(p *printer, proc string) {
	for _, name := range []string{"current", "exec", "fscreate", "keycreate", "prev", "sockcreate"} {
		data, err := os.ReadFile(filepath.Join(proc, "attr", name))
		p.line("%s %q %s", name, strings.Trim(string(data), "\x00\n"), reason(err))
	}
}

// words prints what a file separates by NULs.
func words(p *printer, proc, name string) {
	data, err := os.ReadFile(filepath.Join(proc, name))
	if err != nil {
		p.line("%s", reason(err))
		return
	}
	for word := range strings.SplitSeq(strings.TrimSuffix(string(data), "\x00"), "\x00") {
		p.line("%q", word)
	}
}

var number = regexp.MustCompile(`[0-9]+`)

// links prints where a process is, and which of its namespaces are those of init.
func links(p *printer, proc string) {
	for _, name := range []string{"cwd", "root", "exe"} {
		target, err := os.Readlink(filepath.Join(proc, name))
		p.line("%s %s %s", name, target, reason(err))
	}
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
		own, err := os.Readlink(filepath.Join(proc, "ns", ns))
		init, _ := os.Readlink(filepath.Join("/proc/1/ns", ns))
		p.line("ns %s %s, init's: %v", ns, reason(err), own == init)
	}
}

func descriptors(p *printer, proc string) {
	entries, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		p.line("%s", reason(err))
		return
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(proc, "fd", e.Name()))
		if err != nil || strings.Contains(target, "/fd") || strings.HasPrefix(target, "anon_inode:[event") || target == "pidfd" {
			continue // our own look, Go's poller
		}
		p.line("%s %s", e.Name(), number.ReplaceAllString(target, "N"))
	}
}

func schedule(p *printer, pid int) {
	attr, err := unix.SchedGetAttr(pid, 0)
	if err != nil {
		p.line("%s", reason(err))
		return
	}
	if attr.Policy != unix.SCHED_DEADLINE {
		attr.Runtime = 0 // newer kernels tell their slice here
	}
	p.line("policy %d flags %#x nice %d priority %d runtime %d deadline %d period %d",
		attr.Policy, attr.Flags, attr.Nice, attr.Priority, attr.Runtime, attr.Deadline, attr.Period)
	ioprio, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, 1, uintptr(pid), 0)
	p.line("ioprio class %d level %d %s", ioprio>>13, ioprio&0x1fff, reason(errno))
}

func prctls(p *printer) {
	for _, option := range []struct {
		name   string
		option uintptr
	}{
		{"securebits", unix.PR_GET_SECUREBITS},
		{"dumpable", unix.PR_GET_DUMPABLE},
		{"keepcaps", unix.PR_GET_KEEPCAPS},
		{"no_new_privs", unix.PR_GET_NO_NEW_PRIVS},
		{"thp_disable", unix.PR_GET_THP_DISABLE},
		{"timerslack", unix.PR_GET_TIMERSLACK},
	} {
		r, _, errno := unix.RawSyscall6(unix.SYS_PRCTL, option.option, 0, 0, 0, 0, 0)
		p.line("%s %d %s", option.name, r, reason(errno))
	}
	var signal int32
	err := unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(ptr(&signal)), 0, 0, 0)
	p.line("pdeathsig %d %s", signal, reason(err))
	var reaper int32
	err = unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(ptr(&reaper)), 0, 0, 0)
	p.line("child_subreaper %d %s", reaper, reason(err))
	old := unix.Umask(0)
	unix.Umask(old)
	p.line("umask %#o", old)
}

func session(p *printer) {
	pid := unix.Getpid()
	sid, err := unix.Getsid(0)
	p.line("session leader %v, group leader %v, parent outside %v %s", sid == pid, unix.Getpgrp() == pid, unix.Getppid() == 0, reason(err))
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	p.line("controlling terminal: %s", reason(err))
	if err == nil {
		group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
		p.line("foreground group is ours: %v %s", group == unix.Getpgrp(), reason(err))
		tty.Close()
	}
	entries, _ := os.ReadDir("/proc")
	n := 0
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			n++
		}
	}
	p.line("processes seen: %d", n)
}

// stdio tells of terminals among the first three descriptors.
func stdio(p *printer) {
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			p.line("%d %s", fd, reason(err))
			continue
		}
		termios, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			p.line("%d is no terminal", fd)
			continue
		}
		name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		size, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		p.line("%d terminal %s mode %o uid %d gid %d iflag %#x oflag %#x cflag %#x lflag %#x", fd, name, st.Mode, st.Uid, st.Gid,
			termios.Iflag, termios.Oflag, termios.Cflag, termios.Lflag)
		if err == nil {
			p.line("%d %d rows, %d columns", fd, size.Row, size.Col)
		}
	}
}

func uname(p *printer) {
	var u unix.Utsname
	err := unix.Uname(&u)
	p.line("%s %s %s %s", text(u.Nodename[:]), text(u.Domainname[:]), text(u.Machine[:]), reason(err))
}

func text(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

func network(p *printer) {
	p.file("/proc/self/net/if_inet6")
	entries, err := os.ReadDir("/sys/class/net")
	if err != nil {
		p.line("%s", reason(err))
	}
	for _, e := range entries {
		flags, err := os.ReadFile(filepath.Join("/sys/class/net", e.Name(), "flags"))
		p.line("%s flags %s %s", e.Name(), strings.TrimSpace(string(flags)), reason(err))
	}
}

func sysctls(p *printer) {
	for name := range strings.FieldsSeq(`kernel/hostname kernel/domainname kernel/msgmax kernel/msgmnb kernel/msgmni kernel/sem
		kernel/shmall kernel/shmmax kernel/shmmni kernel/shm_rmid_forced fs/mqueue/msg_max fs/mqueue/msgsize_max fs/mqueue/queues_max
		fs/mqueue/msg_default net/ipv4/ip_forward net/ipv4/ping_group_range net/ipv4/ip_unprivileged_port_start
		net/ipv4/ip_local_port_range net/core/somaxconn net/ipv6/conf/all/disable_ipv6`) {
		data, err := os.ReadFile("/proc/sys/" + name)
		p.line("%s %s %s", name, strings.Join(strings.Fields(string(data)), " "), reason(err))
	}
}

// describe is a file's kind, mode, owner, and number or target.
func describe(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return reason(err)
	}
	s := fmt.Sprintf("%06o %d:%d", st.Mode, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		s += fmt.Sprintf(" number %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		s += fmt.Sprintf(" to %s %s", target, reason(err))
	}
	return s
}

func devices(p *printer) {
	err := filepath.WalkDir("/dev", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			p.line("%s %s", path, reason(err))
			return nil
		}
		p.line("%s %s", path, describe(path))
		return nil
	})
	if err != nil {
		p.line("%v", err)
	}
}

func places(p *printer) {
	for path := range strings.FieldsSeq(`/ /bin /etc /proc /sys /sys/fs/cgroup /dev /dev/shm /dev/pts /dev/mqueue /tmp /root
		/etc/passwd /run /mnt /data /data/file /data/new /volume /one`) {
		p.line("%s %s", path, describe(path))
	}
}
