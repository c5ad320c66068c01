package bundle_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

// inUserNS is the default specification with a user namespace and these mappings.
func inUserNS(t *testing.T, uids, gids string) []byte {
	t.Helper()
	data := with(t, "linux.namespaces[5]", `{"type":"user"}`)
	data = set(t, data, "linux.uidMappings", uids)
	return set(t, data, "linux.gidMappings", gids)
}

func TestUserNamespace(t *testing.T) {
	const all = `[{"containerID":0,"hostID":100000,"size":65536}]`
	list := func(n, step int) string {
		var items []string
		for i := range n {
			items = append(items, fmt.Sprintf(`{"containerID":%d,"hostID":%d,"size":1}`, i*step, 7+i*step))
		}
		return "[" + strings.Join(items, ",") + "]"
	}
	good := map[string][]byte{
		"plain":       inUserNS(t, all, all),
		"many":        inUserNS(t, list(340, 1), all),
		"last":        inUserNS(t, `[{"containerID":0,"hostID":0,"size":1},{"containerID":4294967294,"hostID":4294967294,"size":1}]`, all),
		"other order": inUserNS(t, `[{"containerID":10,"hostID":100000,"size":5},{"containerID":0,"hostID":100005,"size":10}]`, all),
		"joined":      with(t, "linux.namespaces[5]", `{"type":"user","path":"/proc/7/ns/user"}`),
		"joined, too": set(t, inUserNS(t, all, all), "linux.namespaces[5].path", `"/proc/7/ns/user"`),
		"sysctl":      set(t, inUserNS(t, all, all), "linux.sysctl", `{"user.max_uts_namespaces":"5"}`),
	}
	for name, data := range good {
		_, err := bundle.Parse(data, "/b")
		assert.NilError(t, err, name)
	}
	for _, r := range []struct {
		field, reason string
		data          []byte
	}{
		{"linux.uidMappings", "must be given", inUserNS(t, "[]", all)},
		{"linux.gidMappings", "must be given", inUserNS(t, all, "[]")},
		{"linux.uidMappings", "without a user namespace", with(t, "linux.uidMappings", all)},
		{"linux.gidMappings", "without a user namespace", with(t, "linux.gidMappings", all)},
		{"linux.uidMappings[0].size", "must not be 0", inUserNS(t, `[{"containerID":0,"hostID":0,"size":0}]`, all)},
		{"linux.uidMappings[0].size", "more than there are", inUserNS(t, `[{"containerID":0,"hostID":1,"size":4294967295}]`, all)},
		{"linux.gidMappings[1].size", "containerID 4294967295 on", inUserNS(t, all, `[{"containerID":0,"hostID":0,"size":1},{"containerID":4294967295,"hostID":1,"size":1}]`)},
		{"linux.uidMappings[1].containerID", "overlaps linux.uidMappings[0]", inUserNS(t, `[{"containerID":0,"hostID":0,"size":10},{"containerID":9,"hostID":100,"size":1}]`, all)},
		{"linux.uidMappings[1].hostID", "overlaps linux.uidMappings[0]", inUserNS(t, `[{"containerID":0,"hostID":5,"size":10},{"containerID":20,"hostID":0,"size":6}]`, all)},
		{"linux.uidMappings", "more than 340", inUserNS(t, list(341, 1), all)},
		{"linux.uidMappings", "bytes of mappings", inUserNS(t, list(340, 1000000), all)},
		{"linux.uidMappings", "must map the container's id 0", inUserNS(t, `[{"containerID":1,"hostID":1,"size":1}]`, all)},
		{"process.user.uid", "65536 is not in linux.uidMappings", set(t, inUserNS(t, all, all), "process.user", `{"uid":65536}`)},
		{"process.user.gid", "65536 is not in linux.gidMappings", set(t, inUserNS(t, all, all), "process.user", `{"gid":65536}`)},
		{"process.user.additionalGids[1]", "70000 is not in linux.gidMappings", set(t, inUserNS(t, all, all), "process.user", `{"additionalGids":[5,70000]}`)},
		{"process.user.uid", "65536 is not in linux.uidMappings", set(t, set(t, inUserNS(t, all, all), "process.user", `{"uid":65536}`), "linux.namespaces[5].path", `"/proc/7/ns/user"`)},
		{`linux.sysctl["user.max_uts_namespaces"]`, "without a namespace of type user", with(t, "linux.sysctl", `{"user.max_uts_namespaces":"5"}`)},
	} {
		invalid(t, r.data, r.field, r.reason)
	}
}

func TestTimeNamespace(t *testing.T) {
	inTimeNS := func(offsets string) []byte {
		return set(t, with(t, "linux.namespaces[5]", `{"type":"time"}`), "linux.timeOffsets", offsets)
	}
	for _, offsets := range []string{`{}`, `{"monotonic":{"secs":1,"nanosecs":999999999},"boottime":{"secs":-1}}`} {
		_, err := bundle.Parse(inTimeNS(offsets), "/b")
		assert.NilError(t, err, offsets)
	}
	invalid(t, set(t, inTimeNS(`{"monotonic":{"secs":1}}`), "linux.namespaces[5].path", `"/proc/7/ns/time"`), "linux.timeOffsets", "without a time namespace of the container's own")
	invalid(t, with(t, "linux.timeOffsets", `{"monotonic":{"secs":1}}`), "linux.timeOffsets", "without a time namespace")
	invalid(t, inTimeNS(`{"realtime":{"secs":1}}`), `linux.timeOffsets["realtime"]`, "is not a clock")
	invalid(t, inTimeNS(`{"boottime":{"nanosecs":1000000000}}`), `linux.timeOffsets["boottime"].nanosecs`, "not less than a second")
	invalid(t, inTimeNS(`{"boottime":{"secs":9223372036854775807}}`), `linux.timeOffsets["boottime"].secs`, "out of range")
}

func invalid(t *testing.T, data []byte, field, reason string) {
	t.Helper()
	_, err := bundle.Parse(data, "/b")
	var fe *bundle.FieldError
	assert.Assert(t, errors.As(err, &fe), "%s: %v", field, err)
	assert.Equal(t, fe.Field, field, err)
	assert.ErrorContains(t, err, reason)
	assert.Assert(t, errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err))
}
