package kernel_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/image/imagetest"
	"runv/image/kernel"
)

const release = "6.1.0-9-cloud-amd64"

// archive is a Repository with one kernel package.
type archive struct {
	t        *testing.T
	stale    bool // until the lists are updated
	offline  bool
	damaged  bool
	shown    int
	updates  int
	download int
}

const packageFile = "the package"

func (a *archive) Show(_ context.Context, pkg string) (map[string]string, error) {
	a.shown++
	if a.stale {
		return nil, errors.New("find package " + pkg + ": no packages found")
	}
	if pkg == "linux-image-cloud-amd64" {
		return map[string]string{"Depends": "linux-base, linux-image-" + release + " (= 6.1.9-1)"}, nil
	}
	assert.Equal(a.t, pkg, "linux-image-"+release)
	sum := sha256.Sum256([]byte(packageFile))
	return map[string]string{"Version": "6.1.9-1", "SHA256": hex.EncodeToString(sum[:]), "Depends": "kmod"}, nil
}

func (a *archive) Update(context.Context) error {
	a.updates++
	if a.offline {
		return errors.New("update the lists of packages: no network")
	}
	a.stale = false
	return nil
}

func (a *archive) Download(_ context.Context, pkg, version, dir string) error {
	a.download++
	assert.Equal(a.t, pkg+"="+version, "linux-image-"+release+"=6.1.9-1")
	content := packageFile
	if a.damaged {
		content = "something else"
	}
	return os.WriteFile(filepath.Join(dir, "linux-image_6.1.9-1_amd64.deb"), []byte(content), 0o644)
}

func (a *archive) Unpack(_ context.Context, _, dir string) error {
	image := imagetest.BzImage(imagetest.LZ4(a.t, padded(imagetest.Vmlinux(a.t, release, 18))))
	modules := "lib/modules/" + release + "/"
	for name, content := range map[string][]byte{
		"boot/vmlinuz-" + release:                       image,
		modules + "modules.builtin":                     []byte("kernel/fs/ext4.ko\n"),
		modules + "kernel/drivers/virtio/virtio.ko":     imagetest.Signed(imagetest.Module(a.t, "depends=")),
		modules + "kernel/drivers/virtio/virtio_pci.ko": imagetest.Module(a.t, "depends=virtio"),
		modules + "kernel/fs/fuse/virtiofs.ko":          imagetest.Module(a.t, "depends=virtio,fuse"),
		modules + "kernel/fs/fuse/fuse.ko":              imagetest.Module(a.t, "depends="),
	} {
		path := filepath.Join(dir, name)
		assert.NilError(a.t, os.MkdirAll(filepath.Dir(path), 0o755))
		assert.NilError(a.t, os.WriteFile(path, content, 0o644))
	}
	return nil
}

// padded makes content that compresses.
func padded(content []byte) []byte { return append(content, make([]byte, 4096)...) }

func describe(t *testing.T, text string) *kernel.Description {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kernel.toml")
	assert.NilError(t, os.WriteFile(path, []byte(text), 0o644))
	d, err := kernel.ReadDescription(path)
	assert.NilError(t, err)
	return d
}

const debian = `
name = "debian"
arch = "amd64"
[debian-package]
package = "linux-image-cloud-amd64"
[modules]
early = ["virtio_pci", "ext4"]
late = ["virtiofs"]
`

func maker(t *testing.T, repo kernel.Repository) *kernel.Maker {
	t.Helper()
	return &kernel.Maker{Cache: t.TempDir(), Builder: "b1", Repository: repo, Log: slog.New(slog.DiscardHandler)}
}

func moduleNames(modules []kernel.Module) string {
	var names []string
	for _, m := range modules {
		names = append(names, m.Name)
	}
	return strings.Join(names, " ")
}

func TestMakeFromPackage(t *testing.T) {
	repo := &archive{t: t}
	m := maker(t, repo)
	d := describe(t, debian)
	k, err := m.Make(t.Context(), d)
	assert.NilError(t, err)
	assert.Check(t, is.Equal(k.Release, release))
	assert.Check(t, is.Equal(k.Package+"="+k.Version, "linux-image-"+release+"=6.1.9-1"))
	assert.Check(t, is.Equal(moduleNames(k.Early), "virtio virtio_pci"))
	assert.Check(t, is.Equal(moduleNames(k.Late), "fuse virtiofs"))
	assert.Check(t, is.Equal(k.Early[1].Path, "/lib/modules/"+release+"/kernel/drivers/virtio/virtio_pci.ko"))
	data, err := os.ReadFile(k.ModuleFile(k.Early[0]))
	assert.NilError(t, err)
	assert.Check(t, !bytes.Contains(data, []byte("signature")))
	vmlinux, err := os.ReadFile(k.Vmlinux())
	assert.NilError(t, err)
	assert.Check(t, kernel.CheckVmlinux(vmlinux))

	shown := repo.shown
	again, err := m.Make(t.Context(), d)
	assert.NilError(t, err)
	assert.Check(t, is.Equal(again.Vmlinux(), k.Vmlinux()))
	assert.Check(t, is.DeepEqual(again.Late, k.Late))
	assert.Check(t, is.Equal(repo.shown, shown), "a kernel in the cache needs no look at the packages")

	m.Builder = "b2"
	_, err = m.Make(t.Context(), d)
	assert.NilError(t, err)
	assert.Check(t, repo.shown > shown, "another builder must make the kernel anew")
	assert.Check(t, is.Equal(repo.download, 1), "the package is in the cache")
	left, err := filepath.Glob(filepath.Join(m.Cache, ".tmp-*"))
	assert.NilError(t, err)
	assert.Check(t, is.Len(left, 0))
}

