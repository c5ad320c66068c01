package boot_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/guest/boot"
)

func TestParameters(t *testing.T) {
	dir := t.TempDir()
	later := filepath.Join(dir, "later")
	file := func(key string) string { return filepath.Join(dir, strings.ReplaceAll(key, ".", "/")) }
	cases := map[string]struct{ own, host, want string }{
		"vm.overcommit_memory":        {"0", "0", "1"}, // what the guest has is no measure
		"vm.overcommit_ratio":         {"50", "80", "80"},
		"vm.max_map_count":            {"65530", "262144", "262144"},
		"kernel.threads-max":          {"3604", "192730", "192730"},
		"fs.nr_open":                  {"1048576", "524288", "1048576"},
		"fs.file-max":                 {"18446744073709551615", "100", "9223372036854775807"},
		"fs.pipe-user-pages-soft":     {"16384", "0", "0"},
		"fs.pipe-user-pages-hard":     {"0", "100", "0"},
		"fs.protected_symlinks":       {"1", "0", "0"},
		"kernel.perf_event_paranoid":  {"3", "-1", "-1"},
		"kernel.core_pattern":         {"core", "/var/crash/core.%p", "/var/crash/core.%p"},
		"net.ipv4.tcp_rmem":           {"4096\t131072\t3658112", "2048 262144 33554432", "4096 262144 33554432"},
		"fs.inotify.max_user_watches": {"8192", "192536", "192536"},
	}
	values := map[string]string{"net.netfilter.nf_conntrack_max": "262144"}
	for key, c := range cases {
		write(t, file(key), c.own+"\n")
		values[key] = c.host
	}
	failed, err := boot.SetParametersIn(dir, later, values)
	assert.NilError(t, err)
	assert.NilError(t, failed)
	read := func(key string) string {
		data, err := os.ReadFile(file(key))
		assert.NilError(t, err)
		return strings.TrimSpace(string(data))
	}
	for key, c := range cases {
		assert.Equal(t, read(key), c.want, key)
	}

	// A module brings a parameter.
	write(t, file("net.netfilter.nf_conntrack_max"), "4096\n")
	assert.NilError(t, boot.SetLaterParametersIn(dir, later))
	assert.Equal(t, read("net.netfilter.nf_conntrack_max"), "262144")
	assert.NilError(t, boot.SetLaterParametersIn(dir, filepath.Join(dir, "none")))

	for key, value := range map[string]string{
		"kernel.modprobe": "/bin/sh", "../x": "1", "vm.overcommit_memory": "3", "vm.max_map_count": "-1", "net.ipv4.tcp_rmem": "1 2",
		"kernel.core_pattern": "|/bin/sh", "kernel.threads-max": "many", "fs.nr_open": "9223372036854775807",
	} {
		_, err := boot.SetParametersIn(dir, later, map[string]string{key: value, "vm.overcommit_ratio": "10"})
		assert.ErrorContains(t, err, "kernel parameter", "%s=%s", key, value)
		assert.Equal(t, read("vm.overcommit_ratio"), "80", "after %s=%s", key, value)
	}
}

func FuzzParameters(f *testing.F) {
	f.Add("vm.overcommit_memory", "0", "1")
	f.Add("net.ipv4.tcp_rmem", "1 2 3", "3 2 1")
	f.Add("kernel.core_pattern", "core", "/core.%p")
	keys := slices.Sorted(maps.Keys(boot.Parameters))
	for _, key := range keys {
		f.Add(key, "1", "18446744073709551616")
	}
	f.Fuzz(func(t *testing.T, key, own, host string) {
		p, ok := boot.Parameters[key]
		if !ok || p.Check(host) != nil {
			return
		}
		value, err := p.Merge(own, host)
		assert.NilError(t, err)
		assert.Assert(t, !strings.ContainsAny(value, "\n\x00|@"), "%q", value)
	})
}
