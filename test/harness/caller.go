package harness

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// OddVariable is set for what an odd caller starts, to "yes".
const OddVariable = "ODD_CALLER"

// OddFile is what it inherits open.
const OddFile = "/etc/passwd"

// oddShell changes what belongs to a process and then becomes the command. Signal 30 is PWR.
const oddShell = `echo 321 >/proc/self/oom_score_adj && echo 0x1 >/proc/self/coredump_filter || exit 90
ulimit -S -n 200 && ulimit -c 2048 && ulimit -S -s 4096 && ulimit -l 64 || exit 91
trap '' HUP
exec env --block-signal=PWR "$@"`

// OddCaller runs a command to its end as a child of somebody whose attributes are all unusual: CPU 0 only, SCHED_BATCH
// with nice 7, I/O priority 7, umask 0077, timer slack 777777, no random addresses, memory of node 0, an
// OOM score, limits, signals that are blocked and ignored, a variable, and an open file that it inherits.
// Nothing of that stays with this process.
func OddCaller(cmd *exec.Cmd) Result {
	program := cmd.Path
	cmd.Path = "/bin/sh"
	cmd.Args = append([]string{"sh", "-c", oddShell, "sh", program}, cmd.Args[1:]...)
	cmd.Env = append(cmd.Environ(), OddVariable+"=yes")
	odd, err := os.Open(OddFile)
	if err != nil {
		return Result{Code: -1, Stderr: err.Error()}
	}
	defer odd.Close()
	cmd.ExtraFiles = append(cmd.ExtraFiles, odd)
	done := make(chan Result)
	go oddly(cmd, done)
	return <-done
}

func oddly(cmd *exec.Cmd, done chan<- Result) {
	runtime.LockOSThread() // never unlocked: the thread ends with what it is
	if unix.Gettid() == os.Getpid() {
		go oddly(cmd, done) // elsewhere, for this thread does not end
		runtime.UnlockOSThread()
		return
	}
	if err := becomeOdd(); err != nil {
		done <- Result{Code: -1, Stderr: "become an odd caller: " + err.Error()}
		return
	}
	done <- Finish(cmd)
}

func becomeOdd() error {
	var first unix.CPUSet
	first.Set(0)
	if err := unix.SchedSetaffinity(0, &first); err != nil {
		return err
	}
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH, Nice: 7}, 0); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 777777, 0, 0, 0); err != nil {
		return err
	}
	var nodes unix.CPUSet
	nodes.Set(0)
	if err := unix.SetMemPolicy(unix.MPOL_BIND, &nodes); err != nil {
		return err
	}
	const noRandomAddresses, bestEffort7 = 0x0040000, 2<<13 | 7
	for _, call := range [][4]uintptr{
		{unix.SYS_IOPRIO_SET, 1, 0, bestEffort7},
		{unix.SYS_PERSONALITY, noRandomAddresses},
	} {
		if _, _, errno := syscall.Syscall(call[0], call[1], call[2], call[3]); errno != 0 {
			return errno
		}
	}
	return nil
}
