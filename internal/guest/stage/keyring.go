package stage

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Rights on a keyring: all to who possesses it, and to its owner all but writing; to find it by
// its name takes the right to search, which in a user namespace only the others' bits give.
const (
	keyringRights       = 0x3f130000
	keyringSearch       = 0x00080000
	keyringSearchUserNS = 0x00000008
)

// joinKeyring gives the process the container's session keyring, which init makes. A kernel
// without keys is fine.
func joinKeyring(cfg *Config) error {
	name := cfg.Process.Shared.Keyring
	if name == "" {
		return nil
	}
	ring, err := unix.KeyctlJoinSessionKeyring(name)
	if errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("join session keyring: %w", err)
	}
	if cfg.Container == nil {
		return nil
	}
	rights := uint32(keyringRights | keyringSearch)
	if cfg.UserNS {
		rights = keyringRights | keyringSearchUserNS
	}
	if err := unix.KeyctlSetperm(ring, rights); err != nil {
		return fmt.Errorf("set rights on session keyring: %w", err)
	}
	return nil
}
