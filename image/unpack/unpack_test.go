package unpack_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"os/exec"
	"testing"

	"gotest.tools/v3/assert"

	"runv/image/imagetest"
	"runv/image/unpack"
)

var content = bytes.Repeat([]byte("some kernel "), 1000)

func sized(data []byte) []byte {
	return binary.LittleEndian.AppendUint32(data, uint32(len(content)))
}

func gzipped(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(content)
	assert.NilError(t, err)
	assert.NilError(t, w.Close())
	return b.Bytes()
}

func TestPayload(t *testing.T) {
	for name, data := range map[string][]byte{"gzip": gzipped(t), "lz4": imagetest.LZ4(t, content)} {
		t.Run(name, func(t *testing.T) {
			got, err := unpack.Payload(t.Context(), data)
			assert.NilError(t, err)
			assert.Assert(t, bytes.Equal(got, content))
		})
	}
}

func TestPayloadWithTool(t *testing.T) {
	for _, name := range []string{"xz", "zstd"} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(name)
			if err != nil {
				t.Skipf("%s is not installed", name)
			}
			cmd := exec.CommandContext(t.Context(), path, "-c")
			cmd.Stdin = bytes.NewReader(content)
			data, err := cmd.Output()
			assert.NilError(t, err)
			got, err := unpack.Payload(t.Context(), sized(data))
			assert.NilError(t, err)
			assert.Assert(t, bytes.Equal(got, content))
			_, err = unpack.File(t.Context(), data[:len(data)/2])
			assert.ErrorContains(t, err, "decompress "+name+" data: "+name)
		})
	}
}

func TestPayloadRefuses(t *testing.T) {
	good := imagetest.LZ4(t, content)
	wrongSize := append(bytes.Clone(good[:len(good)-4]), 1, 2, 3, 4)
	wrongBlock := bytes.Clone(good)
	binary.LittleEndian.PutUint32(wrongBlock[4:], 1<<31)
	for name, test := range map[string]struct {
		data []byte
		want string
	}{
		"nothing":                {nil, "unknown compression"},
		"no compression":         {[]byte("\x7fELF and so on"), "the data begins with 7f 45 4c 46"},
		"an unsupported one":     {[]byte("BZh91AY and so on"), "bzip2 compression is not supported"},
		"too short":              {good[:6], "ends too early"},
		"another size":           {wrongSize, "bytes where 67305985 were announced"},
		"a block beyond the end": {wrongBlock, "decompress lz4 data: unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := unpack.Payload(t.Context(), test.data)
			assert.ErrorContains(t, err, test.want)
		})
	}
}
