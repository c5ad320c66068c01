// Package caller is about what a process has of the one that started it without being told: scheduling,
// limits, masks, scores. Under runc a container's process is a descendant of whoever calls runc, and has all of that;
// in a VM it is nobody's child, so the command line reads it and it is sent along. runv's own processes on the host
// are to have none of it: a pod lives long, and for all its containers, and must not be slow, or
// short of descriptors, for how its first caller was started.
//
// The command line calls Read, and starts the supervisor through Leave; internal/standin does so with a stand-in. Both
// processes call Forget. The package starts nothing itself and sends nothing.
package caller

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"runv/internal/caller/nofile"
)

// Inherited is what a child of this process has of it.
type Inherited struct {
	Rlimits        []Rlimit
	Scheduler      Scheduler
	IOPriority     uint32 // as ioprio_set(2) takes it
	OOMScoreAdj    int
	CoredumpFilter *uint32 // nil: the kernel has no core dumps
	TimerSlack     uint64  // ns
	Personality    uint32  // as personality(2) takes it
	Securebits     uint32
	NoNewPrivs     bool
	THPDisable     bool
	Umask          uint32
}

// Rlimit is a limit by its RLIMIT_* number; the largest number means none.
type Rlimit struct {
	Resource   int
	Soft, Hard uint64
}

// Scheduler is how a process is scheduled.
type Scheduler struct {
	Policy      uint32 // SCHED_*
	Priority    uint32 // of real-time policies
	Nice        int32
	ResetOnFork bool
}

// resources is how many RLIMIT_* there are.
const resources = 16

// schedDeadline is a policy that children do not inherit.
const schedDeadline = 6

// Read returns what a child of this process has of it, as long as the process has changed nothing of that. The
// calling thread counts where threads may differ.
func Read() (in Inherited, err error) {
	for r := range resources {
		var l unix.Rlimit
		if err := unix.Getrlimit(r, &l); err != nil {
			return in, fmt.Errorf("read rlimit %d: %w", r, err)
		}
		limit := Rlimit{Resource: r, Soft: l.Cur, Hard: l.Max}
		if soft, hard, known := nofile.AtStart(); known && r == unix.RLIMIT_NOFILE && hard == l.Max && l.Cur == l.Max-1 { // as the runtime leaves it
			limit.Soft = soft
		}
		in.Rlimits = append(in.Rlimits, limit)
	}
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		return in, fmt.Errorf("read scheduling policy: %w", err)
	}
	if attr.Policy != schedDeadline {
		in.Scheduler = Scheduler{
			Policy: attr.Policy, Priority: attr.Priority, Nice: attr.Nice, ResetOnFork: attr.Flags&unix.SCHED_FLAG_RESET_ON_FORK != 0,
		}
	}
	priority, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, 0, 0)
	if errno != 0 {
		return in, fmt.Errorf("read I/O priority: %w", errno)
	}
	in.IOPriority = uint32(priority)
	if in.OOMScoreAdj, err = readInt("/proc/self/oom_score_adj", 10); err != nil {
		return in, fmt.Errorf("read OOM score: %w", err)
	}
	filter, err := readInt("/proc/self/coredump_filter", 16)
	if err == nil {
		in.CoredumpFilter = new(uint32(filter))
	} else if !errors.Is(err, os.ErrNotExist) {
		return in, fmt.Errorf("read coredump filter: %w", err)
	}
	for _, value := range []struct {
		option int
		set    func(int)
	}{
		{unix.PR_GET_TIMERSLACK, func(n int) { in.TimerSlack = uint64(n) }},
		{unix.PR_GET_SECUREBITS, func(n int) { in.Securebits = uint32(n) }},
		{unix.PR_GET_NO_NEW_PRIVS, func(n int) { in.NoNewPrivs = n != 0 }},
		{unix.PR_GET_THP_DISABLE, func(n int) { in.THPDisable = n != 0 }},
	} {
		n, err := unix.PrctlRetInt(value.option, 0, 0, 0, 0)
		if err != nil {
			return in, fmt.Errorf("read attribute %d: %w", value.option, err)
		}
		value.set(n)
	}
	personality, _, errno := unix.Syscall(unix.SYS_PERSONALITY, askPersonality, 0, 0)
	if errno != 0 {
		return in, fmt.Errorf("read personality: %w", errno)
	}
	in.Personality = uint32(personality)
	in.Umask, err = readUmask()
	return in, err
}

