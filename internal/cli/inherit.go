package cli

import (
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/caller"
)

// inherited is what a process that this command asks for has of the command's caller, as a child has under runc.
// Nothing of it may have been changed before.
func inherited() (*supervisorv1.Inherited, error) {
	in, err := caller.Read()
	if err != nil {
		return nil, err
	}
	m := &supervisorv1.Inherited{
		SchedPolicy: in.Scheduler.Policy, SchedPriority: in.Scheduler.Priority, Nice: in.Scheduler.Nice,
		SchedResetOnFork: in.Scheduler.ResetOnFork, IoPriority: in.IOPriority, OomScoreAdj: int32(in.OOMScoreAdj),
		CoredumpFilter: in.CoredumpFilter, TimerSlackNs: in.TimerSlack, Personality: in.Personality, Securebits: in.Securebits,
		NoNewPrivs: in.NoNewPrivs, ThpDisable: in.THPDisable, Umask: &in.Umask,
	}
	for _, l := range in.Rlimits {
		m.Rlimits = append(m.Rlimits, &supervisorv1.Rlimit{Resource: uint32(l.Resource), Soft: l.Soft, Hard: l.Hard})
	}
	return m, nil
}

// hookEnv is this command's environment if one of the hooks has none of its own, else nothing.
func hookEnv(lists ...[]specs.Hook) []string {
	for _, hooks := range lists {
		for _, h := range hooks {
			if len(h.Env) == 0 {
				return os.Environ()
			}
		}
	}
	return nil
}
