package stage_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/internal/guest/stage"
)

func TestEnv(t *testing.T) {
	assert.DeepEqual(t, stage.Env([]string{"A=1", "B=2", "A=3", "HOME=/x"}, 0), []string{"A=3", "B=2", "HOME=/x"})
	assert.DeepEqual(t, stage.Env([]string{"HOME=", "A=1"}, 0), []string{"HOME=/root", "A=1"})
	assert.DeepEqual(t, stage.Env(nil, 4294967294), []string{"HOME=/"})
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	for _, d := range []string{first, second} {
		assert.NilError(t, os.Mkdir(d, 0o755))
	}
	assert.NilError(t, os.WriteFile(filepath.Join(first, "data"), nil, 0o644))
	assert.NilError(t, os.WriteFile(filepath.Join(second, "program"), nil, 0o755))
	assert.NilError(t, os.Mkdir(filepath.Join(first, "program"), 0o755))
	env := []string{"A=1", "PATH=" + first + ":" + second}

	path, err := stage.LookPath("program", env)
	assert.NilError(t, err)
	assert.Equal(t, path, filepath.Join(second, "program"))
	path, err = stage.LookPath(path, nil)
	assert.NilError(t, err)
	assert.Equal(t, path, filepath.Join(second, "program"))

	_, err = stage.LookPath("data", env)
	assert.Error(t, err, `exec: "data": permission denied`)
	assert.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	_, err = stage.LookPath("program", nil)
	assert.Error(t, err, `exec: "program": executable file not found in $PATH`)
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = stage.LookPath(dir, env)
	assert.ErrorIs(t, err, errdefs.ErrPermissionDenied)
}
