package container

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/cpulist"
	"runv/internal/guest/stage"
)

// schedulerPolicies are the numbers of the kernel.
var schedulerPolicies = map[specs.LinuxSchedulerPolicy]uint32{
	specs.SchedOther:    0,
	specs.SchedFIFO:     1,
	specs.SchedRR:       2,
	specs.SchedBatch:    3,
	specs.SchedISO:      4,
	specs.SchedIdle:     5,
	specs.SchedDeadline: 6,
}

var schedulerFlags = map[specs.LinuxSchedulerFlag]uint64{
	specs.SchedFlagResetOnFork:  0x01,
	specs.SchedFlagReclaim:      0x02,
	specs.SchedFlagDLOverrun:    0x04,
	specs.SchedFlagKeepPolicy:   0x08,
	specs.SchedFlagKeepParams:   0x10,
	specs.SchedFlagUtilClampMin: 0x20,
	specs.SchedFlagUtilClampMax: 0x40,
}

// ioClasses are those of ioprio_set(2), which has them above the priority's 13 bits.
var ioClasses = map[specs.IOPriorityClass]uint32{
	specs.IOPRIO_CLASS_RT:   1,
	specs.IOPRIO_CLASS_BE:   2,
	specs.IOPRIO_CLASS_IDLE: 3,
}

const ioClassShift = 13

// translateScheduling adds when and where a process may run.
func translateScheduling(p *stage.Process, s *specs.Process) (err error) {
	if sched := s.Scheduler; sched != nil {
		policy, ok := schedulerPolicies[sched.Policy]
		if !ok {
			return invalid("process.scheduler.policy: unknown value %q", sched.Policy)
		}
		p.Scheduler = &stage.Scheduler{
			Policy: policy, Nice: sched.Nice, Priority: uint32(sched.Priority),
			Runtime: sched.Runtime, Deadline: sched.Deadline, Period: sched.Period,
		}
		for _, f := range sched.Flags {
			bit, ok := schedulerFlags[f]
			if !ok {
				return invalid("process.scheduler.flags: unknown value %q", f)
			}
			p.Scheduler.Flags |= bit
		}
	}
	if io := s.IOPriority; io != nil {
		class, ok := ioClasses[io.Class]
		if !ok || io.Priority < 0 || io.Priority > 7 {
			return invalid("process.ioPriority: unknown class %q or priority %d", io.Class, io.Priority)
		}
		p.IOPriority = new(class<<ioClassShift | uint32(io.Priority))
	}
	return nil
}

// translateAffinity adds what is for execs only.
func translateAffinity(p *stage.Process, a *specs.CPUAffinity) error {
	if a == nil {
		return nil
	}
	for _, list := range []struct {
		name, text string
		set        **unix.CPUSet
	}{{"initial", a.Initial, &p.Affinity.Initial}, {"final", a.Final, &p.Affinity.Final}} {
		if list.text == "" {
			continue
		}
		set, err := cpulist.Parse(list.text)
		if err != nil {
			return invalid("process.execCPUAffinity.%s: %q: %w", list.name, list.text, err)
		}
		*list.set = set
	}
	return nil
}

var personalities = map[specs.LinuxPersonalityDomain]uint32{
	specs.PerLinux:   0x0000,
	specs.PerLinux32: 0x0008,
}

var memoryModes = map[specs.MemoryPolicyModeType]int{
	specs.MpolDefault:            unix.MPOL_DEFAULT,
	specs.MpolPreferred:          unix.MPOL_PREFERRED,
	specs.MpolBind:               unix.MPOL_BIND,
	specs.MpolInterleave:         unix.MPOL_INTERLEAVE,
	specs.MpolLocal:              unix.MPOL_LOCAL,
	specs.MpolPreferredMany:      unix.MPOL_PREFERRED_MANY,
	specs.MpolWeightedInterleave: unix.MPOL_WEIGHTED_INTERLEAVE,
}

var memoryFlags = map[specs.MemoryPolicyFlagType]int{
	specs.MpolFStaticNodes:   unix.MPOL_F_STATIC_NODES,
	specs.MpolFRelativeNodes: unix.MPOL_F_RELATIVE_NODES,
	specs.MpolFNumaBalancing: unix.MPOL_F_NUMA_BALANCING,
}

// translateShared makes what all processes of a container have in common, but for its filter of
// system calls.
func translateShared(l *specs.Linux) (s stage.Shared, err error) {
	if p := l.Personality; p != nil {
		number, ok := personalities[p.Domain]
		if !ok {
			return s, invalid("linux.personality.domain: unknown value %q", p.Domain)
		}
		s.Personality = new(number)
	}
	if m := l.MemoryPolicy; m != nil {
		mode, ok := memoryModes[m.Mode]
		if !ok {
			return s, invalid("linux.memoryPolicy.mode: unknown value %q", m.Mode)
		}
		for _, f := range m.Flags {
			bit, ok := memoryFlags[f]
			if !ok {
				return s, invalid("linux.memoryPolicy.flags: unknown value %q", f)
			}
			mode |= bit
		}
		s.MemoryPolicy = &stage.MemoryPolicy{Mode: mode}
		if m.Nodes != "" {
			nodes, err := cpulist.Parse(m.Nodes)
			if err != nil {
				return s, invalid("linux.memoryPolicy.nodes: %q: %w", m.Nodes, err)
			}
			s.MemoryPolicy.Nodes = *nodes
		}
	}
	return s, nil
}
