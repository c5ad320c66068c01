package sharefs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/sharefs"
)

// The upper directory of an overlay can be on a share, with attributes of users'.
func TestOverlayOnShare(t *testing.T) {
	root := t.TempDir()
	v := "v" + sharefs.CoherentSuffix
	for _, d := range []string{"l", "u", "w"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(root, v, d), 0o755))
	}
	assert.NilError(t, os.WriteFile(filepath.Join(root, v, "l/f"), []byte("low"), 0o644))
	mounted, _ := share(t, root, defaults())
	m := filepath.Join(mounted, v)
	at := t.TempDir()
	assert.NilError(t, unix.Mount("overlay", at, "overlay", 0, fmt.Sprintf("userxattr,lowerdir=%s/l,upperdir=%s/u,workdir=%s/w", m, m, m)))
	defer func() { assert.NilError(t, unix.Unmount(at, 0)) }()
	f, err := os.OpenFile(at+"/f", os.O_APPEND|os.O_WRONLY, 0)
	assert.NilError(t, err)
	_, err = f.WriteString("up")
	assert.NilError(t, err)
	assert.NilError(t, f.Close())
	for range 2 {
		read(t, at+"/f", "lowup")
	}
	read(t, filepath.Join(root, v, "u/f"), "lowup")
	assert.NilError(t, os.Remove(at+"/f"))
	_, err = os.Stat(at + "/f")
	assert.ErrorIs(t, err, os.ErrNotExist)
}
