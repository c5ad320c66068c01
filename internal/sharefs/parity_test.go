package sharefs_test

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// users are those who act on the same files: each kind of relation to an owner that Linux knows.
func users() map[string]user {
	return map[string]user{
		"root":                  {},
		"root without override": {Drop: []uint{unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_CHOWN}},
		"owner":                 {UID: 1000, GID: 1000},
		"in the group":          {UID: 1002, GID: 1001},
		"with a group":          {UID: 1002, GID: 1003, Groups: []uint32{1001}},
		"with many groups":      {UID: 1002, GID: 1003, Groups: []uint32{5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 1001}},
		"other":                 {UID: 1004, GID: 1004},
	}
}

// An aclEntry is one of acl(5).
type aclEntry struct {
	tag  uint16
	perm uint16
	id   uint32
}

const (
	aclUserObj, aclUser, aclGroupObj, aclGroup, aclMask, aclOther = 1, 2, 4, 8, 16, 32
	aclNoID                                                       = 1<<32 - 1
)

// acl is the value of system.posix_acl_access and system.posix_acl_default (linux/posix_acl_xattr.h).
func acl(entries ...aclEntry) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// Each case makes its files as root, on the host; then each user acts. The same happens on a directory of the host without
// a server between: all results, and the files in the end, must be equal.
func cases() map[string]struct {
	umask int
	setup []step
	steps []step
} {
	return map[string]struct {
		umask int
		setup []step
		steps []step
	}{
		"directory of a group": {
			umask: 0o022,
			setup: []step{
				{Do: "mkdir", Path: "g", Mode: 0o777}, {Do: "chown", Path: "g", A: 0, B: 1001}, {Do: "chmod", Path: "g", Mode: 0o2775},
			},
			steps: []step{
				{Do: "create", Path: "g/a", Mode: 0o666, Text: []byte("text")},
				{Do: "create", Path: "g/sgid", Mode: 0o2777},
				{Do: "create", Path: "g/suid", Mode: 0o4755},
				{Do: "mkdir", Path: "g/d", Mode: 0o777},
				{Do: "create", Path: "g/d/below", Mode: 0o640},
				{Do: "mknod", Path: "g/fifo", Mode: unix.S_IFIFO | 0o666},
				{Do: "mknod", Path: "g/sock", Mode: unix.S_IFSOCK | 0o666},
				{Do: "mknod", Path: "g/null", Mode: unix.S_IFCHR | 0o666, A: 0x103},
				{Do: "mknod", Path: "g/big", Mode: unix.S_IFBLK | 0o600, A: int(unix.Mkdev(259, 70000))},
				{Do: "mknod", Path: "g/reg", Mode: unix.S_IFREG | 0o666},
				{Do: "symlink", Path: "g/link", Path2: "/nowhere"},
				{Do: "readlink", Path: "g/link"},
				{Do: "tmpfile", Path: "g", Path2: "g/tmp", Mode: 0o666},
				{Do: "link", Path: "g/a", Path2: "g/hard"},
				{Do: "chmod", Path: "g/a", Mode: 0o2755},
				{Do: "chmod", Path: "g/d", Mode: 0o2770},
				{Do: "chown", Path: "g/a", A: -1, B: 1001},
				{Do: "chown", Path: "g/a", A: -1, B: 1003},
				{Do: "chown", Path: "g/a", A: 1004, B: -1},
				{Do: "chown", Path: "g/link", A: -1, B: 1001},
				{Do: "rename", Path: "g/hard", Path2: "g/renamed"},
				{Do: "rename", Path: "g/a", Path2: "g/reg", A: unix.RENAME_EXCHANGE},
				{Do: "rename", Path: "g/a", Path2: "g/reg", A: unix.RENAME_NOREPLACE},
				{Do: "rename", Path: "g/tmp", Path2: "g/white", A: unix.RENAME_WHITEOUT},
				{Do: "stat", Path: "g/tmp"},
				{Do: "unlink", Path: "g/renamed"},
				{Do: "rmdir", Path: "g/d"},
				{Do: "unlink", Path: "g/d/below"},
				{Do: "rmdir", Path: "g/d"},
			},
		},
		"files of others": {
			umask: 0o027,
			setup: []step{
				{Do: "mkdir", Path: "d", Mode: 0o777},
				{Do: "chmod", Path: "d", Mode: 0o755},
				{Do: "create", Path: "d/group", Mode: 0o660, Text: []byte("secret")},
				{Do: "chown", Path: "d/group", A: 1000, B: 1001},
				{Do: "create", Path: "d/own", Mode: 0o600, Text: []byte("secret")},
				{Do: "chown", Path: "d/own", A: 1000, B: 1000},
				{Do: "create", Path: "d/none", Mode: 0, Text: []byte("secret")},
				{Do: "chown", Path: "d/none", A: 1000, B: 1001},
				{Do: "create", Path: "d/all", Mode: 0o644, Text: []byte("public")},
				{Do: "chmod", Path: "d/all", Mode: 0o6777},
				{Do: "chown", Path: "d/all", A: 1000, B: 1001},
				{Do: "chmod", Path: "d/all", Mode: 0o6777},
				{Do: "create", Path: "d/trunc", Mode: 0o644, Text: []byte("public")},
				{Do: "chown", Path: "d/trunc", A: 1000, B: 1001},
				{Do: "chmod", Path: "d/trunc", Mode: 0o6777},
				{Do: "create", Path: "d/trunc2", Mode: 0o644, Text: []byte("public")},
				{Do: "chown", Path: "d/trunc2", A: 1000, B: 1001},
				{Do: "chmod", Path: "d/trunc2", Mode: 0o6777},
				{Do: "mkdir", Path: "d/deep", Mode: 0o777},
				{Do: "chmod", Path: "d/deep", Mode: 0o750},
				{Do: "chown", Path: "d/deep", A: 1000, B: 1001},
				{Do: "create", Path: "d/deep/in", Mode: 0o644, Text: []byte("in")},
				{Do: "mkdir", Path: "sticky", Mode: 0o777},
				{Do: "chmod", Path: "sticky", Mode: 0o1777},
				{Do: "create", Path: "sticky/theirs", Mode: 0o666},
				{Do: "chown", Path: "sticky/theirs", A: 1000, B: 1000},
			},
			steps: []step{
				{Do: "read", Path: "d/group"},
				{Do: "write", Path: "d/group", Text: []byte("W")},
				{Do: "append", Path: "d/group", Text: []byte("A")},
				{Do: "read", Path: "d/group"},
				{Do: "read", Path: "d/own"},
				{Do: "write", Path: "d/own", Text: []byte("W")},
				{Do: "read", Path: "d/none"},
				{Do: "chmod", Path: "d/none", Mode: 0o604},
				{Do: "read", Path: "d/none"},
				{Do: "write", Path: "d/all", Text: []byte("W")},
				{Do: "stat", Path: "d/all"},
				{Do: "truncate", Path: "d/trunc", A: 3},
				{Do: "stat", Path: "d/trunc"},
				{Do: "truncate-open", Path: "d/trunc2"},
				{Do: "stat", Path: "d/trunc2"},
				{Do: "fallocate", Path: "d/group", A: 0, B: 100_000},
				{Do: "fallocate", Path: "d/group", Mode: unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, A: 0, B: 65536},
				{Do: "holes", Path: "d/group"},
				{Do: "read", Path: "d/deep/in"},
				{Do: "list", Path: "d/deep"},
				{Do: "create", Path: "d/new", Mode: 0o644},
				{Do: "unlink", Path: "sticky/theirs"},
				{Do: "rename", Path: "sticky/theirs", Path2: "sticky/mine"},
				{Do: "create", Path: "sticky/mine2", Mode: 0o666},
				{Do: "utimes", Path: "d/all", A: 1000, B: 2000},
				{Do: "touch", Path: "d/group"},
				{Do: "touch", Path: "d/own"},
				{Do: "access", Path: "d/group", Mode: unix.W_OK},
				{Do: "access", Path: "d/own", Mode: unix.R_OK},
				{Do: "access", Path: "d/deep", Mode: unix.X_OK},
				{Do: "setxattr", Path: "d/own", Path2: "user.x", Text: []byte("v")},
				{Do: "getxattr", Path: "d/own", Path2: "user.x"},
				{Do: "setxattr", Path: "d/group", Path2: "user.x", Text: []byte("v")},
				{Do: "listxattr", Path: "d/group"},
				{Do: "removexattr", Path: "d/group", Path2: "user.x"},
				{Do: "getxattr", Path: "d/group", Path2: "user.x"},
				{Do: "setxattr", Path: "d/all", Path2: "security.capability", Text: []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")},
				{Do: "listxattr", Path: "d/all"},
				{Do: "write", Path: "d/all", Text: []byte("X")},
				{Do: "listxattr", Path: "d/all"},
				{Do: "link", Path: "d/own", Path2: "sticky/hard"},
				{Do: "link", Path: "d/group", Path2: "sticky/hard2"},
				{Do: "copy", Path: "d/group", Path2: "sticky/copy"},
				{Do: "read", Path: "sticky/copy"},
				{Do: "flags", Path: "d/all"},
				{Do: "flags", Path: "d/own", A: 0x40},
				{Do: "flags", Path: "d/deep"},
				{Do: "tmpfile", Path: "sticky", Path2: "sticky/tmp", Mode: 0o604},
				{Do: "stat", Path: "d/nothing"},
				{Do: "rmdir", Path: "d"},
				{Do: "rmdir", Path: "d/all"},
				{Do: "unlink", Path: "d/deep"},
				{Do: "mkdir", Path: "d/all", Mode: 0o777},
				{Do: "open", Path: "d/all", A: unix.O_RDWR | unix.O_NOFOLLOW},
				{Do: "create", Path: "d/all", Mode: 0o777},
				{Do: "open", Path: "d/all", A: unix.O_RDONLY | unix.O_CREAT, Mode: 0o777},
				{Do: "create", Path: "d/" + longName(256), Mode: 0o777},
				{Do: "create", Path: "sticky/" + longName(255), Mode: 0o777},
			},
		},
		"access control lists": {
			umask: 0o077,
			setup: []step{
				{Do: "mkdir", Path: "d", Mode: 0o777},
				{Do: "chmod", Path: "d", Mode: 0o777},
				{Do: "create", Path: "d/denied", Mode: 0o644, Text: []byte("secret")},
				{Do: "setxattr", Path: "d/denied", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclUser, 0, 1002}, aclEntry{aclGroupObj, 4, aclNoID}, aclEntry{aclMask, 4, aclNoID}, aclEntry{aclOther, 4, aclNoID})},
				{Do: "create", Path: "d/allowed", Mode: 0o600, Text: []byte("secret")},
				{Do: "setxattr", Path: "d/allowed", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclUser, 6, 1000}, aclEntry{aclGroupObj, 0, aclNoID}, aclEntry{aclGroup, 4, 1001}, aclEntry{aclMask, 6, aclNoID}, aclEntry{aclOther, 0, aclNoID})},
				{Do: "create", Path: "d/masked", Mode: 0o600, Text: []byte("secret")},
				{Do: "setxattr", Path: "d/masked", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclUser, 6, 1000}, aclEntry{aclGroupObj, 0, aclNoID}, aclEntry{aclMask, 4, aclNoID}, aclEntry{aclOther, 0, aclNoID})},
				{Do: "mkdir", Path: "def", Mode: 0o777},
				{Do: "chmod", Path: "def", Mode: 0o777},
				{Do: "setxattr", Path: "def", Path2: "system.posix_acl_default", Text: acl(
					aclEntry{aclUserObj, 7, aclNoID}, aclEntry{aclUser, 6, 1004}, aclEntry{aclGroupObj, 5, aclNoID}, aclEntry{aclMask, 7, aclNoID}, aclEntry{aclOther, 1, aclNoID})},
				{Do: "mkdir", Path: "mine", Mode: 0o777},
				{Do: "chmod", Path: "mine", Mode: 0o777},
				{Do: "create", Path: "mine/sgid", Mode: 0o644},
				{Do: "chown", Path: "mine/sgid", A: 1002, B: 1001},
				{Do: "chmod", Path: "mine/sgid", Mode: 0o2755},
				{Do: "create", Path: "mine/sgid2", Mode: 0o644},
				{Do: "chown", Path: "mine/sgid2", A: 1002, B: 1009},
				{Do: "chmod", Path: "mine/sgid2", Mode: 0o2755},
			},
			steps: []step{
				{Do: "read", Path: "d/denied"},
				{Do: "read", Path: "d/allowed"},
				{Do: "write", Path: "d/allowed", Text: []byte("W")},
				{Do: "read", Path: "d/masked"},
				{Do: "write", Path: "d/masked", Text: []byte("W")},
				{Do: "getxattr", Path: "d/denied", Path2: "system.posix_acl_access"},
				{Do: "create", Path: "def/file", Mode: 0o666},
				{Do: "getxattr", Path: "def/file", Path2: "system.posix_acl_access"},
				{Do: "mkdir", Path: "def/dir", Mode: 0o777},
				{Do: "getxattr", Path: "def/dir", Path2: "system.posix_acl_default"},
				{Do: "create", Path: "def/dir/file", Mode: 0o640},
				{Do: "mknod", Path: "def/fifo", Mode: unix.S_IFIFO | 0o666},
				{Do: "tmpfile", Path: "def", Path2: "def/tmp", Mode: 0o666},
				{Do: "symlink", Path: "def/link", Path2: "x"},
				{Do: "chmod", Path: "def/file", Mode: 0o600},
				{Do: "getxattr", Path: "def/file", Path2: "system.posix_acl_access"},
				{Do: "setxattr", Path: "def/file", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclGroupObj, 4, aclNoID}, aclEntry{aclOther, 0, aclNoID})},
				{Do: "stat", Path: "def/file"},
				{Do: "setxattr", Path: "d/denied", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclGroupObj, 4, aclNoID}, aclEntry{aclOther, 0, aclNoID})},
				{Do: "setxattr", Path: "mine/sgid", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 7, aclNoID}, aclEntry{aclGroupObj, 5, aclNoID}, aclEntry{aclOther, 1, aclNoID})},
				{Do: "stat", Path: "mine/sgid"},
				{Do: "setxattr", Path: "mine/sgid2", Path2: "system.posix_acl_access", Text: acl(
					aclEntry{aclUserObj, 7, aclNoID}, aclEntry{aclGroupObj, 5, aclNoID}, aclEntry{aclOther, 1, aclNoID})},
				{Do: "stat", Path: "mine/sgid2"},
				{Do: "removexattr", Path: "def/dir", Path2: "system.posix_acl_default"},
				{Do: "create", Path: "def/dir/second", Mode: 0o666},
			},
		},
	}
}

