package bundle

import (
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
)

// TestAdaptCgroups has a line for each kind of mount with which callers describe the host's control groups.
func TestAdaptCgroups(t *testing.T) {
	sources := map[string]groupSource{
		"/": aboveGroups, "/sys": aboveGroups, cgroupDir: aboveGroups, // a host with cgroup v1
		cgroupDir + "/systemd": groupDir, cgroupDir + "/memory/x": groupDir, "/other": groupDir, "/v2": groupDir,
		cgroupDir + "/memory/tasks": groupFile,
	}
	m := func(destination, kind, source, options string) specs.Mount {
		return specs.Mount{Destination: destination, Type: kind, Source: source, Options: strings.Fields(options)}
	}
	const plain = "nosuid noexec nodev relatime "
	sys := m("/sys", "sysfs", "sysfs", "ro")
	for name, c := range map[string]struct {
		mounts, want []specs.Mount
		warning      string
		writes       bool
	}{
		"a default of Docker": {
			mounts: []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "ro nosuid noexec nodev")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "nosuid noexec nodev ro")},
		},
		"privileged": {
			mounts: []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "nosuid noexec nodev")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "nosuid noexec nodev rw")},
			writes: true,
		},
		"systemd in Podman": {
			mounts: []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "rprivate ro"), m("/run", "tmpfs", "tmpfs", ""), m(cgroupDir+"/systemd", "bind", cgroupDir+"/systemd", "bind rprivate")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "rprivate rw"), m("/run", "tmpfs", "tmpfs", "")},
			writes: true,
		},
		"one hierarchy, read-only": {
			mounts: []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "rprivate ro"), m(cgroupDir+"/systemd", "bind", cgroupDir+"/systemd", "bind ro")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup", "cgroup", "rprivate ro")},
		},
		"one hierarchy without its place": {
			mounts: []specs.Mount{sys, m(cgroupDir+"/systemd", "bind", cgroupDir+"/systemd", "bind")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup2", "cgroup", plain+"rw")},
			writes: true,
		},
		"all, as usual for systemd in Docker": { // read-only is the tmpfs with the hierarchies, not they
			mounts: []specs.Mount{sys, m(cgroupDir, "bind", cgroupDir, "rbind ro rprivate")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup2", "cgroup", plain+"rw")},
			writes: true,
		},
		"all, to be written to": {
			mounts: []specs.Mount{sys, m(cgroupDir, "bind", cgroupDir, "rbind")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup2", "cgroup", plain+"rw")},
			writes: true,
		},
		"all, recursively read-only": {
			mounts: []specs.Mount{sys, m(cgroupDir, "bind", cgroupDir, "rbind ro rro")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup2", "cgroup", plain+"ro")},
		},
		"the hierarchy of a host with cgroup v2, read-only": {
			mounts: []specs.Mount{sys, m(cgroupDir, "bind", "/v2", "rbind ro")},
			want:   []specs.Mount{sys, m(cgroupDir, "cgroup2", "cgroup", plain+"ro")},
		},
		"elsewhere": {
			mounts:  []specs.Mount{m("/host/cgroup", "bind", cgroupDir, "bind ro"), m("/x", "bind", cgroupDir+"/memory/x", "bind")},
			want:    []specs.Mount{m("/host/cgroup", "cgroup2", "cgroup", plain+"ro"), m("/x", "cgroup2", "cgroup", plain+"rw")},
			warning: `mounts[0].source: "/sys/fs/cgroup" at /host/cgroup has the container's own control groups, in the guest's cgroup v2, not the host's`,
			writes:  true,
		},
		"a tmpfs with hierarchies": {
			mounts: []specs.Mount{
				m(cgroupDir, "tmpfs", "tmpfs", "mode=755"), m(cgroupDir+"/memory", "cgroup", "cgroup", "ro memory"),
				m(cgroupDir+"/systemd", "cgroup", "cgroup", "name=systemd"),
			},
			want:    []specs.Mount{m(cgroupDir, "cgroup", "cgroup", "rw")},
			warning: `mounts[1].options: ignored: "memory": the guest has one hierarchy of control groups, cgroup v2`,
			writes:  true,
		},
		"a tmpfs without": {
			mounts: []specs.Mount{m(cgroupDir, "tmpfs", "tmpfs", "mode=755")},
			want:   []specs.Mount{m(cgroupDir, "tmpfs", "tmpfs", "mode=755")},
		},
		"all of /sys": {
			mounts: []specs.Mount{m("/sys", "bind", "/sys", "rbind ro"), m("/host", "bind", "/", "rbind")},
			want:   []specs.Mount{m("/sys", "bind", "/sys", "rbind ro"), m(cgroupDir, "cgroup2", "cgroup", plain+"rw"), m("/host", "bind", "/", "rbind")},
			writes: true,
		},
		"all of /sys, and then others": {
			mounts: []specs.Mount{m("/sys", "bind", "/sys", "rbind"), m(cgroupDir, "cgroup", "cgroup", "ro")},
			want:   []specs.Mount{m("/sys", "bind", "/sys", "rbind"), m(cgroupDir, "cgroup", "cgroup", "ro")},
		},
		"remounts, and what is no group": {
			mounts: []specs.Mount{m("/x", "bind", "/x", "bind"), m(cgroupDir, "bind", "", "bind remount ro")},
			want:   []specs.Mount{m("/x", "bind", "/x", "bind"), m(cgroupDir, "bind", "", "bind remount ro")},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := &Bundle{Dir: "/b", Spec: &specs.Spec{Mounts: c.mounts, Linux: &specs.Linux{}}}
			assert.NilError(t, b.adaptCgroups(func(source string) groupSource { return sources[source] }))
			assert.DeepEqual(t, b.Spec.Mounts, c.want)
			assert.Equal(t, b.writesCgroups(), c.writes)
			warning := ""
			if len(b.Warnings) > 0 {
				warning = b.Warnings[0]
			}
			assert.Equal(t, warning, c.warning)
			b.Spec.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.CgroupNamespace}}
			assert.Equal(t, b.writesCgroups(), false, "it has a namespace")
		})
	}
	b := &Bundle{Dir: "/b", Spec: &specs.Spec{Mounts: []specs.Mount{m("/x", "bind", cgroupDir+"/memory/tasks", "bind")}}}
	err := b.adaptCgroups(func(source string) groupSource { return sources[source] })
	assert.Error(t, err, `config.json: mounts[0].source: "/sys/fs/cgroup/memory/tasks" is a file of the host's control groups; the VM has its own`)
}

// TestGroupSourceOf looks at this machine, which has control groups where all have them.
func TestGroupSourceOf(t *testing.T) {
	assert.Equal(t, groupSourceOf("/sys"), aboveGroups)
	assert.Equal(t, groupSourceOf(t.TempDir()), noGroups)
	assert.Equal(t, groupSourceOf("/nosuch"), noGroups)
}
