package state_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gotest.tools/v3/assert"

	"runv/internal/hostcgroup"
	"runv/internal/state"
)

// filled returns a T in which no field is zero.
func filled[T any]() T {
	var v T
	n := 2
	fill(reflect.ValueOf(&v).Elem(), &n)
	return v
}

func fill(v reflect.Value, n *int) {
	*n++
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Date(2026, 11, 23, 1, 2, 3, *n, time.UTC)))
		return
	case state.Status:
		v.SetString(string(state.Running))
		return
	case hostcgroup.Dir:
		v.Set(reflect.ValueOf(hostcgroup.Dir{Hierarchy: "memory", Path: fmt.Sprint("/text", *n), Inode: uint64(*n)}))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for _, f := range v.Fields() {
			fill(f, n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n)
		fill(v.Index(1), n)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf(fmt.Sprint("key", *n)), reflect.ValueOf(fmt.Sprint("value", *n)))
	case reflect.String:
		v.SetString(fmt.Sprint("text", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
	default:
		panic("fill does not know " + v.Type().String())
	}
}

// tagged checks that each field, also of structs inside, names its key.
func tagged(t *testing.T, typ reflect.Type) {
	t.Helper()
	for f := range typ.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		assert.Assert(t, f.IsExported() && name != "" && name != "-", "%s.%s has no json tag", typ, f.Name)
		ft := f.Type
		for ft.Kind() == reflect.Pointer || ft.Kind() == reflect.Slice {
			ft = ft.Elem()
		}
		if ft.Kind() == reflect.Struct && ft != reflect.TypeFor[time.Time]() {
			tagged(t, ft)
		}
	}
}

func TestEveryFieldSurvives(t *testing.T) {
	tagged(t, reflect.TypeFor[state.Container]())
	tagged(t, reflect.TypeFor[state.Pod]())
	store, err := state.Open(t.TempDir())
	assert.NilError(t, err)

	c := filled[state.Container]()
	assert.NilError(t, store.ReserveContainer(c))
	got, err := store.LoadContainer(c.ID)
	assert.NilError(t, err)
	c.Version = state.Version
	assert.DeepEqual(t, got, c)

	p := filled[state.Pod]()
	assert.NilError(t, store.CreatePod(p))
	gotPod, err := store.LoadPod(p.ID)
	assert.NilError(t, err)
	p.Version = state.Version
	assert.DeepEqual(t, gotPod, p)
}

func TestPhaseIsInMilliseconds(t *testing.T) {
	data, err := json.Marshal(state.Phase{Name: "boot", Duration: 1500 * time.Microsecond})
	assert.NilError(t, err)
	assert.Equal(t, string(data), `{"name":"boot","ms":1.5}`)
}

