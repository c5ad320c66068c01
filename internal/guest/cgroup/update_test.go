package cgroup_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/cgroup"
)

func TestBefore(t *testing.T) {
	for _, c := range []struct{ file, value, old, want string }{
		{"memory.max", "100", "max\n", "max"},
		{"cpu.max", "5 100000", "max 100000\n", "max 100000"},
		{"cpuset.cpus", "0", "\n", "\n"},
		{"io.weight", "5", "default 100\n8:0 7\n", "default 100"},
		{"io.weight", "8:0 5", "default 100\n8:0 7\n", "8:0 7"},
		{"io.weight", "8:1 5", "default 100\n8:0 7\n", "8:1 default"},
		{"io.bfq.weight", "5", "100\n", "100"},
		{"io.max", "8:0 rbps=1", "8:1 rbps=2 wbps=max riops=max wiops=max\n8:0 rbps=3 wbps=max riops=max wiops=max\n", "8:0 rbps=3 wbps=max riops=max wiops=max"},
		{"io.max", "8:0 rbps=1", "\n", "8:0 rbps=max wbps=max riops=max wiops=max"},
		{"rdma.max", "mlx hca_handle=1", "", "mlx hca_handle=max hca_object=max"},
		{"misc.max", "sev 1", "sev 10\nother max\n", "sev 10"},
		{"misc.max", "sev 1", "other max\n", ""},
	} {
		assert.Equal(t, cgroup.Before(c.file, c.value, c.old), c.want, "%s %q", c.file, c.value)
	}
}

func TestWithin(t *testing.T) {
	for _, c := range []struct {
		a, b   string
		within bool
	}{{"0", "0", true}, {"0-2,5", "0-7", true}, {"0-3", "0-1", false}, {"1", "0,2", false}, {"0-1", "0,1", true}} {
		within, ok := cgroup.Within(c.a, c.b)
		assert.Assert(t, ok)
		assert.Equal(t, within, c.within, "%s in %s", c.a, c.b)
	}
	for _, bad := range []string{"", "x", "1-", "2-1", "1,,2", "99999999"} {
		_, ok := cgroup.Within(bad, "0")
		assert.Assert(t, !ok, bad)
	}
}

// An update makes all settings or none. Of the controllers the host of the tests may have none for
// us, so the group's own files are what is set here; the rest is tested in a VM.
func TestUpdateIsAllOrNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for a cgroup")
	}
	mount := t.TempDir()
	assert.NilError(t, unix.Mount("cgroup2", mount, "cgroup2", 0, ""))
	t.Cleanup(func() { assert.Check(t, unix.Unmount(mount, 0)) })
	dir := filepath.Join(mount, filepath.Base(t.TempDir())+"-runvtest")
	hierarchy, err := cgroup.Open(dir)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, os.Remove(dir)) })
	unified := func(files map[string]string) *specs.LinuxResources { return &specs.LinuxResources{Unified: files} }
	r, err := cgroup.Translate(unified(map[string]string{"cgroup.max.depth": "5"}))
	assert.NilError(t, err)
	g, err := hierarchy.Create("web", r, func(uint64) {})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, g.Remove(t.Context())) })
	expect := func(file, want string) {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, "web", file))
		assert.NilError(t, err)
		assert.Equal(t, string(data), want+"\n")
	}
	expect("cgroup.max.depth", "5")

	assert.NilError(t, g.Update(unified(map[string]string{"cgroup.max.descendants": "7"})))
	expect("cgroup.max.depth", "5")
	expect("cgroup.max.descendants", "7")

	err = g.Update(unified(map[string]string{"cgroup.max.depth": "6", "cgroup.max.descendants": "8", "nosuch.max": "1"}))
	assert.Error(t, err, `unified["nosuch.max"]: the guest's kernel has no controller nosuch`)
	assert.ErrorIs(t, err, errdefs.ErrNotImplemented)
	expect("cgroup.max.depth", "5")
	expect("cgroup.max.descendants", "7")

	err = g.Update(unified(map[string]string{"cgroup.max.depth": "6", "cgroup.max.descendants": "many"}))
	assert.ErrorContains(t, err, `unified["cgroup.max.descendants"]: set cgroup.max.descendants to "many"`)
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	expect("cgroup.max.depth", "5")

	_, err = hierarchy.Create("other", must(t, unified(map[string]string{"nosuch.max": "1"})), func(uint64) {})
	assert.ErrorContains(t, err, `linux.resources.unified["nosuch.max"]`)
	_, err = os.Stat(filepath.Join(dir, "other"))
	assert.Assert(t, os.IsNotExist(err))
}

func must(t *testing.T, spec *specs.LinuxResources) *cgroup.Resources {
	t.Helper()
	r, err := cgroup.Translate(spec)
	assert.NilError(t, err)
	return r
}
