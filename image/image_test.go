package image_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/image"
	"runv/image/imagetest"
	"runv/image/kernel"
	"runv/image/manifest"
)

// inputs makes a kernel with modules, its description and an agent.
func inputs(t *testing.T) image.Config {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"vmlinux":                  imagetest.Vmlinux(t, "6.1.0-own", 18),
		"modules/modules.builtin":  []byte("kernel/builtin.ko\n"),
		"modules/kernel/virtio.ko": imagetest.Module(t, "depends="),
		"modules/kernel/port.ko":   imagetest.Module(t, "depends=virtio"),
		"modules/kernel/fuse.ko":   imagetest.Module(t, "depends="),
		"modules/kernel/nat.ko":    imagetest.Module(t, "depends=virtio,builtin", "alias=ip-nat", "alias=pci:*"),
		"agent":                    program(t, "agent"),
		"init":                     program(t, "init"),
		"own.toml": []byte("name = 'own'\narch = 'amd64'\n[files]\nvmlinux = 'vmlinux'\nmodule-tree = 'modules'\n" +
			"[modules]\nearly = ['port']\nlate = ['fuse']\ndemand = ['nat', 'fuse']\n"),
	} {
		path := filepath.Join(dir, name)
		assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		assert.NilError(t, os.WriteFile(path, content, 0o644))
	}
	return image.Config{
		Kernel: filepath.Join(dir, "own.toml"), Agent: filepath.Join(dir, "agent"), Init: filepath.Join(dir, "init"), AgentVersion: "v1",
		Out: filepath.Join(dir, "out"), Cache: filepath.Join(dir, "cache"), Builder: "b", Log: slog.New(slog.DiscardHandler),
	}
}

// program makes something that could pass for a program of the guest.
func program(t *testing.T, name string) []byte {
	t.Helper()
	return imagetest.Vmlinux(t, name, 0)
}

func build(t *testing.T, cfg image.Config) (*manifest.Guest, bool) {
	t.Helper()
	guest, built, err := image.Build(t.Context(), cfg)
	assert.NilError(t, err)
	return guest, built
}

func TestBuildTwiceGivesTheSameBytes(t *testing.T) {
	first, second := inputs(t), inputs(t)
	build(t, first)
	build(t, second)
	for _, name := range []string{manifest.VmlinuxFile, manifest.InitrdFile, manifest.ManifestFile} {
		a, err := os.ReadFile(filepath.Join(first.Out, name))
		assert.NilError(t, err)
		b, err := os.ReadFile(filepath.Join(second.Out, name))
		assert.NilError(t, err)
		assert.Check(t, len(a) > 0 && bytes.Equal(a, b), name)
	}
}

func TestBuildOnlyWhatChanged(t *testing.T) {
	cfg := inputs(t)
	guest, built := build(t, cfg)
	assert.Check(t, built)
	same, built := build(t, cfg)
	assert.Check(t, !built)
	assert.Check(t, is.DeepEqual(same, guest))

	assert.NilError(t, os.WriteFile(cfg.Agent, program(t, "other"), 0o644))
	changed, built := build(t, cfg)
	assert.Check(t, built)
	assert.Check(t, changed.Initrd.SHA256 != guest.Initrd.SHA256)
	assert.Check(t, is.Equal(changed.Vmlinux.SHA256, guest.Vmlinux.SHA256))

	assert.NilError(t, os.Remove(filepath.Join(cfg.Out, manifest.InitrdFile)))
	_, built = build(t, cfg)
	assert.Check(t, built, "a file that is gone must be made again")
}

func TestBuildDescribesTheGuest(t *testing.T) {
	cfg := inputs(t)
	built, _ := build(t, cfg)
	guest, err := manifest.Load(cfg.Out)
	assert.NilError(t, err)
	assert.Check(t, is.DeepEqual(guest, built))
	assert.Check(t, is.DeepEqual(guest.Kernel, manifest.Kernel{
		Name: "own", Release: "6.1.0-own", EarlyModules: []string{"virtio", "port"}, LateModules: []string{"fuse"}, DemandModules: []string{"nat"},
	}))
	assert.Check(t, is.Equal(guest.Agent.Version, "v1"))
	info, err := os.Stat(filepath.Join(cfg.Out, manifest.InitrdFile))
	assert.NilError(t, err)
	assert.Check(t, is.Equal(guest.Initrd.Size, info.Size()))
}

