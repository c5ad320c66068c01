package stage_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"

	"runv/internal/guest/fault"
	"runv/internal/guest/stage"
)

// fill sets every field to something else than zero, so that the test fails for a
// field that the codec forgets.
func fill(v reflect.Value, n *uint64) {
	*n++
	switch v.Kind() {
	case reflect.Struct:
		for _, field := range v.Fields() {
			fill(field, n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n)
		fill(v.Index(1), n)
	case reflect.String:
		v.SetString(fmt.Sprint("text", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32:
		v.SetInt(-int64(*n))
	case reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		v.SetUint(*n)
	default:
		panic(v.Kind())
	}
}

func full() *stage.Config {
	cfg := &stage.Config{}
	var n uint64
	fill(reflect.ValueOf(cfg).Elem(), &n)
	return cfg
}

func TestCodec(t *testing.T) {
	for name, cfg := range map[string]*stage.Config{"full": full(), "empty": {}} {
		t.Run(name, func(t *testing.T) {
			got, err := stage.Decode(cfg.Encode())
			assert.NilError(t, err)
			assert.Equal(t, cmp.Diff(cfg, got), "")
		})
	}
}

func TestDecodeTruncated(t *testing.T) {
	data := full().Encode()
	for n := range data {
		_, err := stage.Decode(data[:n])
		assert.ErrorContains(t, err, "truncated")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(full().Encode())
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = stage.Decode(data) })
}

func TestReply(t *testing.T) {
	assert.NilError(t, stage.DecodeReply(stage.EncodeReply(nil)))
	err := stage.DecodeReply(stage.EncodeReply(fault.New(errdefs.ErrNotFound, "exec: %q: %w", "x", errors.New("gone"))))
	assert.Error(t, err, `exec: "x": gone`)
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	err = stage.DecodeReply(stage.EncodeReply(errors.New(strings.Repeat("x", 1<<20))))
	assert.ErrorIs(t, err, errdefs.ErrInternal)
	assert.Assert(t, len(err.Error()) < 16<<10)
}
