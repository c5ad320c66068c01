package initramfs_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/image/initramfs"
)

// fill adds the same entries in one of two orders.
func fill(t *testing.T, backwards bool) *initramfs.Archive {
	t.Helper()
	var a initramfs.Archive
	steps := []func() error{
		func() error { return a.File("/init", 0o755, []byte("agent")) },
		func() error { return a.Directory("tmp", 0o1777) },
		func() error { return a.CharDevice("dev/console", 0o600, 5, 1) },
		func() error { return a.File("/lib/modules/6.1/fuse.ko", 0o644, []byte("module")) },
	}
	for i := range steps {
		if backwards {
			i = len(steps) - 1 - i
		}
		assert.NilError(t, steps[i]())
	}
	return &a
}

func write(t *testing.T, a *initramfs.Archive) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := a.WriteTo(&b)
	assert.NilError(t, err)
	assert.Check(t, is.Equal(n, int64(b.Len())))
	return b.Bytes()
}

func TestSameContentSameBytes(t *testing.T) {
	assert.Assert(t, bytes.Equal(write(t, fill(t, false)), write(t, fill(t, true))))
}

func TestContent(t *testing.T) {
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(write(t, fill(t, false)))))
	assert.NilError(t, err)
	type entry struct {
		Name         string
		Mode         uint64
		Major, Minor uint64
		Content      string
	}
	var got []entry
	for _, r := range records {
		assert.Check(t, is.Equal(r.MTime+r.UID+r.GID, uint64(0)), r.Name)
		e := entry{Name: r.Name, Mode: r.Mode, Major: r.Rmajor, Minor: r.Rminor}
		if r.FileSize > 0 {
			data, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			assert.NilError(t, err)
			e.Content = string(data)
		}
		got = append(got, e)
	}
	assert.Check(t, is.DeepEqual(got, []entry{
		{Name: "dev", Mode: cpio.S_IFDIR | 0o755},
		{Name: "dev/console", Mode: cpio.S_IFCHR | 0o600, Major: 5, Minor: 1},
		{Name: "init", Mode: cpio.S_IFREG | 0o755, Content: "agent"},
		{Name: "lib", Mode: cpio.S_IFDIR | 0o755},
		{Name: "lib/modules", Mode: cpio.S_IFDIR | 0o755},
		{Name: "lib/modules/6.1", Mode: cpio.S_IFDIR | 0o755},
		{Name: "lib/modules/6.1/fuse.ko", Mode: cpio.S_IFREG | 0o644, Content: "module"},
		{Name: "tmp", Mode: cpio.S_IFDIR | 0o1777},
	}))
}

func TestRefusesPaths(t *testing.T) {
	var a initramfs.Archive
	assert.NilError(t, a.File("init", 0o755, nil))
	assert.ErrorContains(t, a.Directory("/init", 0o755), "it is there already")
	assert.ErrorContains(t, a.File("../x", 0o644, nil), "not a path below /")
	assert.ErrorContains(t, a.File("/", 0o644, nil), "not a path below /")

	assert.NilError(t, a.File("init/x", 0o644, nil))
	_, err := a.WriteTo(io.Discard)
	assert.ErrorContains(t, err, "init/x is below init, which is no directory")
}