func longName(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = 'n'
	}
	return string(b)
}

// tree describes all files below a directory.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var lines []string
	assert.NilError(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d links %d rdev %d", rel, st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev)
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", content)
		}
		for _, name := range []string{"system.posix_acl_access", "system.posix_acl_default", "security.capability"} {
			buf := make([]byte, 1024)
			if n, err := unix.Lgetxattr(path, name, buf); err == nil {
				line += fmt.Sprintf(" %s=%x", name, buf[:n])
			}
		}
		lines = append(lines, line)
		return nil
	}))
	return lines
}

func TestActsAsHost(t *testing.T) {
	for name, c := range cases() {
		t.Run(name, func(t *testing.T) {
			for who, u := range users() {
				t.Run(who, func(t *testing.T) {
					t.Parallel()
					host, behind := t.TempDir(), t.TempDir()
					for _, dir := range []string{host, behind} {
						assert.NilError(t, os.Chmod(dir, 0o777))
						for dir := dir; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
							assert.NilError(t, os.Chmod(dir, 0o777)) // so that all users get there
						}
						for i, got := range act(t, user{}, dir, 0, c.setup) {
							assert.Equal(t, got, "", "setup %+v", c.setup[i])
						}
					}
					mounted, _ := share(t, behind, defaults())
					want, got := act(t, u, host, c.umask, c.steps), act(t, u, mounted, c.umask, c.steps)
					for i := range c.steps {
						if got[i] != want[i] {
							t.Errorf("%+v: %q, on the host %q", c.steps[i], got[i], want[i])
						}
					}
					assert.DeepEqual(t, tree(t, behind), tree(t, host))
					assert.DeepEqual(t, tree(t, mounted), tree(t, host))
				})
			}
		})
	}
}

