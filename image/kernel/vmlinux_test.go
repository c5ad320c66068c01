package kernel_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"gotest.tools/v3/assert"

	"runv/image/imagetest"
	"runv/image/kernel"
)

func TestExtractVmlinux(t *testing.T) {
	want := padded(imagetest.Vmlinux(t, release, 18))
	got, err := kernel.ExtractVmlinux(t.Context(), imagetest.BzImage(imagetest.LZ4(t, want)))
	assert.NilError(t, err)
	assert.Assert(t, bytes.Equal(got, want))
}

func TestExtractVmlinuxRefuses(t *testing.T) {
	good := imagetest.BzImage(imagetest.LZ4(t, padded(nil)))
	change := func(f func(image []byte)) []byte {
		image := bytes.Clone(good)
		f(image)
		return image
	}
	for name, test := range map[string]struct {
		image []byte
		want  string
	}{
		"an empty file":           {nil, "not a bzImage"},
		"another file":            {bytes.Repeat([]byte("x"), 4096), "not a bzImage"},
		"an old protocol":         {change(func(b []byte) { b[0x206] = 0x05 }), "boot protocol 2.05 is too old"},
		"a payload out of bounds": {change(func(b []byte) { binary.LittleEndian.PutUint32(b[0x24c:], 1<<31) }), "ends before its payload"},
		"an offset out of bounds": {change(func(b []byte) { binary.LittleEndian.PutUint32(b[0x248:], 1<<32-1) }), "ends before its payload"},
		"no compression":          {imagetest.BzImage([]byte("plain text")), "unknown compression"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kernel.ExtractVmlinux(t.Context(), test.image)
			assert.ErrorContains(t, err, test.want)
		})
	}
}

func TestCheckVmlinux(t *testing.T) {
	assert.NilError(t, kernel.CheckVmlinux(imagetest.Vmlinux(t, release, 18)))
	assert.ErrorContains(t, kernel.CheckVmlinux(imagetest.Vmlinux(t, release, 17)), "no PVH entry point")
	assert.ErrorContains(t, kernel.CheckVmlinux(imagetest.Module(t, "depends=")), "want an x86-64 program")
	assert.ErrorContains(t, kernel.CheckVmlinux([]byte("MZ")), "check vmlinux")
}

func TestReleaseNeedsBanner(t *testing.T) {
	_, err := kernel.Release([]byte("Linux version unknown"))
	assert.ErrorContains(t, err, "no version banner")
}

func FuzzCheckVmlinux(f *testing.F) {
	f.Add(imagetest.Vmlinux(f, release, 18))
	f.Add(imagetest.Vmlinux(f, release, 1))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = kernel.CheckVmlinux(data)
	})
}
