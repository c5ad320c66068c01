package kmod_test

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/image/imagetest"
	"runv/image/kmod"
)

// tree writes a module tree and opens it.
func tree(t *testing.T, builtin string, files map[string][]byte) *kmod.Tree {
	t.Helper()
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte(builtin), 0o644))
	for name, content := range files {
		path := filepath.Join(dir, name)
		assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		assert.NilError(t, os.WriteFile(path, content, 0o644))
	}
	opened, err := kmod.Open(dir)
	assert.NilError(t, err)
	return opened
}

func names(modules []kmod.Module) []string {
	var out []string
	for _, m := range modules {
		out = append(out, m.Name)
	}
	return out
}

func TestResolveOrdersDependenciesFirst(t *testing.T) {
	modules := tree(t, "kernel/fs/ext4.ko\n", map[string][]byte{
		"kernel/a/ring.ko":       imagetest.Module(t, "depends="),
		"kernel/a/virtio.ko":     imagetest.Module(t, "license=GPL", "depends=ring"),
		"kernel/a/virtio-rng.ko": imagetest.Module(t, "depends=virtio,ring,ext4", "alias=rng-1", "alias=virtio:d*"),
		"kernel/b/net.ko":        imagetest.Module(t, "depends=virtio", "softdep=pre: crc-fast missing post: later"),
		"kernel/b/crc_fast.ko":   imagetest.Module(t, "depends="),
		"kernel/b/later.ko":      imagetest.Module(t, "depends="),
	})
	loaded := map[string]bool{}
	early, err := modules.Resolve(t.Context(), []string{"virtio_rng", "ext4"}, loaded)
	assert.NilError(t, err)
	assert.Check(t, is.DeepEqual(names(early), []string{"ring", "virtio", "virtio_rng"}))
	assert.Check(t, is.Equal(early[2].Path, "kernel/a/virtio-rng.ko"))
	assert.Check(t, is.DeepEqual(early[2].Needs, []string{"virtio", "ring"}))
	assert.Check(t, is.DeepEqual(early[2].Aliases, []string{"rng-1"}))

	late, err := modules.Resolve(t.Context(), []string{"virtio", "net"}, loaded)
	assert.NilError(t, err)
	assert.Check(t, is.DeepEqual(names(late), []string{"crc_fast", "net"}), "what the first list loads must not come again")
}

func TestResolveRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string][]byte
		want  string
	}{
		"a missing module":     {map[string][]byte{}, "find kernel module a: neither built in nor in"},
		"a missing dependency": {map[string][]byte{"a.ko": imagetest.Module(t, "depends=b")}, "for kernel module a: find kernel module b"},
		"a circle": {
			map[string][]byte{"a.ko": imagetest.Module(t, "depends=b"), "b.ko": imagetest.Module(t, "depends=a")},
			"a needs itself",
		},
		"no ELF file": {map[string][]byte{"a.ko": []byte("#!")}, "read kernel module a"},
		"no modinfo":  {map[string][]byte{"a.ko": imagetest.Vmlinux(t, "6.1.0", 18)}, "no .modinfo section"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tree(t, "", test.files).Resolve(t.Context(), []string{"a"}, map[string]bool{})
			assert.ErrorContains(t, err, test.want)
		})
	}
}

func TestResolveUnpacks(t *testing.T) {
	module := imagetest.Module(t, "depends=")
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(module)
	assert.NilError(t, err)
	assert.NilError(t, w.Close())
	got, err := tree(t, "", map[string][]byte{"kernel/a.ko.gz": packed.Bytes()}).Resolve(t.Context(), []string{"a"}, map[string]bool{})
	assert.NilError(t, err)
	want, err := kmod.Slim(module)
	assert.NilError(t, err)
	assert.Check(t, is.DeepEqual(got, []kmod.Module{{Name: "a", Path: "kernel/a.ko", Data: want}}))
}

func TestSlim(t *testing.T) {
	module := imagetest.Module(t, "depends=")
	plain, err := kmod.Slim(module)
	assert.NilError(t, err)
	assert.Check(t, is.Len(plain, len(module)))
	f, err := elf.NewFile(bytes.NewReader(plain))
	assert.NilError(t, err)
	assert.Check(t, f.Section(".BTF") == nil, "type information is still there")
	assert.Check(t, f.Section(".modinfo") != nil)
	assert.Check(t, is.Equal(f.Sections[2].Flags, elf.SectionFlag(0)), "type information must not be loaded")

	signed, err := kmod.Slim(imagetest.Signed(module))
	assert.NilError(t, err)
	assert.Check(t, bytes.Equal(signed, plain), "the signature is still there")
}

func TestSlimKeepsWhatIsNoSignature(t *testing.T) {
	module := imagetest.Module(t, "depends=")
	// A length that points before the file's begin.
	broken := append(bytes.Clone(module), "\x00\x00\x00\x00\x00\x00\x00\x00\x7f\xff\xff\xff~Module signature appended~\n"...)
	got, err := kmod.Slim(broken)
	assert.NilError(t, err)
	assert.Check(t, is.Len(got, len(broken)))
}

func FuzzSlim(f *testing.F) {
	f.Add(imagetest.Module(f, "depends="))
	f.Add(imagetest.Signed(imagetest.Module(f, "depends=a,b")))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _ = kmod.Slim(data)
	})
}
