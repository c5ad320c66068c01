package bundle_test

import (
	"os"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

func TestMountPointsAreThoseOfTheRootItself(t *testing.T) {
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	spec := bundle.DefaultSpec()
	spec.Process.Cwd = "/job/here"
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/etc/hosts", Source: "file", Type: "bind", Options: []string{"bind"}},
		specs.Mount{Destination: "/data", Source: dir, Type: "bind", Options: []string{"rbind"}},
		specs.Mount{Destination: "/data/sub", Source: dir, Type: "bind", Options: []string{"rbind"}},
	)
	b := &bundle.Bundle{Dir: dir, Spec: spec}
	assert.DeepEqual(t, b.MountPoints(), []bundle.MountPoint{
		{Path: "/proc"}, {Path: "/dev"}, {Path: "/sys"}, {Path: "/etc/hosts", File: true}, {Path: "/data"}, {Path: "/job/here"},
	})
}
