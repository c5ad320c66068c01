package storage_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/storage"
)

func TestIDMap(t *testing.T) {
	s, _ := newShare(t)
	src := t.TempDir()
	root := storage.Root{Path: src}
	dir := src + "/dir"
	write(t, dir+"/root", "")
	write(t, dir+"/other", "")
	assert.NilError(t, os.Chown(dir+"/other", 7, 8))
	assert.NilError(t, os.Mkdir(dir+"/below", 0o755))
	tmpfs(t, dir+"/below")
	write(t, dir+"/below/file", "")
	ids := func(recursive bool) *storage.IDMap {
		return &storage.IDMap{
			UIDs:      []storage.IDRange{{Inside: 0, Outside: 100000, Size: 5}, {Inside: 7, Outside: 3, Size: 1}},
			GIDs:      []storage.IDRange{{Inside: 0, Outside: 200000, Size: 65536}},
			Recursive: recursive,
		}
	}
	served := connect(t, s)
	m, err := s.Add(t.Context(), "c", root, map[int]storage.Bind{
		0: {Source: dir, Recursive: true, IDMap: ids(false)},
		1: {Source: dir, Recursive: true, IDMap: ids(true)},
		2: {Source: dir},
	})
	if errdefs.IsNotImplemented(err) && !canIDMap(t, src) {
		t.Skip("the file system of temporary files cannot map ids: ", err)
	}
	assert.NilError(t, err)
	for file, want := range map[string][2]uint32{
		"0/root": {100000, 200000}, "0/other": {3, 200008}, "0/below/file": {0, 0},
		"1/root": {100000, 200000}, "1/other": {3, 200008}, "1/below/file": {100000, 200000},
		"2/root": {0, 0}, "2/other": {7, 8},
	} {
		var st unix.Stat_t
		number, below, _ := strings.Cut(file, "/")
		n, err := strconv.Atoi(number)
		assert.NilError(t, err)
		assert.NilError(t, unix.Stat(filepath.Join(served, strings.TrimPrefix(m.Binds[n], storage.GuestDir), below), &st))
		assert.Equal(t, [2]uint32{st.Uid, st.Gid}, want, file)
	}
	// No process is left of those that had the namespaces.
	pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
	assert.Assert(t, pid <= 0, "%d, %v", pid, err)

	_, err = s.Add(t.Context(), "d", root, map[int]storage.Bind{5: {Source: "/proc", IDMap: ids(false)}})
	assert.ErrorContains(t, err, "mounts[5]: bind /proc: map ids: the kernel cannot do that on this file system")
	assert.Assert(t, errdefs.IsNotImplemented(err))
	_, err = s.Add(t.Context(), "d", root, map[int]storage.Bind{5: {Source: dir, IDMap: &storage.IDMap{UIDs: []storage.IDRange{{Size: 0}}}}})
	assert.ErrorContains(t, err, "mounts[5]: bind "+dir+": map ids: make user namespace")
}

// canIDMap asks the kernel itself.
func canIDMap(t *testing.T, dir string) bool {
	t.Helper()
	var fs unix.Statfs_t
	assert.NilError(t, unix.Statfs(dir, &fs))
	return fs.Type == unix.EXT4_SUPER_MAGIC || fs.Type == unix.XFS_SUPER_MAGIC || fs.Type == unix.BTRFS_SUPER_MAGIC
}
