package bundle

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// mountTypes are the file systems that the guest's agent mounts.
var mountTypes = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "bind"}

// mountFlags are the options that stand for flags of mount(2) and
// mount_setattr(2), as in the runtime-spec and under runc. Everything else is
// data for the file system.
var mountFlags = options(`
	async atime bind defaults dev diratime dirsync exec iversion lazytime loud
	mand noatime nodev nodiratime noexec noiversion nolazytime nomand
	norelatime nostrictatime nosuid nosymfollow rbind relatime remount ro rw
	silent strictatime suid symfollow sync
	private rprivate slave rslave unbindable runbindable
	rro rrw rnosuid rsuid rnodev rdev rnoexec rexec rnodiratime rdiratime
	rrelatime rnorelatime rnoatime ratime rstrictatime rnostrictatime
	rnosymfollow rsymfollow`)

// refusedOptions are known and cannot be honoured.
var refusedOptions = map[string]string{
	"shared":  "mounts made in the VM cannot reach the host",
	"rshared": "mounts made in the VM cannot reach the host",
	"idmap":   notYet,
	"ridmap":  notYet,
}

func options(list string) map[string]bool {
	m := map[string]bool{}
	for o := range strings.FieldsSeq(list) {
		m[o] = true
	}
	return m
}

// MountOptions lists the mount options that have a meaning of their own, sorted.
func MountOptions() []string {
	list := []string{"tmpcopyup"}
	for o := range mountFlags {
		list = append(list, o)
	}
	slices.Sort(list)
	return list
}

// isBind tells whether a mount is a bind mount: by option, whatever its type,
// or by type.
func isBind(m *specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// readOnly tells what the last of the options that concern it says.
func readOnly(m *specs.Mount) bool {
	ro := false
	for _, o := range m.Options {
		switch o {
		case "ro", "rro":
			ro = true
		case "rw", "rrw":
			ro = false
		}
	}
	return ro
}

func (c *checker) mounts(mounts []specs.Mount) error {
	for i := range mounts {
		if err := c.mount(&mounts[i], fmt.Sprintf("mounts[%d]", i)); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) mount(m *specs.Mount, at string) error {
	if m.Destination == "" {
		return c.invalid(at+".destination", "must not be empty")
	}
	if err := c.text(at+".destination", m.Destination); err != nil {
		return err
	}
	if !path.IsAbs(m.Destination) { // as runc: for the sake of old bundles
		c.warn("%s.destination: %s is not absolute: taken from the root", at, quote(m.Destination))
		m.Destination = path.Join("/", m.Destination)
	}
	bind := isBind(m)
	switch {
	case bind && m.Source == "":
		return c.invalid(at+".source", "must not be empty")
	case !bind && m.Type == "":
		return c.invalid(at+".type", "must not be empty unless an option is bind or rbind")
	case !bind && !slices.Contains(mountTypes, m.Type):
		return c.refused(at+".type", "file system %s is not supported; known: %s", quote(m.Type), strings.Join(mountTypes, ", "))
	}
	if err := c.text(at+".source", m.Source); err != nil {
		return err
	}
	for j, o := range m.Options {
		field := fmt.Sprintf("%s.options[%d]", at, j)
		if err := c.text(field, o); err != nil {
			return err
		}
		name, _, _ := strings.Cut(o, "=") // "idmap=..."
		switch why, refused := refusedOptions[name]; {
		case refused:
			return c.refused(field, "%s: %s", quote(o), why)
		case o == "tmpcopyup" && m.Type != "tmpfs":
			return c.invalid(field, "%s is for tmpfs", quote(o))
		case bind && !mountFlags[o]:
			return c.invalid(field, "%s is not an option of a bind mount", quote(o))
		}
	}
	return nil
}
