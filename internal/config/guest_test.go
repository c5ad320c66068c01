package config_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/image/manifest"
	"runv/internal/config"
)

// put makes empty files and the directories for them.
func put(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		assert.NilError(t, os.WriteFile(path, nil, 0o755))
	}
}

func effective(t *testing.T, c config.Config) *config.Effective {
	t.Helper()
	clean(t)
	e, err := config.LoadFrom(config.Overrides{GuestDir: c.GuestDir}, "")
	assert.NilError(t, err)
	e.Kernel, e.Initrd = c.Kernel, c.Initrd
	return e
}

func TestGuestBesideTheExecutable(t *testing.T) {
	prefix := t.TempDir()
	exe := filepath.Join(prefix, "bin", "runv")
	build, share := filepath.Join(prefix, "build", "guest"), filepath.Join(prefix, "share", "runv")
	put(t, exe)
	e := effective(t, config.Config{})

	_, err := config.GuestOf(e, exe)
	assert.Error(t, err, "find guest files: "+build+" has no vmlinux, "+share+" has no vmlinux"+
		" (set guest_dir, RUNV_GUEST_DIR or --guest-dir to where they are)")
	assert.Assert(t, errdefs.IsNotFound(err))

	put(t, filepath.Join(share, "vmlinux"), filepath.Join(share, "initrd.cpio"), filepath.Join(build, "vmlinux"))
	g, err := config.GuestOf(e, exe)
	assert.NilError(t, err)
	assert.Equal(t, g, config.Guest{Dir: share, Kernel: filepath.Join(share, "vmlinux"), Initrd: filepath.Join(share, "initrd.cpio")})

	put(t, filepath.Join(build, "initrd.cpio"))
	description := manifest.Guest{Version: manifest.Version, Kernel: manifest.Kernel{Release: "6.1.0-x"}}
	data, err := description.Encode()
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(build, "guest.json"), data, 0o600))
	link := filepath.Join(t.TempDir(), "runv")
	assert.NilError(t, os.Symlink(exe, link))
	g, err = config.GuestOf(e, link)
	assert.NilError(t, err)
	assert.Equal(t, g.Dir, build)
	assert.Equal(t, g.Release, "6.1.0-x")
}

func TestGuestThatIsConfigured(t *testing.T) {
	dir := t.TempDir()
	guest, kernel, initrd := filepath.Join(dir, "guest"), filepath.Join(dir, "my-kernel"), filepath.Join(dir, "my-initrd")

	// A configured place is the only one.
	exe := filepath.Join(dir, "bin", "runv")
	put(t, exe, filepath.Join(dir, "share", "runv", "vmlinux"), filepath.Join(dir, "share", "runv", "initrd.cpio"))
	e := effective(t, config.Config{GuestDir: guest})
	_, err := config.GuestOf(e, exe)
	assert.Error(t, err, "find guest files: "+guest+" has no vmlinux (guest_dir from --guest-dir)")
	put(t, filepath.Join(guest, "vmlinux"))
	_, err = config.GuestOf(e, exe)
	assert.Error(t, err, "find guest files: "+guest+" has no initrd.cpio (guest_dir from --guest-dir)")

	e = effective(t, config.Config{GuestDir: guest, Initrd: initrd})
	_, err = config.GuestOf(e, exe)
	assert.Error(t, err, "find guest files: "+initrd+": no such file (initrd from default)")
	put(t, initrd)
	g, err := config.GuestOf(e, exe)
	assert.NilError(t, err)
	assert.Equal(t, g, config.Guest{Dir: guest, Kernel: filepath.Join(guest, "vmlinux"), Initrd: initrd})

	put(t, kernel)
	e = effective(t, config.Config{GuestDir: filepath.Join(dir, "nowhere"), Kernel: kernel, Initrd: initrd})
	g, err = config.GuestOf(e, exe)
	assert.NilError(t, err)
	assert.Equal(t, g, config.Guest{Kernel: kernel, Initrd: initrd})
}
