package bundle_test

import (
	"fmt"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

// What Parse accepts can be translated for the guest, and that is a valid
// configuration in turn, whose translation changes nothing any more.
func FuzzParse(f *testing.F) {
	f.Add(encode(f, bundle.DefaultSpec()))
	f.Add(with(f, "mounts[7]", `{"destination":"x","type":"none","source":"a","options":["rbind","ro"]}`))
	f.Add(with(f, "linux.resources", `{"cpu":{"quota":1},"memory":{"limit":1},"unified":{}}`))
	f.Add(with(f, "process.capabilities", `{"bounding":["CAP_FLY","<\u2028>"]}`))
	f.Add([]byte(`{"ociVersion":"1.0.0"`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := bundle.Parse(data, "/bundle")
		if err != nil {
			return
		}
		b.Size()
		translate := func(b *bundle.Bundle) []byte {
			sources := map[int]string{}
			for _, bind := range b.Binds() {
				sources[bind.Index] = fmt.Sprint("/guest/", bind.Index)
			}
			out, err := b.GuestSpec("/guest/rootfs", sources)
			assert.NilError(t, err)
			return out
		}
		first := translate(b)
		again, err := bundle.Parse(first, "/")
		assert.NilError(t, err)
		assert.Equal(t, string(translate(again)), string(first))
	})
}

func FuzzParseProcess(f *testing.F) {
	f.Add([]byte(`{"args":["true"],"cwd":"/","env":["A=b"],"user":{"uid":1,"gid":1},"rlimits":[{"type":"RLIMIT_CPU"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := bundle.ParseProcess(data)
		if err != nil {
			return
		}
		out, err := bundle.GuestProcess(p)
		if err != nil {
			return
		}
		_, err = bundle.ParseProcess(out)
		assert.NilError(t, err)
	})
}
