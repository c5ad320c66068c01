package sharefs_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"runv/internal/sharefs"
)

// few are limits that are reached at once.
func few() sharefs.Limits { return sharefs.Limits{Nodes: 10_000, Kept: 3, Files: 20, Waits: 4} }

// fileSystems makes a directory of each kind: with file handles, and without (an overlay has none unless asked for).
func fileSystems(t *testing.T) map[string]string {
	t.Helper()
	overlay := t.TempDir()
	for _, dir := range []string{"lower", "upper", "work", "merged", "fs"} {
		assert.NilError(t, os.Mkdir(filepath.Join(overlay, dir), 0o755))
	}
	// The file system for overlay's directories must not be an overlay itself, as /tmp can be.
	mount(t, "tmpfs", filepath.Join(overlay, "fs"), "")
	for _, dir := range []string{"lower", "upper", "work"} {
		assert.NilError(t, os.Mkdir(filepath.Join(overlay, "fs", dir), 0o755))
	}
	fs := filepath.Join(overlay, "fs")
	mount(t, "overlay", filepath.Join(overlay, "merged"), fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", fs, fs, fs))
	tmpfs := t.TempDir()
	mount(t, "tmpfs", tmpfs, "")
	return map[string]string{"tmpfs": tmpfs, "overlay": filepath.Join(overlay, "merged"), "temporary files": t.TempDir()}
}

func mount(t *testing.T, fstype, dir, options string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	assert.NilError(t, unix.Mount("none", dir, fstype, 0, options))
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

// Files are found again after their descriptors were let go of: by name, by an open file, after a rename, and removed.
func TestFilesOutliveDescriptors(t *testing.T) {
	for name, dir := range fileSystems(t) {
		t.Run(name, func(t *testing.T) {
			mounted, fs := share(t, dir, few())
			at := func(format string, args ...any) string { return filepath.Join(mounted, fmt.Sprintf(format, args...)) }
			const many = 50
			var held []*os.File
			for i := range many {
				assert.NilError(t, os.MkdirAll(at("d%d/sub", i), 0o755))
				assert.NilError(t, os.WriteFile(at("d%d/sub/file", i), []byte{byte(i)}, 0o644))
				if i < 5 {
					f, err := os.Open(at("d%d/sub/file", i))
					assert.NilError(t, err)
					defer f.Close()
					held = append(held, f)
				}
			}
			u := fs.Usage()
			assert.Assert(t, u.Kept <= few().Kept, "%+v", u)
			assert.Assert(t, u.Nodes > many, "%+v", u)
			for i := range many {
				data, err := os.ReadFile(at("d%d/sub/file", i))
				assert.NilError(t, err)
				assert.Equal(t, data[0], byte(i))
			}
			// A directory is renamed below which files are known, one of them open.
			assert.NilError(t, os.Rename(at("d0"), at("renamed")))
			touchAll(t, mounted, many)
			assert.NilError(t, held[0].Chmod(0o600))
			st, err := os.Stat(at("renamed/sub/file"))
			assert.NilError(t, err)
			assert.Equal(t, st.Mode().Perm(), os.FileMode(0o600))
			// A file is removed that is open.
			assert.NilError(t, os.Remove(at("d1/sub/file")))
			touchAll(t, mounted, many)
			assert.NilError(t, held[1].Chmod(0o640))
			st, err = held[1].Stat()
			assert.NilError(t, err)
			assert.Equal(t, st.Mode().Perm(), os.FileMode(0o640))
			// A file is replaced by another.
			assert.NilError(t, os.Rename(at("d2/sub/file"), at("d3/sub/file")))
			touchAll(t, mounted, many)
			buf := make([]byte, 1)
			_, err = held[3].ReadAt(buf, 0)
			assert.NilError(t, err)
			assert.Equal(t, buf[0], byte(3))
			st, err = held[3].Stat()
			assert.NilError(t, err)
			assert.Equal(t, st.Size(), int64(1))
			read(t, at("d3/sub/file"), "\x02")
			// Two change places.
			assert.NilError(t, unix.Renameat2(unix.AT_FDCWD, at("d5/sub"), unix.AT_FDCWD, at("d6/sub"), unix.RENAME_EXCHANGE))
			touchAll(t, mounted, many)
			read(t, at("d5/sub/file"), "\x06")
			read(t, at("d6/sub/file"), "\x05")
		})
	}
}

// touchAll makes the server use other descriptors.
func touchAll(t *testing.T, mounted string, many int) {
	t.Helper()
	for i := many / 2; i < many; i++ {
		_, err := os.Stat(filepath.Join(mounted, fmt.Sprintf("d%d/sub/file", i)))
		assert.NilError(t, err)
	}
}

// A guest that opens all that it may gets an error for the next file, and what it has open goes on working. Files of the root file
// system can still be opened then, and after that programs can still be executed.
func TestOpenFilesAreBounded(t *testing.T) {
	dir := t.TempDir()
	limits := few()
	limits.Programs = 4
	mounted, fs := share(t, dir, limits)
	program, err := os.ReadFile("/proc/self/exe") // static; it runs no test
	assert.NilError(t, err)
	for _, volume := range []string{"container", sharefs.BindPrefix + "1"} {
		assert.NilError(t, os.Mkdir(filepath.Join(dir, volume), 0o755))
		assert.NilError(t, os.WriteFile(filepath.Join(dir, volume, "file"), []byte("x"), 0o644))
		assert.NilError(t, os.WriteFile(filepath.Join(dir, volume, "program"), program, 0o755))
	}
	var held []*os.File
	openAll := func(path string) {
		for {
			f, err := os.Open(filepath.Join(mounted, path))
			if err != nil {
				assert.ErrorIs(t, err, unix.ENFILE)
				return
			}
			t.Cleanup(func() { f.Close() })
			held = append(held, f)
		}
	}
	openAll(sharefs.BindPrefix + "1/file")
	assert.Equal(t, len(held), limits.Files-limits.Programs-limits.Programs/2)
	openAll("container/file")
	assert.Equal(t, len(held), limits.Files-limits.Programs)
	assert.Equal(t, fs.Usage().Files, len(held))
	cmd := exec.Command(filepath.Join(mounted, sharefs.BindPrefix+"1", "program"), "-test.run=^$")
	cmd.Env = []string{"NOTHING=1"}
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	_, err = held[0].ReadAt(make([]byte, 1), 0)
	assert.NilError(t, err)
	assert.NilError(t, held[1].Close())
	f, err := os.Open(filepath.Join(mounted, "container/file"))
	assert.NilError(t, err)
	assert.NilError(t, f.Close())
}

// What the host mounts below a volume it can unmount again, although the guest knows files in it.
func TestHostUnmountsBelowVolume(t *testing.T) {
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "")
	volume := "v" + sharefs.CoherentSuffix
	assert.NilError(t, os.Mkdir(filepath.Join(dir, volume), 0o755))
	mount(t, "tmpfs", filepath.Join(dir, volume), "") // as binds are: a mount of its own at the top of the share
	sub := filepath.Join(dir, volume, "sub")
	assert.NilError(t, os.Mkdir(sub, 0o755))
	mounted, _ := share(t, dir, defaults())
	seen := filepath.Join(mounted, volume, "sub")
	for range 3 {
		assert.NilError(t, unix.Mount("none", sub, "tmpfs", 0, ""))
		assert.NilError(t, os.MkdirAll(filepath.Join(seen, "a/b"), 0o755))
		assert.NilError(t, os.WriteFile(filepath.Join(seen, "a/b/c"), []byte("x"), 0o644))
		read(t, filepath.Join(seen, "a/b/c"), "x")
		assert.NilError(t, os.Chmod(filepath.Join(seen, "a/b/c"), 0o600))
		poll.WaitOn(t, func(poll.LogT) poll.Result { // the guest's kernel tells of a closed file a moment after close(2)
			if err := unix.Unmount(sub, 0); err != nil {
				return poll.Continue("%v", err)
			}
			return poll.Success()
		}, poll.WithDelay(time.Millisecond))
		_, err := os.Stat(filepath.Join(seen, "a"))
		assert.ErrorIs(t, err, os.ErrNotExist)
	}
}

// A volume that is forgotten holds nothing: its mount can be unmounted, while the guest still knows its files.
func TestForgottenVolume(t *testing.T) {
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "")
	at := filepath.Join(dir, "v/data")
	assert.NilError(t, os.MkdirAll(at, 0o755))
	assert.NilError(t, unix.Mount("none", at, "tmpfs", 0, ""))
	mounted, fs := share(t, dir, defaults())
	assert.NilError(t, os.WriteFile(filepath.Join(mounted, "v/data/file"), []byte("x"), 0o644))
	f, err := os.OpenFile(filepath.Join(mounted, "v/data/file"), os.O_RDWR, 0)
	assert.NilError(t, err)
	defer f.Close()
	assert.NilError(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	assert.ErrorIs(t, unix.Unmount(at, 0), unix.EBUSY)
	fs.ForgetVolume("v")
	assert.NilError(t, unix.Unmount(at, 0))
	_, err = f.WriteAt([]byte("y"), 0)
	assert.Assert(t, err != nil)
	// The name can come back.
	assert.NilError(t, unix.Mount("none", at, "tmpfs", 0, ""))
	assert.NilError(t, os.WriteFile(filepath.Join(at, "file"), []byte("new"), 0o644))
	read(t, filepath.Join(mounted, "v/data/file"), "new")
	fs.ForgetVolume("v")
	assert.NilError(t, unix.Unmount(at, 0))
}

// Two host file systems have the same inode numbers; programs in the guest that compare them (find, du, cp) see two files.
func TestInodesDiffer(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"a", "b"} {
		assert.NilError(t, os.Mkdir(filepath.Join(dir, sub), 0o755))
		mount(t, "tmpfs", filepath.Join(dir, sub), "")
		assert.NilError(t, os.WriteFile(filepath.Join(dir, sub, "file"), nil, 0o644))
	}
	mounted, _ := share(t, dir, defaults())
	a, err := os.Stat(filepath.Join(mounted, "a/file"))
	assert.NilError(t, err)
	b, err := os.Stat(filepath.Join(mounted, "b/file"))
	assert.NilError(t, err)
	assert.Assert(t, !os.SameFile(a, b))
}

