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
	private rprivate slave rslave shared rshared unbindable runbindable`)

// recOptions set attributes of a bind mount and of all below it.
var recOptions = options(`
	rro rrw rnosuid rsuid rnodev rdev rnoexec rexec rnodiratime rdiratime
	rrelatime rnorelatime rnoatime ratime rstrictatime rnostrictatime
	rnosymfollow rsymfollow`)

// superOptions are those of mountFlags that belong to a file system as a whole. On a bind mount the
// kernel ignores them.
var superOptions = options(`async dirsync iversion lazytime mand noiversion nolazytime nomand sync silent loud`)

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
	for _, set := range []map[string]bool{mountFlags, recOptions, idOptions} {
		for o := range set {
			list = append(list, o)
		}
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

func (c *checker) mounts(s *specs.Spec) error {
	for i := range s.Mounts {
		at := fmt.Sprintf("mounts[%d]", i)
		if err := c.mount(&s.Mounts[i], at); err != nil {
			return err
		}
		if err := c.idMap(&s.Mounts[i], at, len(s.Linux.UIDMappings) > 0); err != nil {
			return err
		}
	}
	return nil
}

// idOptions make a bind mount one that maps the ids of its files, by the mount's mappings or
// else by those of the container's user namespace.
var idOptions = options(`idmap ridmap`)

// idMap checks the mappings of a mount.
func (c *checker) idMap(m *specs.Mount, at string, userNS bool) error {
	uids, gids := len(m.UIDMappings) > 0, len(m.GIDMappings) > 0
	asked := slices.IndexFunc(m.Options, func(o string) bool { return idOptions[o] })
	switch {
	case !uids && !gids && asked < 0:
		return nil
	case !isBind(m) && asked >= 0:
		return c.invalid(fmt.Sprintf("%s.options[%d]", at, asked), "%s is for bind mounts", m.Options[asked])
	case !isBind(m):
		return c.invalid(at+".uidMappings", "only bind mounts can have mappings")
	case !uids && gids:
		return c.invalid(at+".uidMappings", "must be given with gidMappings")
	case uids && !gids:
		return c.invalid(at+".gidMappings", "must be given with uidMappings")
	case !uids && !userNS:
		return c.invalid(fmt.Sprintf("%s.options[%d]", at, asked), "%s needs mappings, of the mount or of a user namespace", m.Options[asked])
	}
	if err := c.mappings(at+".uidMappings", m.UIDMappings); err != nil {
		return err
	}
	return c.mappings(at+".gidMappings", m.GIDMappings)
}

// idMapOf returns the mappings of a bind mount; nil: none.
func (b *Bundle) idMapOf(m *specs.Mount) *IDMap {
	own := len(m.UIDMappings) > 0
	if !own && !slices.ContainsFunc(m.Options, func(o string) bool { return idOptions[o] }) {
		return nil
	}
	ids := &IDMap{UIDs: m.UIDMappings, GIDs: m.GIDMappings, Recursive: slices.Contains(m.Options, "ridmap")}
	if !own {
		ids.UIDs, ids.GIDs = b.Spec.Linux.UIDMappings, b.Spec.Linux.GIDMappings
	}
	return ids
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
		switch {
		case idOptions[o]:
		case o == "tmpcopyup" && m.Type != "tmpfs":
			c.warn("%s: ignored: %s is for tmpfs", field, o)
		case recOptions[o] && !bind:
			c.warn("%s: ignored: %s is for bind mounts", field, o)
		case bind && !mountFlags[o] && !recOptions[o]:
			if strings.HasPrefix(o, "idmap") || strings.HasPrefix(o, "ridmap") {
				return c.invalid(field, "%s is not an option of a bind mount", quote(o))
			}
			// The kernel takes no data for binds, and looks at none.
			c.warn("%s: ignored: %s is not an option of a bind mount", field, quote(o))
		case bind && superOptions[o]:
			c.warn("%s: ignored: %s has no effect on a bind mount", field, o)
		case bind && (o == "shared" || o == "rshared"):
			c.warn("%s: %s ends at the VM: mounts that are made in it do not reach the host", field, o)
		}
	}
	return nil
}