func TestMakeUpdatesStaleLists(t *testing.T) {
	repo := &archive{t: t, stale: true}
	_, err := maker(t, repo).Make(t.Context(), describe(t, debian))
	assert.NilError(t, err)
	assert.Check(t, is.Equal(repo.updates, 1))
}

func TestMakeReportsBothCauses(t *testing.T) {
	repo := &archive{t: t, stale: true, offline: true}
	_, err := maker(t, repo).Make(t.Context(), describe(t, debian))
	assert.ErrorContains(t, err, "kernel debian: find package linux-image-cloud-amd64: no packages found")
	assert.ErrorContains(t, err, "no network")
}

func TestMakeRefusesDamagedPackage(t *testing.T) {
	repo := &archive{t: t, damaged: true}
	m := maker(t, repo)
	_, err := m.Make(t.Context(), describe(t, debian))
	assert.ErrorContains(t, err, "announced was")
	entries, err := os.ReadDir(m.Cache)
	assert.NilError(t, err)
	assert.Check(t, is.Len(entries, 0), "nothing may stay in the cache")
}

func TestMakeFromFiles(t *testing.T) {
	dir := t.TempDir()
	vmlinux := filepath.Join(dir, "vmlinux")
	assert.NilError(t, os.WriteFile(vmlinux, imagetest.Vmlinux(t, "6.12.1-own", 18), 0o644))
	path := filepath.Join(dir, "own.toml")
	assert.NilError(t, os.WriteFile(path, []byte("name = 'own'\narch = 'amd64'\n[files]\nvmlinux = 'vmlinux'\n"), 0o644))
	d, err := kernel.ReadDescription(path)
	assert.NilError(t, err)
	m := maker(t, nil)
	k, err := m.Make(t.Context(), d)
	assert.NilError(t, err)
	assert.Check(t, is.Equal(k.Release, "6.12.1-own"))
	assert.Check(t, is.Len(append(k.Early, k.Late...), 0))

	assert.NilError(t, os.WriteFile(vmlinux, imagetest.Vmlinux(t, "6.12.2-own", 18), 0o644))
	k, err = m.Make(t.Context(), d)
	assert.NilError(t, err)
	assert.Check(t, is.Equal(k.Release, "6.12.2-own"), "a kernel that changed must be taken anew")
}

func TestDescriptionRefuses(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"an unknown key":         {debian + "[extra]\n", "unknown key"},
		"no source":              {"name = 'x'\narch = 'amd64'\n", "give either"},
		"two sources":            {debian + "[files]\nvmlinux = 'x'\n", "give either"},
		"a name that is a path":  {strings.Replace(debian, `"debian"`, `"../x"`, 1), "name:"},
		"another architecture":   {strings.Replace(debian, "amd64", "riscv64", 1), "arch:"},
		"an option as a package": {strings.Replace(debian, `"linux-image-cloud-amd64"`, `"--help"`, 1), "debian-package.package:"},
		"no vmlinux":             {"name = 'x'\narch = 'amd64'\n[files]\n", "files.vmlinux:"},
		"modules without a tree": {"name = 'x'\narch = 'amd64'\n[files]\nvmlinux = 'v'\n[modules]\nlate = ['a']\n", "files.module-tree:"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kernel.toml")
			assert.NilError(t, os.WriteFile(path, []byte(test.text), 0o644))
			_, err := kernel.ReadDescription(path)
			assert.ErrorContains(t, err, test.want)
		})
	}
}

func TestDescriptionsOfTheProject(t *testing.T) {
	paths, err := filepath.Glob("../kernels/*.toml")
	assert.NilError(t, err)
	assert.Assert(t, len(paths) > 0)
	for _, path := range paths {
		d, err := kernel.ReadDescription(path)
		assert.NilError(t, err)
		assert.Check(t, is.Equal(d.Name+".toml", filepath.Base(path)))
	}
}