func TestInitrdIsWhatTheAgentExpects(t *testing.T) {
	cfg := inputs(t)
	build(t, cfg)
	data, err := os.ReadFile(filepath.Join(cfg.Out, manifest.InitrdFile))
	assert.NilError(t, err)
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(data)))
	assert.NilError(t, err)
	files := map[string]string{}
	for _, r := range records {
		content := ""
		if r.FileSize > 0 {
			all, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			assert.NilError(t, err)
			content = string(all)
		}
		files["/"+r.Name] = content
	}
	assert.Check(t, is.Equal(files[image.AgentPath], string(program(t, "agent"))))
	assert.Check(t, is.Equal(files[image.InitPath], string(program(t, "init"))))
	assert.Check(t, is.Equal(files[image.EarlyList], "/lib/modules/6.1.0-own/kernel/virtio.ko\n/lib/modules/6.1.0-own/kernel/port.ko\n"))
	assert.Check(t, is.Equal(files[image.LateList], "/lib/modules/6.1.0-own/kernel/fuse.ko\n"))
	assert.Check(t, is.Equal(files[image.ModprobePath], image.AgentPath))
	want := "module virtio /lib/modules/6.1.0-own/kernel/virtio.ko\nmodule port /lib/modules/6.1.0-own/kernel/port.ko virtio\n" +
		"module fuse /lib/modules/6.1.0-own/kernel/fuse.ko\npacked nat 0 %d virtio\nalias ip-nat nat\n"
	assert.Check(t, is.Equal(files[image.DemandList], fmt.Sprintf(want, len(files[image.DemandPack]))))
	z, err := gzip.NewReader(strings.NewReader(files[image.DemandPack]))
	assert.NilError(t, err)
	module, err := io.ReadAll(z)
	assert.NilError(t, err)
	assert.Check(t, is.Contains(string(module), "alias=ip-nat"))
	for _, name := range []string{"/proc", "/sys", "/dev/console", "/run", "/tmp", "/lib/modules/6.1.0-own/kernel/fuse.ko"} {
		_, ok := files[name]
		assert.Check(t, ok, name)
	}
}

func TestBuildNeedsItsInputs(t *testing.T) {
	cfg := inputs(t)
	cfg.Agent = filepath.Join(t.TempDir(), "none")
	_, _, err := image.Build(t.Context(), cfg)
	assert.ErrorContains(t, err, "read the guest's program")
	_, err = os.Stat(filepath.Join(cfg.Out, manifest.ManifestFile))
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestBuildRefusesPrograms(t *testing.T) {
	cfg := inputs(t)
	for name, test := range map[string]struct {
		content []byte
		want    string
	}{
		"a script":          {[]byte("#!/bin/sh"), "read the guest's program"},
		"a dynamic program": {imagetest.Dynamic(t), "dynamically linked: build it with CGO_ENABLED=0"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.NilError(t, os.WriteFile(cfg.Agent, test.content, 0o644))
			_, _, err := image.Build(t.Context(), cfg)
			assert.ErrorContains(t, err, test.want)
		})
	}
}

func TestGuestOfThisTree(t *testing.T) {
	dir := filepath.Join("..", "build", "guest")
	guest, err := manifest.Load(dir)
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("build/guest is not built: run make")
	}
	assert.NilError(t, err)
	vmlinux, err := os.ReadFile(filepath.Join(dir, manifest.VmlinuxFile))
	assert.NilError(t, err)
	assert.Check(t, is.Equal(guest.Vmlinux.Size, int64(len(vmlinux))))
	assert.Check(t, kernel.CheckVmlinux(vmlinux))
	release, err := kernel.Release(vmlinux)
	assert.NilError(t, err)
	assert.Check(t, is.Equal(guest.Kernel.Release, release))
	assert.Check(t, is.Contains(guest.Kernel.EarlyModules, "virtio_console"))
}