func TestDecodeRefuses(t *testing.T) {
	good, err := json.Marshal(filledContainer())
	assert.NilError(t, err)
	_, err = state.DecodeContainer(good)
	assert.NilError(t, err)
	goodPod, err := json.Marshal(filledPod())
	assert.NilError(t, err)
	_, err = state.DecodePod(goodPod)
	assert.NilError(t, err)

	change := func(data []byte, key string, value any) string {
		m := map[string]any{}
		assert.NilError(t, json.Unmarshal(data, &m))
		m[key] = value
		out, err := json.Marshal(m)
		assert.NilError(t, err)
		return string(out)
	}
	process := func(pid int) map[string]any { return map[string]any{"pid": pid, "startTime": 1} }
	cgroup := func(path string) map[string]any {
		return map[string]any{"dirs": []any{map[string]any{"path": path}}}
	}
	containers := map[string]string{
		``:                 "EOF",
		`{`:                "EOF",
		`[]`:               "cannot unmarshal",
		`null`:             "version 0",
		string(good) + "x": "after the end",
		strings.Repeat(" ", 16<<20) + string(good): "larger than",
		change(good, "version", 0):                 "version 0",
		change(good, "id", ".."):                   `id ".."`,
		change(good, "id", "a/b"):                  `id "a/b"`,
		change(good, "podId", ""):                  `podId ""`,
		change(good, "status", "sleeping"):         `status "sleeping"`,
		change(good, "exitStatus", 256):            "exitStatus 256",
		change(good, "owner", -1):                  "owner -1",
		change(good, "standIn", process(1)):        "standIn has pid 1",
		change(good, "standIn", process(-5)):       "standIn has pid -5",
		change(good, "creator", process(0)):        "creator has pid 0",
		change(good, "created", nil):               "no created",
		change(good, "cgroup", cgroup("x")):        `directory "x" of a cgroup`,
	}
	for data, want := range containers {
		_, err := state.DecodeContainer([]byte(data))
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsDataLoss(err), "%v", err)
	}
	pods := map[string]string{
		change(goodPod, "id", ""):                                                                       "id",
		change(goodPod, "supervisor", process(1)):                                                       "supervisor has pid 1",
		change(goodPod, "vm", []any{process(7), process(-1)}):                                           "vm[1] has pid -1",
		change(goodPod, "vm", []any{map[string]any{}}):                                                  "vm[0] is no process",
		change(goodPod, "vm", make([]any, 100)):                                                         "100 entries in vm",
		change(goodPod, "phases", make([]any, 1000)):                                                    "1000 entries in phases",
		change(goodPod, "phases", []any{map[string]any{"ms": -1}}):                                      "duration of -1 ms",
		change(goodPod, "vcpus", -1):                                                                    "vcpus -1",
		change(goodPod, "memoryBytes", -1):                                                              "memoryBytes -1",
		change(goodPod, "cgroup", cgroup("/sys/fs/cgroup/../..")):                                       `directory "/sys/fs/cgroup/../.." of a cgroup`,
		change(goodPod, "cgroup", cgroup("x")):                                                          `directory "x" of a cgroup`,
		change(goodPod, "cgroup", map[string]any{"dirs": make([]any, 65)}):                              "65 directories of a cgroup",
		change(goodPod, "cgroup", map[string]any{"unit": map[string]any{}}):                             "unit without a name",
		change(goodPod, "cgroup", map[string]any{"unit": map[string]any{"name": "x", "slice": "../a"}}): `part "../a" of a unit's name`,
	}
	for data, want := range pods {
		_, err := state.DecodePod([]byte(data))
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsDataLoss(err), "%v", err)
	}

	_, err = state.DecodeContainer([]byte(change(good, "version", 2)))
	assert.Error(t, err, "state file written by a newer runv: version 2, this is 1")
	assert.Assert(t, errdefs.IsFailedPrecondition(err))
}

func filledContainer() state.Container {
	c := filled[state.Container]()
	c.Version = state.Version
	return c
}

func filledPod() state.Pod {
	p := filled[state.Pod]()
	p.Version = state.Version
	return p
}

func FuzzDecodeContainer(f *testing.F) {
	good, err := json.Marshal(filledContainer())
	assert.NilError(f, err)
	f.Add(good)
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"id":"../x"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := state.DecodeContainer(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(c)
		assert.NilError(t, err)
		got, err := state.DecodeContainer(again)
		if len(again) <= 1<<20 {
			assert.NilError(t, err)
			assert.Assert(t, cmp.Equal(got, c, cmpopts.EquateEmpty()))
		}
	})
}

func FuzzDecodePod(f *testing.F) {
	good, err := json.Marshal(filledPod())
	assert.NilError(f, err)
	f.Add(good)
	f.Add([]byte(`{"version":1,"phases":[{"ms":1e300}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := state.DecodePod(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(p)
		assert.NilError(t, err)
		got, err := state.DecodePod(again)
		if len(again) <= 1<<20 {
			assert.NilError(t, err)
			assert.Assert(t, cmp.Equal(got, p, cmpopts.EquateEmpty()))
		}
	})
}

func TestTreesOverlap(t *testing.T) {
	tree := func(path string, ino uint64) state.Tree { return state.Tree{Path: path, Dev: 1, Ino: ino} }
	for _, c := range []struct {
		a, b state.Tree
		want bool
	}{
		{tree("/a", 1), tree("/a", 1), true},
		{tree("/a", 1), tree("/elsewhere", 1), true}, // by another mount
		{tree("/a", 1), tree("/a/b", 2), true},
		{tree("/", 2), tree("/a/b", 3), true},
		{tree("/a", 1), tree("/ab", 2), false},
		{tree("/a/b", 1), tree("/a/c", 2), false},
		{state.Tree{Path: "/a"}, state.Tree{Path: "/b"}, false}, // of an older record
	} {
		assert.Equal(t, c.a.Overlaps(c.b), c.want, "%v, %v", c.a, c.b)
		assert.Equal(t, c.b.Overlaps(c.a), c.want, "%v, %v", c.b, c.a)
	}
}
