package bundle

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/cpulist"
)

// schedulerPolicies are those of the runtime-spec. What the guest's kernel lacks of them, it refuses.
var schedulerPolicies = []specs.LinuxSchedulerPolicy{
	specs.SchedOther, specs.SchedFIFO, specs.SchedRR, specs.SchedBatch, specs.SchedISO, specs.SchedIdle, specs.SchedDeadline,
}

var schedulerFlags = []specs.LinuxSchedulerFlag{
	specs.SchedFlagResetOnFork, specs.SchedFlagReclaim, specs.SchedFlagDLOverrun, specs.SchedFlagKeepPolicy,
	specs.SchedFlagKeepParams, specs.SchedFlagUtilClampMin, specs.SchedFlagUtilClampMax,
}

// scheduler has runc's rules, and the kernel's for the static priority.
func (c *checker) scheduler(at string, s *specs.Scheduler) error {
	if s == nil {
		return nil
	}
	static := s.Policy == specs.SchedFIFO || s.Policy == specs.SchedRR
	switch {
	case s.Policy == "":
		return c.invalid(at+".policy", "must not be empty")
	case !slices.Contains(schedulerPolicies, s.Policy):
		return c.invalid(at+".policy", "%s is not known", quote(string(s.Policy)))
	case (s.Policy == specs.SchedOther || s.Policy == specs.SchedBatch) && (s.Nice < -20 || s.Nice > 19):
		return c.invalid(at+".nice", "%d is not between -20 and 19", s.Nice)
	case static && (s.Priority < 1 || s.Priority > 99):
		return c.invalid(at+".priority", "%d is not between 1 and 99", s.Priority)
	case !static && s.Priority != 0:
		return c.invalid(at+".priority", "is for SCHED_FIFO and SCHED_RR, not for %s", s.Policy)
	case s.Policy != specs.SchedDeadline && (s.Runtime != 0 || s.Deadline != 0 || s.Period != 0):
		return c.invalid(at, "runtime, deadline and period are for SCHED_DEADLINE, not for %s", s.Policy)
	}
	for _, f := range s.Flags {
		if !slices.Contains(schedulerFlags, f) {
			return c.invalid(at+".flags", "%s is not known", quote(string(f)))
		}
	}
	return nil
}

func (c *checker) ioPriority(at string, p *specs.LinuxIOPriority) error {
	if p == nil {
		return nil
	}
	switch {
	case p.Priority < 0 || p.Priority > 7:
		return c.invalid(at+".priority", "%d is not between 0 and 7", p.Priority)
	case !slices.Contains([]specs.IOPriorityClass{specs.IOPRIO_CLASS_RT, specs.IOPRIO_CLASS_BE, specs.IOPRIO_CLASS_IDLE}, p.Class):
		return c.invalid(at+".class", "%s is not known", quote(string(p.Class)))
	}
	return nil
}

func (c *checker) affinity(at string, a *specs.CPUAffinity) error {
	if a == nil {
		return nil
	}
	for _, list := range []struct{ name, text string }{{"initial", a.Initial}, {"final", a.Final}} {
		if list.text == "" {
			continue
		}
		if _, err := cpulist.Parse(list.text); err != nil {
			return c.invalid(at+"."+list.name, "%s: %v", quote(list.text), err)
		}
	}
	return nil
}

func (c *checker) personality(at string, p *specs.LinuxPersonality) error {
	if p != nil && p.Domain != specs.PerLinux && p.Domain != specs.PerLinux32 {
		return c.invalid(at+".domain", "%s is not known", quote(string(p.Domain)))
	}
	return nil
}

// MemoryPolicyModes lists the modes that linux.memoryPolicy may have, sorted.
func MemoryPolicyModes() []string {
	return sorted(
		specs.MpolDefault, specs.MpolBind, specs.MpolInterleave, specs.MpolWeightedInterleave, specs.MpolPreferred,
		specs.MpolPreferredMany, specs.MpolLocal,
	)
}

// MemoryPolicyFlags lists the flags that linux.memoryPolicy may have, sorted.
func MemoryPolicyFlags() []string {
	return sorted(specs.MpolFNumaBalancing, specs.MpolFRelativeNodes, specs.MpolFStaticNodes)
}

func sorted[T ~string](names ...T) []string {
	var list []string
	for _, n := range names {
		list = append(list, string(n))
	}
	slices.Sort(list)
	return list
}

// memoryPolicy has runc's rules: which modes take nodes. Whether the nodes are there the guest's
// kernel says.
func (c *checker) memoryPolicy(at string, p *specs.LinuxMemoryPolicy) error {
	if p == nil {
		return nil
	}
	if !slices.Contains(MemoryPolicyModes(), string(p.Mode)) {
		return c.invalid(at+".mode", "%s is not known", quote(string(p.Mode)))
	}
	if p.Nodes != "" {
		if _, err := cpulist.Parse(p.Nodes); err != nil {
			return c.invalid(at+".nodes", "%s: %v", quote(p.Nodes), err)
		}
	}
	switch p.Mode {
	case specs.MpolDefault, specs.MpolLocal:
		if p.Nodes != "" {
			return c.invalid(at+".nodes", "%s takes no nodes", p.Mode)
		}
	case specs.MpolBind, specs.MpolInterleave, specs.MpolWeightedInterleave, specs.MpolPreferredMany:
		if p.Nodes == "" {
			return c.invalid(at+".nodes", "%s takes at least one node", p.Mode)
		}
	}
	for _, f := range p.Flags {
		if !slices.Contains(MemoryPolicyFlags(), string(f)) {
			return c.invalid(at+".flags", "%s is not known", quote(string(f)))
		}
	}
	return nil
}
