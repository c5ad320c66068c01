package resolver

import (
	"bytes"
	"testing"

	"gotest.tools/v3/assert"
)

func FuzzReadFrame(f *testing.F) {
	f.Add(frame{protocol: overUDP, number: 7, message: []byte("query")}.encode())
	f.Add([]byte{overTCP, 0, 0, 0, 1, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := readFrame(bytes.NewReader(data))
		if err == nil {
			assert.DeepEqual(t, got.encode(), data[:headerSize+len(got.message)])
		}
	})
}
