package cli

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

// accepts tells whether a bundle is accepted without a word that something is ignored.
func accepts(t *testing.T, edit func(*specs.Spec)) bool {
	t.Helper()
	spec := bundle.DefaultSpec()
	edit(spec)
	data, err := json.Marshal(spec)
	assert.NilError(t, err)
	b, err := bundle.Parse(data, "/b")
	return err == nil && len(b.Warnings) == 0
}

// TestFeaturesAreWhatIsImplemented asks for each thing that features has an answer to.
func TestFeaturesAreWhatIsImplemented(t *testing.T) {
	f := supported()
	check := func(what string, claimed bool, edit func(*specs.Spec)) {
		t.Helper()
		assert.Equal(t, accepts(t, edit), claimed, what)
	}
	check("oldest version", true, func(s *specs.Spec) { s.Version = f.OCIVersionMin })
	check("newest version", true, func(s *specs.Spec) { s.Version = f.OCIVersionMax })
	check("other version", false, func(s *specs.Spec) { s.Version = "2.0.0" })

	for _, name := range append(f.Hooks, "prestarts") {
		check("hook "+name, slices.Contains(f.Hooks, name), func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{}
			field := reflect.ValueOf(s.Hooks).Elem().FieldByNameFunc(func(n string) bool { return strings.EqualFold(n, name) })
			if !field.IsValid() { // no such hook
				s.Version = ""
				return
			}
			field.Set(reflect.ValueOf([]specs.Hook{{Path: "/x"}}))
		})
	}
	mounts := func(m specs.Mount, option string) bool {
		m.Options = append(m.Options, option)
		m.Destination = "/x"
		return accepts(t, func(s *specs.Spec) { s.Mounts = append(s.Mounts, m) })
	}
	ids := []specs.LinuxIDMapping{{HostID: 1000, Size: 1}}
	for _, option := range f.MountOptions {
		bind := specs.Mount{Source: "/x", Options: []string{"bind"}}
		if strings.HasSuffix(option, "idmap") {
			bind.UIDMappings, bind.GIDMappings = ids, ids
		}
		ok := mounts(bind, option) || mounts(specs.Mount{Source: "x", Type: "tmpfs"}, option)
		assert.Assert(t, ok, "mount option %s", option)
	}
	for _, c := range append(f.Linux.Capabilities, "CAP_FLY") {
		check(c, slices.Contains(f.Linux.Capabilities, c), func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{c} })
	}
	for _, ns := range []string{"cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts", "alien"} {
		check("namespace "+ns, slices.Contains(f.Linux.Namespaces, ns), func(s *specs.Spec) {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == ns })
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(ns)})
			if ns == "user" {
				s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
				s.Linux.GIDMappings = s.Linux.UIDMappings
			}
		})
	}
	profile := func(edit func(*specs.LinuxSeccomp)) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
			edit(s.Linux.Seccomp)
		}
	}
	for _, action := range append(f.Linux.Seccomp.Actions, string(specs.ActNotify)) {
		check(action, slices.Contains(f.Linux.Seccomp.Actions, action), profile(func(p *specs.LinuxSeccomp) {
			p.Syscalls = []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.LinuxSeccompAction(action)}}
		}))
	}
	for _, op := range append(f.Linux.Seccomp.Operators, "SCMP_CMP_ODD") {
		check(op, slices.Contains(f.Linux.Seccomp.Operators, op), profile(func(p *specs.LinuxSeccomp) {
			p.Syscalls = []specs.LinuxSyscall{{
				Names: []string{"mkdir"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: specs.LinuxSeccompOperator(op)}},
			}}
		}))
	}
	for _, arch := range append(f.Linux.Seccomp.Archs, "SCMP_ARCH_PDP11") {
		spec := bundle.DefaultSpec()
		profile(func(p *specs.LinuxSeccomp) { p.Architectures = []specs.Arch{specs.ArchX86_64, specs.Arch(arch)} })(spec)
		data, err := json.Marshal(spec)
		assert.NilError(t, err)
		_, err = bundle.Parse(data, "/b") // a warning tells of those that no program in the guest is of
		assert.Equal(t, err == nil, slices.Contains(f.Linux.Seccomp.Archs, arch), arch)
	}
	for _, flag := range append(f.Linux.Seccomp.SupportedFlags, "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV") {
		check(flag, slices.Contains(f.Linux.Seccomp.SupportedFlags, flag), profile(func(p *specs.LinuxSeccomp) { p.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlag(flag)} }))
	}
	for _, mode := range append(f.Linux.MemoryPolicy.Modes, "MPOL_ODD") {
		check(mode, slices.Contains(f.Linux.MemoryPolicy.Modes, mode), func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MemoryPolicyModeType(mode)}
			if mode != "MPOL_DEFAULT" && mode != "MPOL_LOCAL" {
				s.Linux.MemoryPolicy.Nodes = "0"
			}
		})
	}
	for _, flag := range append(f.Linux.MemoryPolicy.Flags, "MPOL_F_ODD") {
		check(flag, slices.Contains(f.Linux.MemoryPolicy.Flags, flag), func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "MPOL_BIND", Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MemoryPolicyFlagType(flag)}}
		})
	}
	check("seccomp", *f.Linux.Seccomp.Enabled, profile(func(*specs.LinuxSeccomp) {}))
	check("apparmor", *f.Linux.Apparmor.Enabled, func(s *specs.Spec) { s.Process.ApparmorProfile = "docker-default" })
	check("selinux", *f.Linux.Selinux.Enabled, func(s *specs.Spec) { s.Process.SelinuxLabel = "a:b:c:d" })
	check("selinux", *f.Linux.Selinux.Enabled, func(s *specs.Spec) { s.Linux.MountLabel = "a:b:c:d" })
	check("intelRdt", *f.Linux.IntelRdt.Enabled, func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"} })
	check("netDevices", *f.Linux.NetDevices.Enabled, func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} })
	check("idmap", *f.Linux.MountExtensions.IDMap.Enabled, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Source: "/x", Options: []string{"bind"}, UIDMappings: ids, GIDMappings: ids})
	})
	check("cgroup v2", *f.Linux.Cgroup.V2, func(s *specs.Spec) { s.Linux.Resources.Unified = map[string]string{"memory.high": "max"} })
	check("rdma", *f.Linux.Cgroup.Rdma, func(s *specs.Spec) {
		s.Linux.Resources.Rdma = map[string]specs.LinuxRdma{"mlx5_0": {HcaHandles: new(uint32(1))}}
	})
}

// TestFeaturesHaveTheSpecificationsShape: nothing in it that the runtime-spec does not know.
func TestFeaturesHaveTheSpecificationsShape(t *testing.T) {
	data, err := json.Marshal(supported())
	assert.NilError(t, err)
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	var f features.Features
	assert.NilError(t, dec.Decode(&f))
	assert.DeepEqual(t, &f, supported())
	for _, list := range [][]string{f.MountOptions, f.Linux.Namespaces, f.Linux.MemoryPolicy.Modes} {
		assert.Assert(t, slices.IsSorted(list), fmt.Sprint(list))
	}
}
