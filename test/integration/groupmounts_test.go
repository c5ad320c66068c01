package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// useGroups tells, of cgroup v1 and v2 alike, whether the container may make a group of its own below the one that it is in
// and go there. Of v1 it takes the hierarchy that systemd takes, where it is mounted.
const useGroups = `
g=/sys/fs/cgroup
if [ -e $g/cgroup.controllers ]; then
	g=$g/$(sed -n s/^0:://p /proc/self/cgroup)
else
	p=$(sed -n s/^[0-9]*:name=systemd://p /proc/self/cgroup); g=$g/systemd
	[ ! -e $g/$p/cgroup.procs ] || g=$g/$p
fi
[ -e $g/cgroup.procs ] || { echo no groups; exit; }
mkdir $g/made 2>/dev/null || { echo read-only; exit; }
sh -c "echo 0 >$g/made/cgroup.procs && grep -o /made\$ /proc/self/cgroup"
rmdir $g/made && echo writable`

// withGroups makes the mounts all that a container of no cgroup namespace has of control groups.
func withGroups(mounts ...specs.Mount) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Process.Rlimits = nil
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return strings.HasPrefix(m.Type, "cgroup") })
		s.Mounts = append(s.Mounts, mounts...)
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.CgroupNamespace })
	}
}

func mount(destination, kind, source, options string) specs.Mount {
	return specs.Mount{Destination: destination, Type: kind, Source: source, Options: strings.Fields(options)}
}

// TestMountsOfGroups has containers whose mounts speak of the control groups as the host has them. What a program
// can do with its groups is as under runc, whatever the host's version and the guest's, and it is done to the guest's groups.
func TestMountsOfGroups(t *testing.T) {
	const at = "/sys/fs/cgroup"
	e := harness.New(t)
	e.OK("run", "-d", "--bundle", e.Bundle([]string{"sleep", "100000"}), "infra")
	inPod := sharing(e.State("infra").Pid, specs.NetworkNamespace)
	sys := specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "ro"}}
	bundle := e.Bundle([]string{"sh", "-c", useGroups})
	original, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	assert.NilError(t, err)
	configure := func(mounts ...specs.Mount) {
		t.Helper()
		assert.NilError(t, os.WriteFile(filepath.Join(bundle, "config.json"), original, 0o600))
		e.EditSpec(bundle, withGroups(mounts...))
	}
	for name, mounts := range map[string][]specs.Mount{
		"none":                     {},
		"read-only":                {mount(at, "cgroup", "cgroup", "ro nosuid noexec nodev relatime")},
		"privileged":               {mount(at, "cgroup", "cgroup", "nosuid noexec nodev relatime")},
		"systemd-by-podman":        {mount(at, "cgroup", "cgroup", "ro rprivate nosuid"), mount(at+"/systemd", "bind", at+"/systemd", "bind rprivate")},
		"systemd-read-only":        {mount(at, "cgroup", "cgroup", "ro rprivate nosuid"), mount(at+"/systemd", "bind", at+"/systemd", "bind ro")},
		"all-read-only-at-the-top": {mount(at, "bind", at, "rbind ro rprivate")},
		"all":                      {mount(at, "bind", at, "rbind rprivate")},
		"all-read-only":            {mount(at, "bind", at, "rbind ro rro")},
		"systemd-in-a-tmpfs":       {mount(at, "tmpfs", "tmpfs", "mode=755"), mount(at+"/systemd", "bind", at+"/systemd", "bind")},
		"with-sys":                 {sys},
		"with-sys-and-more":        {sys, mount(at, "cgroup", "cgroup", "ro nosuid")},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := os.Stat(at + "/systemd"); err != nil && strings.Contains(name, "systemd") {
				t.Skip("the host has no hierarchy of cgroup v1")
			}
			configure(mounts...)
			var oracles []string
			for _, runc := range e.Runcs() {
				want := runc.Run("run", "--bundle", bundle, name+ownSuffix(runc.Name))
				assert.Equal(t, want.Code, 0, "%s: %s", runc.Name, want.Stderr)
				oracles = append(oracles, want.Stdout)
			}
			e.EditSpec(bundle, inPod)
			e.EditSpec(bundle, func(s *specs.Spec) {
				// What runv adds: where the groups are, that they are its own, and that it cannot change its limits.
				s.Process.Args[2] = `awk '$5 ~ /^.sys.fs.cgroup/ && / - /{ sub(/.* - /, ""); print $1 }' /proc/self/mountinfo | sort -u >&2
` + useGroups + `
if [ -w /sys/fs/cgroup/cgroup.procs ] && mkdir /sys/fs/cgroup/x 2>/dev/null; then
	rmdir /sys/fs/cgroup/x; [ ! -e /sys/fs/cgroup/runv ] || echo sees the groups of others; echo max >/sys/fs/cgroup/memory.max && echo unlimited
fi 2>/dev/null; true`
			})
			got := e.Run("run", "--bundle", bundle, "box")
			assert.Equal(t, got.Code, 0, got.Stderr)
			for _, want := range oracles {
				assert.Equal(t, got.Stdout, want, got.Stderr)
			}
			types := "cgroup2\n"
			if name == "none" {
				types = ""
			}
			assert.Equal(t, got.Stderr, types, "nothing of the host's is there, and nothing is to be warned of")
		})
	}

	// Elsewhere than where a program looks for its own groups, they may be meant to be the host's.
	configure(mount("/host", "bind", at, "rbind ro rro"))
	e.EditSpec(bundle, func(s *specs.Spec) {
		s.Process.Args[2] = `[ -e /host/cgroup.controllers ] && echo version 2; mkdir /host/x || echo read-only`
	})
	r := e.Run("run", "--bundle", bundle, "box")
	assert.Assert(t, cmp.Contains(r.Stderr, `runv: warning: mounts[6].source: "/sys/fs/cgroup" at /host has the container's own control groups, in the guest's cgroup v2, not the host's`))
	assert.Equal(t, r.Stdout, "version 2\nread-only\n", r.Stderr)

	files, _ := filepath.Glob(at + "/memory/cgroup.procs")
	if len(files) == 0 {
		files = []string{at + "/cgroup.procs"}
	}
	configure(mount("/file", "bind", files[0], "bind"))
	r = e.Run("run", "--bundle", bundle, "box")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, `is a file of the host's control groups; the VM has its own`))
}
