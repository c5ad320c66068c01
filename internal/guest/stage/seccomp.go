package stage

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// spareCapabilities are those that filter needs and the program may not have: without
// no_new_privs the kernel takes a filter from CAP_SYS_ADMIN only.
func (p *program) spareCapabilities() uint64 {
	if p.Shared.Seccomp == nil || p.NoNewPrivs || p.Capabilities.Effective&p.Capabilities.Permitted&(1<<unix.CAP_SYS_ADMIN) != 0 {
		return 0
	}
	return 1 << unix.CAP_SYS_ADMIN
}

// filter loads the filter as the last step before the startContainer hooks and execve, so that it need
// not allow what the stage does but for one capset, without no_new_privs, and the starting of hooks. It
// holds for this thread alone, the one that starts the hooks and that execve leaves.
func (p *program) filter() error {
	if p.Shared.Seccomp == nil {
		return nil
	}
	spare := p.spareCapabilities()
	if spare != 0 {
		if err := p.Capabilities.raise(spare); err != nil {
			return err
		}
	}
	if err := setFilter(p.Shared.Seccomp.Program, p.Shared.Seccomp.Flags); err != nil {
		return fmt.Errorf("load seccomp filter: %w", err)
	}
	if spare != 0 {
		return p.Capabilities.limit()
	}
	return nil
}
