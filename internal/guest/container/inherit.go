package container

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/fault"
	"runv/internal/guest/stage"
)

// scheduling is what a process has of its caller that only the machine's root may give to it.
type scheduling struct {
	scheduler  *stage.Scheduler // nil: the kernel's usual one
	ioPriority *uint32
}

// inherit gives a process what it has of its caller where its specification says nothing. What a process in a user
// namespace cannot set itself it returns.
func inherit(cfg *stage.Config, in *agentv1.Inherited) (outside scheduling, err error) {
	p := &cfg.Process
	if in == nil {
		return outside, nil
	}
	if err := inheritRlimits(p, in.Rlimits); err != nil {
		return outside, err
	}
	if p.Scheduler == nil && (in.SchedPolicy != 0 || in.Nice != 0) {
		outside.scheduler = &stage.Scheduler{Policy: in.SchedPolicy, Nice: in.Nice, Priority: in.SchedPriority}
		if in.SchedResetOnFork {
			outside.scheduler.Flags = unix.SCHED_FLAG_RESET_ON_FORK
		}
	}
	if p.IOPriority == nil && in.IoPriority != 0 {
		outside.ioPriority = new(in.IoPriority)
	}
	if !cfg.UserNS {
		if outside.scheduler != nil {
			p.Scheduler = outside.scheduler
		}
		if outside.ioPriority != nil {
			p.IOPriority = outside.ioPriority
		}
		outside = scheduling{}
	}
	if p.OOMScoreAdj == nil && in.OomScoreAdj != 0 {
		p.OOMScoreAdj = new(int(in.OomScoreAdj))
	}
	if p.Shared.Personality == nil && in.Personality != 0 {
		p.Shared.Personality = new(in.Personality)
	}
	if cfg.Container == nil && p.Umask == nil {
		p.Umask = in.Umask
	}
	p.NoNewPrivs = p.NoNewPrivs || in.NoNewPrivs
	p.CoredumpFilter, p.TimerSlack, p.Securebits, p.THPDisable = in.CoredumpFilter, in.TimerSlackNs, in.Securebits, in.ThpDisable
	return outside, nil
}

// rlimitCount is how many RLIMIT_* there are.
const rlimitCount = 16

// inheritRlimits adds those limits of the caller that the specification does not have.
func inheritRlimits(p *stage.Process, all []*agentv1.Rlimit) error {
	for _, l := range all {
		if l.Resource >= rlimitCount || l.Soft > l.Hard {
			return invalid("inherited rlimit %d: %d of %d", l.Resource, l.Soft, l.Hard)
		}
		if slices.ContainsFunc(p.Rlimits, func(own stage.Rlimit) bool { return own.Resource == int(l.Resource) }) {
			continue
		}
		if l.Resource == unix.RLIMIT_NOFILE {
			if err := allowFiles(l.Hard); err != nil {
				return err
			}
		}
		p.Rlimits = append(p.Rlimits, stage.Rlimit{Resource: int(l.Resource), Soft: l.Soft, Hard: l.Hard})
	}
	return nil
}

// allowFiles makes the kernel take as high a limit of open files as the host's kernel does.
func allowFiles(limit uint64) error {
	const path = "/proc/sys/fs/nr_open"
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read nr_open: %w", fault.Cause(err))
	}
	if most, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64); err == nil && limit <= most {
		return nil
	}
	if err := os.WriteFile(path, strconv.AppendUint(nil, limit, 10), 0); err != nil {
		return fmt.Errorf("set nr_open to %d: %w", limit, fault.Cause(err))
	}
	return nil
}

// set schedules all threads of a process that does nothing but wait.
func (s scheduling) set(pid int) error {
	if s == (scheduling{}) {
		return nil
	}
	done := map[int]bool{}
	for more := true; more; { // a thread that is new has it of the one that made it, or is found the next time
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return fmt.Errorf("list threads: %w", fault.Cause(err))
		}
		more = false
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || done[tid] {
				continue
			}
			done[tid], more = true, true
			if err := s.setThread(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return nil
}

func (s scheduling) setThread(tid int) error {
	if s.scheduler != nil {
		if err := unix.SchedSetAttr(tid, s.scheduler.Attr(), 0); err != nil {
			return fmt.Errorf("set inherited scheduling policy: %w", err)
		}
	}
	if s.ioPriority != nil {
		const whoProcess = 1 // IOPRIO_WHO_PROCESS
		if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, uintptr(tid), uintptr(*s.ioPriority)); errno != 0 {
			return fmt.Errorf("set inherited I/O priority: %w", errno)
		}
	}
	return nil
}