const (
	ioprioWhoProcess = 1          // IOPRIO_WHO_PROCESS; 0 is this thread
	askPersonality   = 0xffffffff // changes nothing
)

func readInt(path string, base int) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), base, 64)
	return int(n), err
}

// readUmask reads the umask without changing it, as umask(2) would for all threads.
func readUmask() (uint32, error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, fmt.Errorf("read umask: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "Umask:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 8, 32)
			return uint32(n), err
		}
	}
	return 0, errors.New("read umask: the kernel does not tell")
}

// helperUmask is what files of ours are made with that no mode is said for.
const helperUmask = 0o022

// Leave calls start on a thread of its own that has nothing of this process's caller, so that what it starts has
// nothing either: all CPUs, the ordinary policy and priority, no I/O priority, the usual timer slack, personality,
// memory policy and securebits, umask 022, a session keyring of its own. What takes rights that this process does not
// have stays as it is. What belongs to a process and not to a thread is for Forget. The parent's death signal
// is that of the thread, which ends with start.
func Leave(start func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- Leave(start) // elsewhere: the first thread does not end, and is what others see of the process
			runtime.UnlockOSThread()
			return
		}
		reset()
		done <- start()
	}()
	return <-done
}

// maxCPUs is how many CPUs the kernel can be built for.
const maxCPUs = 8192

// reset gives this thread what a machine's first process has.
func reset() {
	all := unix.NewCPUSet(maxCPUs)
	all.Fill()
	_ = unix.SchedSetaffinityDynamic(0, all) // of a cpuset of the caller's cgroup its CPUs
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, 0, 0)
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, usualTimerSlack, 0, 0, 0)
	_, _, _ = unix.Syscall(unix.SYS_PERSONALITY, 0, 0, 0)
	_, _, _ = unix.Syscall(unix.SYS_SET_MEMPOLICY, 0, 0, 0) // MPOL_DEFAULT
	_ = unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0)
	// Who broke out of a VM would else possess what the caller keeps in its own.
	_, _, _ = unix.Syscall(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0)
	if unix.Unshare(unix.CLONE_FS) == nil { // a umask of the thread's own
		unix.Umask(helperUmask)
	}
}

const (
	usualTimerSlack = 50_000  // ns
	usualStack      = 8 << 20 // bytes
)

// Forget makes this process, which was started through Leave, forget what belongs to a process: transparent huge
// pages are back, and the limits go as far as the process may raise them, or else the soft ones are raised to the hard ones. Limits
// of CPU time, file size or memory that a caller has for its programs would end a pod at some time in its life.
// Core dumps there are none: that of a VMM would be the guest's memory in a file of the host.
func Forget() {
	_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)
	for r := range resources {
		switch r {
		case unix.RLIMIT_CORE:
			_ = unix.Setrlimit(r, &unix.Rlimit{})
		case unix.RLIMIT_NICE, unix.RLIMIT_RTPRIO: // they give rights instead of taking them
		case unix.RLIMIT_STACK: // it is the size of each thread's stack as well
			var l unix.Rlimit
			if unix.Getrlimit(r, &l) == nil {
				_ = unix.Setrlimit(r, &unix.Rlimit{Cur: min(usualStack, l.Max), Max: l.Max})
			}
		case unix.RLIMIT_NOFILE:
			FreeFiles()
		default:
			raise(r, unix.RLIM_INFINITY)
		}
	}
}

// FreeFiles raises this process's limit of open files as far as it may. Each mount of a container takes one for a
// moment. Read comes before.
func FreeFiles() {
	if n, err := readInt("/proc/sys/fs/nr_open", 10); err == nil {
		raise(unix.RLIMIT_NOFILE, uint64(n))
	}
}

// raise raises a limit, or else the soft one to the hard one.
func raise(resource int, most uint64) {
	var l unix.Rlimit
	if unix.Getrlimit(resource, &l) != nil || l.Cur >= most && l.Max >= most {
		return
	}
	if unix.Setrlimit(resource, &unix.Rlimit{Cur: most, Max: most}) != nil {
		_ = unix.Setrlimit(resource, &unix.Rlimit{Cur: l.Max, Max: l.Max})
	}
}

// ForgetSignals makes the program that the calling thread is about to become by execve begin with no signal blocked and
// none ignored. The caller has locked the thread.
func ForgetSignals() {
	// Go's runtime leaves these two ignored; the others have handlers, which execve takes away.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT)
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{}, nil)
}
