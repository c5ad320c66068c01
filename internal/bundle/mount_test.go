package bundle_test

import (
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

const (
	ids   = `[{"containerID":0,"hostID":100000,"size":65536}]`
	other = `[{"containerID":5,"hostID":7,"size":1}]`
)

func TestIDMap(t *testing.T) {
	mount := func(options, more string) string {
		return `{"destination":"/x","source":"/x","options":[` + options + `]` + more + `}`
	}
	const mappings = `,"uidMappings":` + other + `,"gidMappings":` + ids
	outer := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	inner := []specs.LinuxIDMapping{{ContainerID: 5, HostID: 7, Size: 1}}
	for _, tc := range []struct {
		mount string
		want  *bundle.IDMap
	}{
		{mount(`"bind"`, ""), nil},
		{mount(`"bind","idmap"`, ""), &bundle.IDMap{UIDs: outer, GIDs: outer}},
		{mount(`"rbind","ridmap"`, ""), &bundle.IDMap{UIDs: outer, GIDs: outer, Recursive: true}},
		{mount(`"rbind"`, mappings), &bundle.IDMap{UIDs: inner, GIDs: outer}},
		{mount(`"rbind","ridmap"`, mappings), &bundle.IDMap{UIDs: inner, GIDs: outer, Recursive: true}},
	} {
		b, err := bundle.Parse(set(t, inUserNS(t, ids, ids), "mounts[7]", tc.mount), "/b")
		assert.NilError(t, err, tc.mount)
		assert.Equal(t, cmp.Diff(b.Binds()[0].IDMap, tc.want), "")
		spec, err := b.GuestSpec("/g", map[int]string{7: "/g/7"}, nil)
		assert.NilError(t, err)
		assert.Assert(t, !strings.Contains(string(spec), "idmap"), "the guest gets files that are mapped")
		assert.Equal(t, strings.Count(string(spec), "uidMappings"), 1)
	}
	invalid(t, with(t, "mounts[7]", mount(`"bind","idmap"`, "")), "mounts[7].options[1]", "idmap needs mappings")
	for _, tc := range []struct{ mount, field, reason string }{
		{mount(`"bind"`, `,"uidMappings":`+ids), "mounts[7].gidMappings", "must be given with uidMappings"},
		{mount(`"bind"`, `,"gidMappings":`+ids), "mounts[7].uidMappings", "must be given with gidMappings"},
		{mount(`"bind"`, `,"gidMappings":`+ids+`,"uidMappings":[{"size":0}]`), "mounts[7].uidMappings[0].size", "must not be 0"},
		{mount(`"bind"`, `,"uidMappings":`+ids+`,"gidMappings":[{"size":2},{"size":2}]`), "mounts[7].gidMappings[1].containerID", "overlaps"},
		{`{"destination":"/x","type":"tmpfs","uidMappings":` + ids + `,"gidMappings":` + ids + `}`, "mounts[7].uidMappings", "only bind mounts"},
		{`{"destination":"/x","type":"tmpfs","options":["nosuid","ridmap"]}`, "mounts[7].options[1]", "ridmap is for bind mounts"},
		{mount(`"bind","ridmap=0-1-2"`, ""), "mounts[7].options[1]", "not an option of a bind mount"},
	} {
		invalid(t, set(t, inUserNS(t, ids, ids), "mounts[7]", tc.mount), tc.field, tc.reason)
	}
}

// What the kernel will not do, or not all the way to the host, is told.
func TestMountOptionWarnings(t *testing.T) {
	for _, tc := range []struct{ path, value, want string }{
		{"mounts[7]", `{"destination":"/x","source":"/x","options":["bind","rshared"]}`, "mounts[7].options[1]: rshared ends at the VM"},
		{"mounts[7]", `{"destination":"/x","source":"/x","options":["bind","sync"]}`, "mounts[7].options[1]: ignored: sync has no effect"},
		{"mounts[7]", `{"destination":"/x","type":"tmpfs","options":["rro"]}`, "mounts[7].options[0]: ignored: rro is for bind mounts"},
		{"mounts[0].options", `["tmpcopyup"]`, "mounts[0].options[0]: ignored: tmpcopyup is for tmpfs"},
		{"linux.rootfsPropagation", `"rshared"`, "linux.rootfsPropagation: rshared ends at the VM"},
		{"mounts[7]", `{"destination":"/x","type":"tmpfs","options":["rshared","sync"]}`, ""},
		{"linux.rootfsPropagation", `"runbindable"`, ""},
	} {
		b, err := bundle.Parse(with(t, tc.path, tc.value), "/b")
		assert.NilError(t, err, tc.value)
		text := strings.Join(b.Warnings, "\n")
		assert.Assert(t, strings.HasPrefix(text, tc.want), text)
		assert.Equal(t, text == "", tc.want == "", text)
	}
}

// Ten thousand new file systems are the guest's affair; as many binds take more room on the way there than
// there is.
func TestManyMounts(t *testing.T) {
	list := func(mount string) string {
		items := make([]string, 10000)
		for i := range items {
			items[i] = strings.ReplaceAll(mount, "N", strconv.Itoa(i))
		}
		return "[" + strings.Join(items, ",") + "]"
	}
	_, err := bundle.Parse(with(t, "mounts", list(`{"destination":"/m/N","type":"tmpfs"}`)), "/b")
	assert.NilError(t, err)
	_, err = bundle.Parse(with(t, "mounts", list(`{"destination":"/m/N","source":"/x","options":["bind"]}`)), "/b")
	assert.NilError(t, err)
}
