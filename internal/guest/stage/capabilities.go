package stage

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// dropBounding limits the bounding set; it needs CAP_SETPCAP, so it comes before
// the change of user.
func (c *Capabilities) dropBounding() error {
	for n := range 64 {
		if c.Bounding&(1<<n) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			return nil // the kernel knows no more
		}
		if err != nil {
			return fmt.Errorf("drop bounding capability %d: %w", n, err)
		}
	}
	return nil
}

// apply sets the other sets of this thread. Capabilities that the kernel does not
// know or that the thread may not have are left out, as other runtimes do. Those in
// spare stay permitted beside the program's own, until limit.
func (c *Capabilities) apply(spare uint64) error {
	var known uint64
	for n := range 64 {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n), 0, 0, 0); err != nil {
			break
		}
		known |= 1 << n
	}
	permitted := c.Permitted & known
	inheritable := c.Inheritable & known
	c.Permitted, c.Effective, c.Inheritable = permitted, c.Effective&permitted, inheritable
	if err := capset(permitted|spare, c.Effective, inheritable); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	// Only what is permitted and inheritable can be ambient.
	for n := range 64 {
		if c.Ambient&permitted&inheritable&(1<<n) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
			return fmt.Errorf("set ambient capability %d: %w", n, err)
		}
	}
	return nil
}

// raise makes capabilities effective that apply has spared.
func (c *Capabilities) raise(spare uint64) error {
	return capset(c.Permitted|spare, c.Effective|spare, c.Inheritable)
}

// limit takes away what apply has spared.
func (c *Capabilities) limit() error {
	return capset(c.Permitted, c.Effective, c.Inheritable)
}

func capset(permitted, effective, inheritable uint64) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(effective), Permitted: uint32(permitted), Inheritable: uint32(inheritable)},
		{Effective: uint32(effective >> 32), Permitted: uint32(permitted >> 32), Inheritable: uint32(inheritable >> 32)},
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return nil
}
