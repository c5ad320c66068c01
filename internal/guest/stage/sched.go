package stage

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// setScheduling sets what takes privileges that the program may not have. All of it belongs to
// this thread, the only one that execve leaves.
func (p *program) setScheduling() error {
	if s := p.Scheduler; s != nil {
		if err := unix.SchedSetAttr(0, s.Attr(), 0); err != nil {
			return fmt.Errorf("set process.scheduler: %w", err)
		}
	}
	if p.IOPriority != nil {
		const whoProcess = 1 // IOPRIO_WHO_PROCESS; 0 is this thread
		if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, uintptr(*p.IOPriority)); errno != 0 {
			return fmt.Errorf("set process.ioPriority: %w", errno)
		}
	}
	if p.TimerSlack != 0 {
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(p.TimerSlack), 0, 0, 0); err != nil {
			return fmt.Errorf("set timer slack: %w", err)
		}
	}
	if p.THPDisable {
		if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("disable transparent huge pages: %w", err)
		}
	}
	if p.Securebits != 0 {
		if err := unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(p.Securebits), 0, 0, 0); err != nil {
			return fmt.Errorf("set securebits: %w", err)
		}
	}
	if err := setAffinity("final", p.Affinity.Final); err != nil {
		return err
	}
	if p.Shared.Personality != nil {
		if _, _, errno := unix.Syscall(unix.SYS_PERSONALITY, uintptr(*p.Shared.Personality), 0, 0); errno != 0 {
			return fmt.Errorf("set linux.personality: %w", errno)
		}
	}
	if m := p.Shared.MemoryPolicy; m != nil {
		if err := unix.SetMemPolicy(m.Mode, &m.Nodes); err != nil {
			return fmt.Errorf("set linux.memoryPolicy: %w", err)
		}
	}
	return nil
}

// Attr is s as the kernel takes it.
func (s *Scheduler) Attr() *unix.SchedAttr {
	return &unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: s.Policy, Flags: s.Flags, Nice: s.Nice, Priority: s.Priority,
		Runtime: s.Runtime, Deadline: s.Deadline, Period: s.Period,
	}
}

// setAffinity limits this thread to some CPUs; nil leaves it.
func setAffinity(name string, cpus *unix.CPUSet) error {
	if cpus == nil {
		return nil
	}
	if err := unix.SchedSetaffinity(0, cpus); err != nil {
		return fmt.Errorf("set process.execCPUAffinity.%s: %w", name, err)
	}
	return nil
}