// An inode number that the host gives to another file is another file to the guest.
func TestInodeNumberIsUsedAgain(t *testing.T) {
	for name, dir := range fileSystems(t) {
		t.Run(name, func(t *testing.T) {
			mounted, _ := share(t, dir, sharefs.Limits{Nodes: 10_000, Kept: 1, Files: 20, Waits: 4})
			for i := range 50 {
				path := filepath.Join(dir, "file")
				if i%2 == 0 {
					assert.NilError(t, os.WriteFile(path, fmt.Appendf(nil, "%02d", i), 0o644))
				} else {
					assert.NilError(t, os.Symlink(fmt.Sprint(i), path))
				}
				if i%2 == 0 {
					read(t, filepath.Join(mounted, "file"), fmt.Sprintf("%02d", i))
				} else {
					target, err := os.Readlink(filepath.Join(mounted, "file"))
					assert.NilError(t, err)
					assert.Equal(t, target, fmt.Sprint(i))
				}
				assert.NilError(t, os.Remove(path))
			}
		})
	}
}

// Directories of any size are listed whole, also when they change meanwhile.
func TestLargeDirectory(t *testing.T) {
	dir := t.TempDir()
	mounted, fs := share(t, dir, few())
	const many = 3000
	want := make(map[string]bool, many)
	for i := range many {
		name := fmt.Sprintf("file-with-a-name-of-some-length-%d", i)
		want[name] = true
		assert.NilError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o644))
	}
	for range 2 { // the second time with what the kernel remembers
		entries, err := os.ReadDir(mounted)
		assert.NilError(t, err)
		assert.Equal(t, len(entries), many)
		for _, e := range entries {
			assert.Assert(t, want[e.Name()], e.Name())
			info, err := e.Info()
			assert.NilError(t, err)
			assert.Equal(t, info.Size(), int64(0))
		}
	}
	assert.Assert(t, fs.Usage().Kept <= few().Kept)
	// Removing while listing, as rm -r does.
	d, err := os.Open(mounted)
	assert.NilError(t, err)
	defer d.Close()
	removed := 0
	for {
		names, err := d.Readdirnames(100)
		for _, name := range names {
			assert.NilError(t, os.Remove(filepath.Join(mounted, name)))
			removed++
		}
		if err != nil {
			break
		}
	}
	assert.Equal(t, removed, many)
}
