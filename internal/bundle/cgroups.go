package bundle

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cgroupDir is where programs look for control groups, on the host as in containers.
const cgroupDir = "/sys/fs/cgroup"

// groupSource is what the source of a bind mount has to do with the host's control groups.
type groupSource int

const (
	noGroups    groupSource = iota
	groupFile               // a file of a control group
	groupDir                // a control group, or a hierarchy of them
	aboveGroups             // a directory with the hierarchies below cgroupDir in it
)

// groupSourceOf looks at a path of the host.
func groupSourceOf(source string) groupSource {
	var fs unix.Statfs_t
	if err := unix.Statfs(source, &fs); err != nil {
		return noGroups // checkFiles tells
	}
	switch fs.Type {
	case unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC:
		var st unix.Stat_t
		if err := unix.Stat(source, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return groupFile
		}
		return groupDir
	}
	real, err := filepath.EvalSymlinks(source)
	if err == nil && within(cgroupDir, real) {
		return aboveGroups
	}
	return noGroups
}

// within tells whether a clean path is dir or below it.
func within(name, dir string) bool {
	return name == dir || dir == "/" || strings.HasPrefix(name, dir+"/")
}

// adaptCgroups translates mounts that speak of control groups as the host has them, of either version,
// into mounts of the guest's cgroup v2. A program in the container finds its own groups where it would look for
// them, and can write to them if it could to one of the host's that it asked for. No group of the host is shared
// with the VM under these mounts: its files mean nothing there, and some (release_agent) are a way out.
func (b *Bundle) adaptCgroups(sourceOf func(source string) groupSource) error {
	a := adapter{b: b, checker: checker{doc: configFile}, root: -1}
	for i := range b.Spec.Mounts {
		if err := a.add(b.Spec.Mounts[i], fmt.Sprintf("mounts[%d]", i), sourceOf); err != nil {
			return err
		}
	}
	b.Spec.Mounts = a.mounts
	b.Warnings = append(b.Warnings, a.warnings...)
	return nil
}

// adapter makes the list of mounts anew.
type adapter struct {
	checker
	b      *Bundle
	mounts []specs.Mount
	root   int // index of the mount at cgroupDir; -1: none
}

func (a *adapter) add(m specs.Mount, at string, sourceOf func(string) groupSource) error {
	switch {
	case slices.Contains(m.Options, "remount"): // changes a mount, whatever its source
		a.mounts = append(a.mounts, m)
		return nil
	case isBind(&m):
		return a.addBind(m, at, sourceOf(a.b.abs(m.Source)))
	case m.Type == "cgroup", m.Type == "cgroup2":
		m.Options = a.groupOptions(m.Options, at)
		a.place(m, !readOnly(&m))
		return nil
	}
	a.mounts = append(a.mounts, m)
	if clean(m.Destination) == cgroupDir {
		a.root = len(a.mounts) - 1
	}
	return nil
}

func (a *adapter) addBind(m specs.Mount, at string, source groupSource) error {
	dest := clean(m.Destination)
	rbind := slices.Contains(m.Options, "rbind")
	// What is below a bind mount is made read-only by rro only.
	below := rbind && !slices.Contains(m.Options, "rro")
	groups := specs.Mount{Destination: dest, Type: "cgroup2", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime"}}
	switch source {
	case groupFile:
		return a.refused(at+".source", "%s is a file of the host's control groups; the VM has its own", quote(m.Source))
	case groupDir:
		a.placeBind(groups, !readOnly(&m), m.Source, at)
		return nil
	case aboveGroups:
		real, err := filepath.EvalSymlinks(a.b.abs(m.Source))
		if err != nil {
			return a.invalid(at+".source", "%s: %v", m.Source, reason(err))
		}
		if real == cgroupDir {
			a.placeBind(groups, below || !readOnly(&m), m.Source, at)
			return nil
		}
		a.mounts = append(a.mounts, m)
		rel, _ := filepath.Rel(real, cgroupDir)
		if rbind && path.Join(dest, rel) == cgroupDir {
			groups.Destination = cgroupDir
			a.place(groups, below)
		}
		return nil
	}
	a.mounts = append(a.mounts, m)
	return nil
}

// placeBind is place for what was a bind mount, which may be anywhere.
func (a *adapter) placeBind(groups specs.Mount, writable bool, source, at string) {
	if !within(groups.Destination, cgroupDir) {
		a.warn("%s.source: %s at %s has the container's own control groups, in the guest's cgroup v2, not the host's", at, quote(source), groups.Destination)
	}
	a.place(groups, writable)
}

// place adds a mount of control groups. One below cgroupDir is a hierarchy of cgroup v1: of those there is one in v2, which
// is at cgroupDir, and to be written to if one of them is. A second one at cgroupDir hides the first, upon which the kernel
// does not mount the same groups.
func (a *adapter) place(m specs.Mount, writable bool) {
	dest := clean(m.Destination)
	inner := dest != cgroupDir && within(dest, cgroupDir)
	if inner {
		m.Destination = cgroupDir
	}
	setWritable(&m, writable)
	if a.root < 0 || !within(dest, cgroupDir) {
		a.mounts = append(a.mounts, m)
		if within(dest, cgroupDir) {
			a.root = len(a.mounts) - 1
		}
		return
	}
	root := &a.mounts[a.root]
	switch {
	case !inner, root.Type == "tmpfs": // the place of hierarchies of v1
		*root = m
	case writable:
		setWritable(root, true)
	}
}

// groupOptions are those of a mount of control groups that have a meaning for cgroup v2 in a namespace: others choose a
// hierarchy of v1, or are for the machine's root.
func (a *adapter) groupOptions(options []string, at string) []string {
	var kept []string
	for _, o := range options {
		switch {
		case mountFlags[o]:
			kept = append(kept, o)
			continue
		case recOptions[o]: // warned of already
			continue
		}
		a.warn("%s.options: ignored: %s: the guest has one hierarchy of control groups, cgroup v2", at, quote(o))
	}
	return kept
}

// writesCgroups tells whether a container without a cgroup namespace may write to control groups. It needs a
// namespace in the guest: under cgroup v1 it would have its own groups only, and in the one hierarchy of v2 there are those
// of the guest and of the pod's other containers as well.
func (b *Bundle) writesCgroups() bool {
	if slices.ContainsFunc(b.Spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.CgroupNamespace }) {
		return false
	}
	return slices.ContainsFunc(b.Spec.Mounts, func(m specs.Mount) bool {
		return (m.Type == "cgroup" || m.Type == "cgroup2") && !isBind(&m) && !readOnly(&m)
	})
}

func setWritable(m *specs.Mount, writable bool) {
	option := "ro"
	if writable {
		option = "rw"
	}
	m.Options = append(slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" || o == "rw" }), option)
}

func clean(name string) string { return path.Join("/", name) }
