package manifest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"runv/image/manifest"
)

func TestLoadRefuses(t *testing.T) {
	dir := t.TempDir()
	_, err := manifest.Load(dir)
	assert.ErrorIs(t, err, os.ErrNotExist)
	for name, test := range map[string]struct{ content, want string }{
		"no JSON":         {"{", "unexpected end"},
		"another version": {`{"version": 2}`, "version 2, this program knows 1"},
		"too long":        {strings.Repeat(" ", 1<<20+1), "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.NilError(t, os.WriteFile(filepath.Join(dir, manifest.ManifestFile), []byte(test.content), 0o644))
			_, err := manifest.Load(dir)
			assert.ErrorContains(t, err, test.want)
		})
	}
}