// Two cases in which the server knows too little, and what it does then.
func TestPrivilegesOfChangedFiles(t *testing.T) {
	dir := t.TempDir()
	assert.NilError(t, os.Chmod(dir, 0o777))
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		assert.NilError(t, os.Chmod(d, 0o777))
	}
	mounted, _ := share(t, dir, defaults())
	for name, mode := range map[string]uint32{"alloc": 0o6777, "nox": 0o2666} {
		assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600))
		assert.NilError(t, unix.Chmod(filepath.Join(dir, name), mode))
	}
	// Root may change a file and leave the bits, but a FALLOCATE does not tell whether it is root with CAP_FSETID.
	got := act(t, user{}, mounted, 0, []step{{Do: "fallocate", Path: "alloc", B: 100}, {Do: "stat", Path: "alloc"}})
	assert.DeepEqual(t, got, []string{"", "100777 0:0 100 links 1 rdev 0"})
	// Linux (since 6.2) takes a set-group-id bit that means nothing (the group may not execute) only from those who are not of the
	// group, and the server knows nobody's groups.
	got = act(t, user{UID: 1004, GID: 1004}, mounted, 0, []step{{Do: "write", Path: "nox", Text: []byte("W")}, {Do: "stat", Path: "nox"}})
	assert.DeepEqual(t, got, []string{"", "102666 0:0 1 links 1 rdev 0"})
}
