package guest

import (
	"io"
	"os"
	"testing"

	"gotest.tools/v3/assert"
)

func TestChannelJoinsHeaderAndBody(t *testing.T) {
	r, w, err := os.Pipe()
	assert.NilError(t, err)
	c := &channel{File: w}
	data := []byte{0, typeData, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3}
	closing := []byte{0, typeData, 0, 4, 0, 0, 0, 1, 0, 0, 0, 0}
	update := []byte{0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0}
	var want []byte
	for _, p := range [][]byte{data, []byte("abc"), closing, update, data, []byte("def")} {
		n, err := c.Write(p)
		assert.NilError(t, err)
		assert.Equal(t, n, len(p))
		want = append(want, p...)
	}
	assert.NilError(t, w.Close())
	got, err := io.ReadAll(r)
	assert.NilError(t, err)
	assert.DeepEqual(t, got, want)
}
