package mirror_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/mirror"
)

// newMirror makes a mirror with a root directory, a directory d and a file f in it, and returns where its root is.
func newMirror(t testing.TB) (*mirror.Set, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	set := mirror.NewSet(t.TempDir())
	at, err := set.Create(&agentv1.CreateMirrorRequest{Id: "m", Name: "root"})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, set.Remove("m")) })
	assert.NilError(t, apply(t, set, newNode("", unix.S_IFDIR|0o755), newNode("d", unix.S_IFDIR|0o755), newNode("f", unix.S_IFREG|0o644)))
	return set, at
}

func apply(t testing.TB, set *mirror.Set, ops ...*agentv1.MirrorOperation) error {
	t.Helper()
	return set.Apply(t.Context(), &agentv1.ApplyMirrorRequest{Id: "m", Operations: ops})
}

func newNode(path string, mode uint32) *agentv1.MirrorOperation {
	return &agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Make{Make: &agentv1.MirrorMake{
		Path: path, Attributes: &agentv1.MirrorAttributes{Mode: mode, Uid: 3, Gid: 4, MtimeSec: 5},
	}}}
}

// everything is one operation of each kind on a path.
func everything(path string) []*agentv1.MirrorOperation {
	attributes := &agentv1.MirrorAttributes{Mode: unix.S_IFREG | 0o600, MtimeSec: 1}
	link := newNode(path, unix.S_IFLNK|0o777)
	link.GetMake().Target = "/"
	return []*agentv1.MirrorOperation{
		newNode(path, unix.S_IFREG|0o644), newNode(path, unix.S_IFDIR|0o755), link, newNode(path, unix.S_IFCHR|0o644), newNode(path, 0o644),
		{Kind: &agentv1.MirrorOperation_Write{Write: &agentv1.MirrorWrite{Path: path, Size: 9, Extents: []*agentv1.MirrorExtent{{Data: []byte("x")}}}}},
		{Kind: &agentv1.MirrorOperation_Write{Write: &agentv1.MirrorWrite{Path: path, Staged: true, Extents: []*agentv1.MirrorExtent{{Offset: 1 << 63}}}}},
		{Kind: &agentv1.MirrorOperation_Publish{Publish: &agentv1.MirrorPublish{Staged: path, Path: "f", Moved: true}}},
		{Kind: &agentv1.MirrorOperation_Publish{Publish: &agentv1.MirrorPublish{Staged: "f", Path: path}}},
		{Kind: &agentv1.MirrorOperation_Link{Link: &agentv1.MirrorLink{Path: "f", Link: path}}},
		{Kind: &agentv1.MirrorOperation_Link{Link: &agentv1.MirrorLink{Path: path, Link: "d/f"}}},
		{Kind: &agentv1.MirrorOperation_Close{Close: &agentv1.MirrorClose{Path: path}}},
		{Kind: &agentv1.MirrorOperation_SetAttributes{SetAttributes: &agentv1.MirrorSetAttributes{Path: path, Attributes: attributes}}},
		{Kind: &agentv1.MirrorOperation_SetAttributes{SetAttributes: &agentv1.MirrorSetAttributes{Path: path}}},
		{Kind: &agentv1.MirrorOperation_Rename{Rename: &agentv1.MirrorRename{Path: "f", To: path}}},
		{Kind: &agentv1.MirrorOperation_Rename{Rename: &agentv1.MirrorRename{Path: path, To: "f", Exchange: true}}},
		{Kind: &agentv1.MirrorOperation_Remove{Remove: &agentv1.MirrorRemove{Path: path}}},
		{Kind: &agentv1.MirrorOperation_Remove{Remove: &agentv1.MirrorRemove{Path: path, Moved: true}}},
		{},
	}
}

// canary is a directory outside that no operation may reach.
func canary(t testing.TB) (dir string, check func(testing.TB)) {
	t.Helper()
	dir = t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("untouched"), 0o600))
	state := func(t testing.TB) (all string) {
		for _, path := range []string{dir, filepath.Join(dir, "file")} {
			var st unix.Stat_t
			assert.NilError(t, unix.Stat(path, &st))
			st.Atim = unix.Timespec{}
			all += fmt.Sprintf("%s %+v\n", path, st)
		}
		return all
	}
	before := state(t)
	return dir, func(t testing.TB) {
		t.Helper()
		assert.Equal(t, state(t), before)
	}
}

// TestConfined has paths that lead out of the mirror, by names and by links that a container has put there.
func TestConfined(t *testing.T) {
	set, at := newMirror(t)
	outside, check := canary(t)
	out := newNode("out", unix.S_IFLNK|0o777)
	out.GetMake().Target = outside
	file := newNode("file", unix.S_IFLNK|0o777)
	file.GetMake().Target = filepath.Join(outside, "file")
	assert.NilError(t, apply(t, set, out, file))
	for _, path := range []string{
		"..", "../x", "d/../../x", "/x", "/", "./f", "d//f", "d/", "x\x00y", strings.Repeat("x/", 2100) + "x", strings.Repeat("x", 256),
		outside + "/file", "out/file", "out/x", "out/../x", "f/x", "missing/x",
	} {
		for _, op := range everything(path) {
			assert.Assert(t, apply(t, set, op) != nil, "%q: %v", path, op)
		}
	}
	for _, op := range everything("file") { // the link itself may change, what it leads to may not
		_ = apply(t, set, op)
	}
	check(t)
	assert.ErrorIs(t, os.WriteFile(filepath.Join(at, "x"), nil, 0o600), unix.EROFS)
}

// TestBounds has requests that are too large, and names that are none.
func TestBounds(t *testing.T) {
	set, _ := newMirror(t)
	assert.Assert(t, errdefs.IsInvalidArgument(apply(t, set, slices.Repeat(everything("f"), 100)...)))
	for _, r := range []*agentv1.CreateMirrorRequest{
		{Id: "", Name: "x"}, {Id: "../x", Name: "x"}, {Id: strings.Repeat("x", 33), Name: "x"}, {Id: "x", Name: ""}, {Id: "x", Name: ".."}, {Id: "x", Name: "a/b"},
	} {
		_, err := set.Create(r)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", r)
	}
	_, err := set.Create(&agentv1.CreateMirrorRequest{Id: "m", Name: "x"})
	assert.Assert(t, errdefs.IsAlreadyExists(err))
	assert.Assert(t, errdefs.IsNotFound(set.Apply(t.Context(), &agentv1.ApplyMirrorRequest{Id: "other"})))
	_, err = set.Replace(&agentv1.ReplaceMirrorRequest{Id: "m", Source: "relative"})
	assert.Assert(t, errdefs.IsInvalidArgument(err))
	assert.NilError(t, set.Remove("other"))
}

// FuzzApply looks for requests that end the agent, or that reach out of the mirror.
func FuzzApply(f *testing.F) {
	for _, path := range []string{"", "f", "d/x", "out/file", "../x"} {
		data, err := proto.Marshal(&agentv1.ApplyMirrorRequest{Operations: everything(path)})
		assert.NilError(f, err)
		f.Add(data)
	}
	set, _ := newMirror(f)
	outside, check := canary(f)
	out := newNode("out", unix.S_IFLNK|0o777)
	out.GetMake().Target = outside
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &agentv1.ApplyMirrorRequest{}
		if proto.Unmarshal(data, r) != nil {
			return
		}
		_ = apply(t, set, out)
		for _, op := range r.Operations { // also those after one that fails
			_ = apply(t, set, op)
		}
		check(t)
	})
}
