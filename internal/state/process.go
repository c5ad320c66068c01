package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killTimeout bounds the wait for a killed process when the context has no
// earlier deadline.
const killTimeout = 10 * time.Second

// pollSlice is how long a wait for a process goes on without a look at its
// context.
const pollSlice = 50 * time.Millisecond

// Process identifies a process of the host beyond the reuse of its pid.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // clock ticks since boot: field 22 of /proc/PID/stat
}

// ProcessOf identifies the process that has the pid now. The error is
// fs.ErrNotExist or unix.ESRCH when there is none.
func ProcessOf(pid int) (Process, error) {
	start, _, err := stat(pid)
	if err != nil {
		return Process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return Process{PID: pid, StartTime: start}, nil
}

// IsZero tells whether p names no process.
func (p Process) IsZero() bool { return p == Process{} }

// Alive tells whether the process still runs. A zombie is dead.
func (p Process) Alive() bool {
	if p.PID <= 1 {
		return false
	}
	start, dead, err := stat(p.PID)
	return err == nil && !dead && start == p.StartTime
}

// Kill sends SIGKILL to the process and waits until it has ended, at most until
// ctx is done or for ten seconds. Somebody else who has its pid is left alone.
// Success when it was dead already, and for the zero Process. The calling
// process is never killed: that is an error.
func (p Process) Kill(ctx context.Context) error {
	if p.PID <= 1 {
		return nil
	}
	if p.PID == os.Getpid() {
		return fmt.Errorf("kill process %d: it is the caller itself", p.PID)
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // EINVAL: a thread has the number now
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill process %d: pidfd_open: %w", p.PID, err)
	}
	defer unix.Close(fd)
	// The pidfd pins whoever has the pid; only if the start time is still the
	// one we know is that the process we mean.
	if !p.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	if err := waitPidfd(ctx, fd); err != nil {
		return fmt.Errorf("kill process %d: wait for its end: %w", p.PID, err)
	}
	return nil
}

// waitPidfd returns nil when the process behind fd has ended, reaped or not.
func waitPidfd(ctx context.Context, fd int) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(pollSlice/time.Millisecond))
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func (p Process) validate(field string) error {
	if !p.IsZero() && (p.PID <= 1 || p.PID > 1<<30) {
		return damaged("%s has pid %d", field, p.PID)
	}
	return nil
}

// stat reads the start time of a process and whether it is a zombie or going.
func stat(pid int) (start uint64, dead bool, err error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false, err
	}
	return parseStat(data)
}

// parseStat parses /proc/PID/stat. The second field is the program's name in
// parentheses and may hold anything, so the rest is counted from the last ')'.
func parseStat(data []byte) (start uint64, dead bool, err error) {
	i := bytes.LastIndexByte(data, ')')
	if i < 0 {
		return 0, false, errors.New("stat without a name")
	}
	const state, startTime = 0, 19 // fields 3 and 22
	fields := bytes.Fields(data[i+1:])
	if len(fields) <= startTime {
		return 0, false, errors.New("stat with too few fields")
	}
	start, err = strconv.ParseUint(string(fields[startTime]), 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("start time: %w", err)
	}
	switch fields[state][0] {
	case 'Z', 'X', 'x':
		dead = true
	}
	return start, dead, nil
}
