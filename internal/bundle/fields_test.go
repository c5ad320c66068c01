package bundle_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

// A newer runtime-spec must not bring fields that nobody decided about, and the
// table must not speak of fields that are not there.
func TestTableIsComplete(t *testing.T) {
	table := map[string]bool{} // path: found
	for _, f := range bundle.Fields() {
		_, twice := table[f.Path]
		assert.Assert(t, !twice, "%s is in the table twice", f.Path)
		table[f.Path] = false
	}
	var walk func(typ reflect.Type, path string)
	walk = func(typ reflect.Type, path string) {
		if _, ok := table[path]; ok {
			table[path] = true
			return
		}
		switch typ.Kind() {
		case reflect.Pointer:
			walk(typ.Elem(), path)
		case reflect.Slice:
			walk(typ.Elem(), path+"[]")
		case reflect.Struct:
			for f := range typ.Fields() {
				name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
				if f.Anonymous && name == "" {
					walk(f.Type, path)
					continue
				}
				walk(f.Type, strings.TrimPrefix(path+"."+name, "."))
			}
		default:
			t.Errorf("%s is not in the table", path)
		}
	}
	walk(reflect.TypeFor[specs.Spec](), "")
	for path, found := range table {
		assert.Assert(t, found, "%s is no field of the runtime-spec", path)
	}
}

func TestMountOptions(t *testing.T) {
	options := bundle.MountOptions()
	assert.Assert(t, slices.IsSorted(options))
	for _, o := range []string{"ro", "rbind", "rslave", "rro", "tmpcopyup", "rshared", "idmap", "ridmap"} {
		assert.Assert(t, slices.Contains(options, o))
	}
	assert.Assert(t, !slices.Contains(options, "size"))
}
