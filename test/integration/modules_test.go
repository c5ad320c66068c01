package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// What a container may make the kernel do it can do without knowing of the modules that this needs.
func TestModulesOnDemand(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", strings.Join([]string{
		"set -e",
		"ip link add d0 type dummy", "ip link add v0 type veth", "ip -o link show v0",
		"until iptables-legacy -nL >/dev/null 2>&1; do sleep 0.1; done", // its first module comes by itself, but late
		"for tables in iptables-nft ip6tables-nft iptables-legacy; do",
		"$tables -t nat -A POSTROUTING -o lo -j MASQUERADE",
		"$tables -A INPUT -m conntrack --ctstate ESTABLISHED -m comment --comment hello -j REJECT",
		"$tables -A OUTPUT -m owner --uid-owner 1 -p tcp -m multiport --dports 1,2 -j RETURN",
		"$tables -S",
		"$tables -t nat -S",
		"done",
	}, "\n")}, func(s *specs.Spec) {
		c := s.Process.Capabilities
		for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted} {
			*set = append(*set, "CAP_NET_ADMIN", "CAP_NET_RAW")
		}
		s.Process.Env = append(s.Process.Env, "XTABLES_LOCKFILE=/tmp/lock")
	})
	rootfs := filepath.Join(bundle, "rootfs")
	for _, program := range []string{"/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-legacy-multi"} {
		copyProgram(t, rootfs, program)
	}
	plugins, err := filepath.Glob("/usr/lib/x86_64-linux-gnu/xtables/*.so")
	assert.NilError(t, err)
	for _, plugin := range plugins {
		copyFile(t, rootfs, plugin)
	}
	for name, target := range map[string]string{
		"iptables-nft": "xtables-nft-multi", "ip6tables-nft": "xtables-nft-multi", "iptables-legacy": "xtables-legacy-multi",
	} {
		assert.NilError(t, os.Symlink("/usr/sbin/"+target, filepath.Join(rootfs, "bin", name)))
	}
	out := e.OK("run", "--bundle", bundle, "box")
	assert.Check(t, is.Contains(out, ": v0@"))
	assert.Check(t, is.Equal(strings.Count(out, "-A POSTROUTING -o lo -j MASQUERADE"), 3), out)
	assert.Check(t, is.Equal(strings.Count(out, "--comment hello -j REJECT"), 3), out)
}

// copyProgram copies a program of the host with its libraries into a root file system.
func copyProgram(t *testing.T, rootfs, path string) {
	t.Helper()
	copyFile(t, rootfs, path)
	out, err := exec.Command("ldd", path).Output()
	assert.NilError(t, err)
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") {
			copyFile(t, rootfs, word)
		}
	}
}

func copyFile(t *testing.T, rootfs, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	target := filepath.Join(rootfs, path)
	assert.NilError(t, os.MkdirAll(filepath.Dir(target), 0o755))
	assert.NilError(t, os.WriteFile(target, data, 0o755))
}
