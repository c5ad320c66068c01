package mirror_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/poll"

	agentv1 "runv/api/agent/v1"
	guestmirror "runv/internal/guest/mirror" //nolint:depguard // the tests put both ends into one process
	"runv/internal/mirror"
	"runv/test/harness"
)

// TestMain leaves a chroot: the agent, whose code runs here in this process, is never in one, and finds paths from the root of a
// mount namespace.
func TestMain(m *testing.M) {
	if os.Geteuid() == 0 {
		if err := harness.LeaveChroot(); err != nil {
			fmt.Fprintln(os.Stderr, "leave the chroot:", err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

// guest is the agent's side, in this process.
type guest struct {
	set     *guestmirror.Set
	applied atomic.Int64
	fail    atomic.Bool
	hold    sync.Mutex // held by tests while the agent shall do nothing
	mu      sync.Mutex
	removed []string
}

func (g *guest) Create(_ context.Context, r *agentv1.CreateMirrorRequest) (*agentv1.CreateMirrorResponse, error) {
	path, err := g.set.Create(r)
	return &agentv1.CreateMirrorResponse{Path: path}, err
}

func (g *guest) Apply(ctx context.Context, r *agentv1.ApplyMirrorRequest) (*agentv1.ApplyMirrorResponse, error) {
	if g.fail.Load() {
		return nil, unix.ENOSPC
	}
	g.hold.Lock()
	defer g.hold.Unlock()
	g.applied.Add(int64(len(r.Operations)))
	return &agentv1.ApplyMirrorResponse{}, g.set.Apply(ctx, r)
}

func (g *guest) Replace(_ context.Context, r *agentv1.ReplaceMirrorRequest) (*agentv1.ReplaceMirrorResponse, error) {
	problems, err := g.set.Replace(r)
	return &agentv1.ReplaceMirrorResponse{Problems: problems}, err
}

func (g *guest) Remove(_ context.Context, r *agentv1.RemoveMirrorRequest) (*agentv1.RemoveMirrorResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removed = append(g.removed, r.Id)
	return &agentv1.RemoveMirrorResponse{}, g.set.Remove(r.Id)
}

// world is a set with a guest, and a source.
type world struct {
	t      *testing.T
	set    *mirror.Set
	guest  *guest
	source string
	lost   chan string
}

func newWorld(t *testing.T, limits mirror.Limits) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	w := &world{
		t: t, set: mirror.New(limits, slog.New(slog.NewTextHandler(io.Discard, nil))),
		guest: &guest{set: guestmirror.NewSet(t.TempDir())}, source: filepath.Join(t.TempDir(), "source"), lost: make(chan string, 10),
	}
	t.Cleanup(w.set.Close)
	assert.NilError(t, os.Mkdir(w.source, 0o755))
	return w
}

// add opens a source as the pod does.
func (w *world) add(path string) (*mirror.Mirror, error) {
	w.t.Helper()
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	assert.NilError(w.t, err)
	return w.set.Add(w.t.Context(), mirror.Source{
		Tree: os.NewFile(uintptr(fd), path), Name: filepath.Base(path), Fallback: path,
		Lost: func(reason string) { w.lost <- reason },
	})
}

// start mirrors a source and returns where.
func (w *world) start(path string) (*mirror.Mirror, string) {
	w.t.Helper()
	m, err := w.add(path)
	assert.NilError(w.t, err)
	at, err := m.Start(w.t.Context(), w.guest)
	assert.NilError(w.t, err)
	w.t.Cleanup(func() {
		m.Release()
		poll.WaitOn(w.t, func(poll.LogT) poll.Result {
			w.guest.mu.Lock()
			defer w.guest.mu.Unlock()
			if len(w.guest.removed) > 0 {
				return poll.Success()
			}
			return poll.Continue("the mirror is not removed")
		})
	})
	return m, at
}

// nothingLost has no mirror given up.
func (w *world) nothingLost() {
	w.t.Helper()
	select {
	case why := <-w.lost:
		w.t.Error("the mirror was given up:", why)
	default:
	}
}

// describe tells all that can be seen of a tree, but not when directories were changed.
func describe(t *testing.T, root string) []string {
	t.Helper()
	lines, err := look(root)
	assert.NilError(t, err)
	return lines
}

func look(root string) (lines []string, err error) {
	err = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d", strings.TrimPrefix(path, root), st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %d %d.%09d %q", st.Nlink, len(data), st.Mtim.Sec, st.Mtim.Nsec, data[:min(len(data), 20)])
			if len(data) > 20 {
				line += fmt.Sprintf(" %x", hash(data))
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " " + target
		case unix.S_IFCHR:
			line += fmt.Sprintf(" %x", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			for _, name := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
				buf := make([]byte, 1024)
				if n, err := unix.Getxattr(path, name, buf); err == nil {
					line += fmt.Sprintf(" %s=%x", name, buf[:n])
				}
			}
		}
		lines = append(lines, line)
		return nil
	})
	return lines, err
}

func hash(data []byte) (h uint64) {
	for _, b := range data {
		h = h*31 + uint64(b)
	}
	return h
}

// same waits until the mirror is as the source.
func (w *world) same(at string) {
	w.t.Helper()
	var want, have []string
	poll.WaitOn(w.t, func(poll.LogT) poll.Result {
		select {
		case why := <-w.lost:
			return poll.Error(fmt.Errorf("the mirror was given up: %s", why))
		default:
		}
		var err error
		if want, err = look(w.source); err == nil {
			have, err = look(at)
		}
		if err != nil { // it is changing
			return poll.Continue("%v", err)
		}
		if slices.Equal(want, have) {
			return poll.Success()
		}
		return poll.Continue("the mirror is different:\n%s\nand not\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}, poll.WithTimeout(20*time.Second), poll.WithDelay(20*time.Millisecond))
}

// watch collects the events of the directories, in which their paths are relative to root.
type watch struct {
	fd   int
	dirs map[int32]string
}

func newWatch(t *testing.T, root string, dirs ...string) *watch {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	w := &watch{fd: fd, dirs: make(map[int32]string)}
	for _, dir := range dirs {
		wd, err := unix.InotifyAddWatch(fd, filepath.Join(root, dir), unix.IN_CREATE|unix.IN_DELETE|unix.IN_MODIFY|unix.IN_ATTRIB|
			unix.IN_CLOSE_WRITE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
		assert.NilError(t, err)
		w.dirs[int32(wd)] = dir
	}
	return w
}

// events are those until now, repetitions left out; cookies tell which belong together.
func (w *watch) events() (all []string) {
	buf := make([]byte, 1<<16)
	cookies := map[uint32]int{}
	for {
		n, err := unix.Read(w.fd, buf)
		if err != nil || n <= 0 {
			return all
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			mask, cookie := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[8:])
			line := w.dirs[int32(binary.NativeEndian.Uint32(b))] + "/" + unix.ByteSliceToString(b[16:size])
			for bit, name := range map[uint32]string{
				unix.IN_CREATE: "CREATE", unix.IN_DELETE: "DELETE", unix.IN_MODIFY: "MODIFY", unix.IN_ATTRIB: "ATTRIB",
				unix.IN_CLOSE_WRITE: "CLOSE_WRITE", unix.IN_MOVED_FROM: "MOVED_FROM", unix.IN_MOVED_TO: "MOVED_TO",
				unix.IN_DELETE_SELF: "DELETE_SELF", unix.IN_MOVE_SELF: "MOVE_SELF", unix.IN_Q_OVERFLOW: "OVERFLOW", unix.IN_IGNORED: "IGNORED",
			} {
				if mask&bit != 0 {
					line += " " + name
				}
			}
			if mask&unix.IN_ISDIR != 0 {
				line += " DIR"
			}
			if cookie != 0 {
				if cookies[cookie] == 0 {
					cookies[cookie] = len(cookies) + 1
				}
				line += fmt.Sprintf(" %d", cookies[cookie])
			}
			if len(all) == 0 || all[len(all)-1] != line {
				all = append(all, line)
			}
			b = b[size:]
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	assert.NilError(t, err)
	_, err = f.WriteString(text)
	assert.NilError(t, err)
	assert.NilError(t, f.Close())
}

// step is a change of a tree.
type step struct {
	name string
	do   func(t *testing.T, dir string)
}

func ok(t *testing.T, err error) {
	t.Helper()
	assert.NilError(t, err)
}

// steps are what users and engines do with configuration, and what is hard to follow.
func steps() []step {
	in := filepath.Join
	return []step{
		{"write in place", func(t *testing.T, d string) { write(t, in(d, "file"), "in place") }},
		{"append", func(t *testing.T, d string) {
			f, err := os.OpenFile(in(d, "file"), os.O_WRONLY|os.O_APPEND, 0)
			ok(t, err)
			_, err = f.WriteString(" and more")
			ok(t, err)
			ok(t, f.Close())
		}},
		{"truncate", func(t *testing.T, d string) { ok(t, os.Truncate(in(d, "file"), 3)) }},
		{"open for writing only", func(t *testing.T, d string) {
			f, err := os.OpenFile(in(d, "file"), os.O_WRONLY, 0)
			ok(t, err)
			ok(t, f.Close())
		}},
		{"create", func(t *testing.T, d string) { write(t, in(d, "new"), "new") }},
		{"create empty", func(t *testing.T, d string) { write(t, in(d, "empty"), "") }},
		{"create large", func(t *testing.T, d string) { write(t, in(d, "large"), strings.Repeat("0123456789abcdef", 60<<10)) }},
		{"chmod", func(t *testing.T, d string) { ok(t, os.Chmod(in(d, "file"), 0o600)) }},
		{"chown", func(t *testing.T, d string) { ok(t, os.Chown(in(d, "file"), 1002, 1003)) }},
		{"touch", func(t *testing.T, d string) { ok(t, os.Chtimes(in(d, "file"), time.Unix(1, 0), time.Unix(2, 0))) }},
		{"chmod of a directory", func(t *testing.T, d string) { ok(t, os.Chmod(in(d, "dir"), 0o2750)) }},
		{"acl", func(t *testing.T, d string) { ok(t, unix.Setxattr(in(d, "file"), "system.posix_acl_access", acl(), 0)) }},
		{"rename", func(t *testing.T, d string) { ok(t, os.Rename(in(d, "new"), in(d, "renamed"))) }},
		{"rename over", func(t *testing.T, d string) {
			write(t, in(d, "tmp"), "rename over")
			ok(t, os.Rename(in(d, "tmp"), in(d, "file")))
		}},
		{"rename over twice", func(t *testing.T, d string) {
			for i := range 2 {
				write(t, in(d, "tmp"), fmt.Sprint("again ", i))
				ok(t, os.Rename(in(d, "tmp"), in(d, "file")))
			}
		}},
		{"rename to another directory", func(t *testing.T, d string) { ok(t, os.Rename(in(d, "renamed"), in(d, "dir/renamed"))) }},
		{"move out", func(t *testing.T, d string) { ok(t, os.Rename(in(d, "dir/renamed"), in(d, "../out"))) }},
		{"move in", func(t *testing.T, d string) { ok(t, os.Rename(in(d, "../out"), in(d, "back"))) }},
		{"move a directory out and in", func(t *testing.T, d string) {
			ok(t, os.Rename(in(d, "full"), in(d, "../full")))
			ok(t, os.Rename(in(d, "../full"), in(d, "full again")))
		}},
		{"exchange", func(t *testing.T, d string) {
			ok(t, unix.Renameat2(unix.AT_FDCWD, in(d, "file"), unix.AT_FDCWD, in(d, "back"), unix.RENAME_EXCHANGE))
		}},
		{"there and back", func(t *testing.T, d string) {
			ok(t, os.Rename(in(d, "file"), in(d, "elsewhere")))
			ok(t, os.Rename(in(d, "elsewhere"), in(d, "file")))
		}},
		{"hard link", func(t *testing.T, d string) { ok(t, os.Link(in(d, "file"), in(d, "hard"))) }},
		{"write by the other name", func(t *testing.T, d string) { write(t, in(d, "hard"), "by the other name") }},
		{"symlink", func(t *testing.T, d string) { ok(t, os.Symlink("nowhere", in(d, "link"))) }},
		{"fifo", func(t *testing.T, d string) { ok(t, unix.Mkfifo(in(d, "fifo"), 0o640)) }},
		{"remove", func(t *testing.T, d string) {
			for _, name := range []string{"hard", "link", "fifo", "large"} {
				ok(t, os.Remove(in(d, name)))
			}
		}},
		{"short life", func(t *testing.T, d string) {
			write(t, in(d, "short"), "short")
			ok(t, os.Remove(in(d, "short")))
		}},
		{"mkdir and rmdir", func(t *testing.T, d string) {
			ok(t, os.Mkdir(in(d, "short"), 0o700))
			ok(t, os.Remove(in(d, "short")))
		}},
		{"config map", func(t *testing.T, d string) { swap(t, d, "..1", "one") }},
		{"config map again", func(t *testing.T, d string) {
			swap(t, d, "..2", "two")
			ok(t, os.RemoveAll(in(d, "..1")))
		}},
		{"remove a tree", func(t *testing.T, d string) { ok(t, os.RemoveAll(in(d, "full again"))) }},
		{"strange names", func(t *testing.T, d string) {
			for _, name := range []string{"a b", "\xff\xfe", "new\nline", strings.Repeat("x", 255), "..data_tmp2", "-rf"} {
				write(t, in(d, name), name)
			}
		}},
	}
}

// acl is one that denies a user.
func acl() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 6, ^uint32(0)}, {2, 0, 1000}, {4, 4, ^uint32(0)}, {0x10, 4, ^uint32(0)}, {0x20, 4, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// swap updates a config map as the kubelet does.
func swap(t *testing.T, dir, version, text string) {
	t.Helper()
	ok(t, os.Mkdir(filepath.Join(dir, version), 0o755))
	write(t, filepath.Join(dir, version, "key"), text)
	ok(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
	ok(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
}

func populate(t *testing.T, dir string) {
	t.Helper()
	ok(t, os.MkdirAll(filepath.Join(dir, "full/deep/er"), 0o750))
	ok(t, os.Mkdir(filepath.Join(dir, "dir"), 0o755))
	write(t, filepath.Join(dir, "file"), "first")
	write(t, filepath.Join(dir, "full/deep/er/file"), "deep")
	write(t, filepath.Join(dir, "full/big"), strings.Repeat("big", 100_000))
	ok(t, os.Chown(filepath.Join(dir, "full/deep"), 7, 8))
	ok(t, os.Symlink("deep/er", filepath.Join(dir, "full/link")))
	ok(t, os.Lchown(filepath.Join(dir, "full/link"), 7, 8))
	ok(t, os.Link(filepath.Join(dir, "full/deep/er/file"), filepath.Join(dir, "full/hard")))
	ok(t, unix.Setxattr(filepath.Join(dir, "full/big"), "system.posix_acl_access", acl(), 0))
	ok(t, os.Symlink("..data/key", filepath.Join(dir, "key")))
}

// TestEvents has the same events seen in the mirror as in its source, in the same order.
func TestEvents(t *testing.T) {
	w := newWorld(t, mirror.DefaultLimits())
	populate(t, w.source)
	_, at := w.start(w.source)
	w.same(at)
	watched := []string{"", "dir"}
	host, copied := newWatch(t, w.source, watched...), newWatch(t, at, watched...)
	for _, s := range steps() {
		t.Run(s.name, func(t *testing.T) {
			s.do(t, w.source)
			assert.NilError(t, w.set.Sync(t.Context()))
			assert.DeepEqual(t, copied.events(), host.events())
			assert.DeepEqual(t, describe(t, at), describe(t, w.source))
		})
	}
	w.nothingLost()
}

// TestFile mirrors a single file: it is the inode that is followed.
func TestFile(t *testing.T) {
	w := newWorld(t, mirror.DefaultLimits())
	file := filepath.Join(w.source, "file")
	write(t, file, "first")
	_, at := w.start(file)
	read := func() string {
		t.Helper()
		assert.NilError(t, w.set.Sync(t.Context()))
		data, err := os.ReadFile(at)
		assert.NilError(t, err)
		return string(data)
	}
	pinned, err := os.Open(at) // as a container's mount does
	assert.NilError(t, err)
	defer pinned.Close()
	assert.Equal(t, read(), "first")
	write(t, file, "in place")
	assert.Equal(t, read(), "in place")

	old, err := os.OpenFile(file, os.O_WRONLY, 0)
	assert.NilError(t, err)
	defer old.Close()
	copied := newWatch(t, "/", strings.TrimPrefix(procPath(pinned), "/"))
	write(t, file+"2", "another")
	ok(t, os.Rename(file+"2", file))
	assert.NilError(t, w.set.Sync(t.Context()))
	assert.DeepEqual(t, copied.events(), []string{strings.TrimPrefix(procPath(pinned), "/") + "/ ATTRIB"})
	var st unix.Stat_t
	assert.NilError(t, unix.Fstat(int(pinned.Fd()), &st))
	assert.Equal(t, st.Nlink, uint64(0))
	_, err = old.WriteString("IN")
	assert.NilError(t, err)
	assert.NilError(t, w.set.Sync(t.Context()))
	data, err := io.ReadAll(pinned)
	assert.NilError(t, err)
	assert.Equal(t, string(data), "IN place")
	w.nothingLost()
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// TestUnfit names what cannot be mirrored, and why.
func TestUnfit(t *testing.T) {
	small := mirror.Limits{Entries: 10, GrownEntries: 20, Bytes: 1000, GrownBytes: 2000, TotalBytes: 1500, GrownTotalBytes: 3000, Depth: 3}
	for name, c := range map[string]struct {
		make func(t *testing.T, dir string)
		want string
	}{
		"many files": {func(t *testing.T, dir string) {
			for i := range 10 {
				write(t, filepath.Join(dir, fmt.Sprint(i)), "")
			}
		}, "too many files"},
		"many files below": {func(t *testing.T, dir string) {
			for i := range 5 {
				ok(t, os.MkdirAll(filepath.Join(dir, fmt.Sprint(i), "x"), 0o700))
			}
		}, "too many files"},
		"large file": {func(t *testing.T, dir string) {
			ok(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 1001), 0o600))
		}, "more than 1000 bytes"},
		"sparse file": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "f"), "")
			ok(t, os.Truncate(filepath.Join(dir, "f"), 1<<40))
		}, "more than 1000 bytes"},
		"deep": {func(t *testing.T, dir string) { ok(t, os.MkdirAll(filepath.Join(dir, "a/b/c/d"), 0o700)) }, "deeper than 3"},
		"fifo": {func(t *testing.T, dir string) { ok(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600)) }, `"fifo" is neither`},
		"device": {func(t *testing.T, dir string) {
			ok(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o600, 0x103))
		}, `"null" is neither`},
		"mount below": {func(t *testing.T, dir string) {
			ok(t, os.Mkdir(filepath.Join(dir, "mnt"), 0o700))
			ok(t, unix.Mount("tmpfs", filepath.Join(dir, "mnt"), "tmpfs", 0, ""))
			t.Cleanup(func() { ok(t, unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH)) })
		}, "mnt: something is mounted there"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, small)
			c.make(t, w.source)
			_, err := w.add(w.source)
			assert.ErrorContains(t, err, c.want)
			assert.Assert(t, errdefs.IsFailedPrecondition(err))
		})
	}
	t.Run("file system", func(t *testing.T) {
		w := newWorld(t, small)
		_, err := w.add("/proc/sys/kernel/hostname")
		assert.ErrorContains(t, err, "file system of type 0x9fa0")
	})
	t.Run("all together", func(t *testing.T) {
		w := newWorld(t, small)
		for _, name := range []string{"a", "b"} {
			ok(t, os.WriteFile(filepath.Join(w.source, name), make([]byte, 800), 0o600))
		}
		_, err := w.add(filepath.Join(w.source, "a"))
		assert.NilError(t, err)
		_, err = w.add(filepath.Join(w.source, "b"))
		assert.ErrorContains(t, err, "with the other mirrors of the pod it has 1600 bytes")
	})
}

// TestGivenUp outgrows limits and breaks the guest: the share takes the place of the mirror where that is mounted, and it is told once.
func TestGivenUp(t *testing.T) {
	small := mirror.Limits{Entries: 10, GrownEntries: 20, Bytes: 1000, GrownBytes: 2000, TotalBytes: 1500, GrownTotalBytes: 3000, Depth: 3}
	for name, c := range map[string]struct {
		outgrow func(t *testing.T, w *world)
		want    string
	}{
		"files": {func(t *testing.T, w *world) {
			for i := range 25 {
				write(t, filepath.Join(w.source, fmt.Sprint(i)), "")
			}
		}, "more than 20 files"},
		"bytes":         {func(t *testing.T, w *world) { write(t, filepath.Join(w.source, "f"), strings.Repeat("x", 2001)) }, "grown to more than 2000 bytes"},
		"a sparse file": {func(t *testing.T, w *world) { ok(t, os.Truncate(filepath.Join(w.source, "file"), 1<<40)) }, "grown to more than 2000 bytes"},
		"depth":         {func(t *testing.T, w *world) { ok(t, os.MkdirAll(filepath.Join(w.source, "a/b/c/d/e/f"), 0o700)) }, "deeper than 3"},
		"the guest refuses": {func(t *testing.T, w *world) {
			w.guest.fail.Store(true)
			write(t, filepath.Join(w.source, "file"), "x")
		}, "no space left"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, small)
			write(t, filepath.Join(w.source, "file"), "first")
			_, at := w.start(w.source)
			// Two containers, one with the tree and one with a part of it.
			dir := t.TempDir()
			for _, name := range []string{"all of it", "part"} {
				ok(t, os.Mkdir(filepath.Join(dir, name), 0o700))
			}
			bind := func(from, to string) {
				ok(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
				ok(t, unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID, ""))
				t.Cleanup(func() {
					for unix.Unmount(to, unix.MNT_DETACH) == nil {
					}
				})
			}
			bind(at, filepath.Join(dir, "all of it"))
			w.same(filepath.Join(dir, "all of it"))

			c.outgrow(t, w)
			assert.NilError(t, w.set.Sync(t.Context()))
			for _, at := range []string{at, filepath.Join(dir, "all of it")} {
				var want, have unix.Stat_t
				assert.NilError(t, unix.Stat(filepath.Join(w.source, "file"), &want))
				assert.NilError(t, unix.Stat(filepath.Join(at, "file"), &have))
				assert.Equal(t, have.Ino, want.Ino)
				assert.ErrorIs(t, os.WriteFile(filepath.Join(at, "x"), nil, 0o600), unix.EROFS)
			}
			var fs unix.Statfs_t
			assert.NilError(t, unix.Statfs(filepath.Join(dir, "all of it"), &fs))
			assert.Assert(t, fs.Flags&unix.ST_NOSUID != 0, "the mount keeps its flags")
			assert.Assert(t, cmp.Contains(<-w.lost, c.want))
			write(t, filepath.Join(w.source, "file"), "last")
			assert.NilError(t, w.set.Sync(t.Context()))
			w.nothingLost()
			ok(t, unix.Unmount(at, unix.MNT_DETACH))
		})
	}
}

// TestWriters keeps what a container may write to from being mirrored.
func TestWriters(t *testing.T) {
	w := newWorld(t, mirror.DefaultLimits())
	ok(t, os.Mkdir(filepath.Join(w.source, "sub"), 0o755))
	write(t, filepath.Join(w.source, "sub/file"), "")
	id := func(path string) mirror.FileID {
		var st unix.Stat_t
		assert.NilError(t, unix.Stat(path, &st))
		return mirror.FileID{Dev: st.Dev, Ino: st.Ino}
	}
	for _, path := range []string{w.source, filepath.Join(w.source, "sub"), filepath.Join(w.source, "sub/file")} {
		assert.NilError(t, w.set.Writable(t.Context(), "writer", []mirror.FileID{id(path)}))
		_, err := w.add(w.source)
		assert.ErrorContains(t, err, "container writer may write to it")
		w.set.Forget("writer")
		m, err := w.add(w.source)
		assert.NilError(t, err)
		assert.NilError(t, w.set.Writable(t.Context(), "writer", []mirror.FileID{id(path)}))
		_, err = m.Start(t.Context(), w.guest)
		assert.ErrorContains(t, err, "container writer may write to it")
		m.Release()
		w.set.Forget("writer")
	}
	w.nothingLost()
}

// TestShared has two users of one source, the mirror of which goes with the last.
func TestShared(t *testing.T) {
	w := newWorld(t, mirror.DefaultLimits())
	write(t, filepath.Join(w.source, "file"), "one")
	first, at := w.start(w.source)
	second, err := w.add(w.source)
	assert.NilError(t, err)
	again, err := second.Start(t.Context(), w.guest)
	assert.NilError(t, err)
	assert.Equal(t, again, at)
	second.Release()
	write(t, filepath.Join(w.source, "file"), "two")
	w.same(at)
	assert.NilError(t, first.Created(t.Context()))
}

// TestManyChanges has more changes than the kernel remembers, and others while they are followed: the outcome is right.
func TestManyChanges(t *testing.T) {
	w := newWorld(t, mirror.DefaultLimits())
	populate(t, w.source)
	_, at := w.start(w.source)
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			dir := filepath.Join(w.source, fmt.Sprint("w", i))
			for n := range 300 {
				_ = os.MkdirAll(filepath.Join(dir, "a/b"), 0o755)
				_ = os.WriteFile(filepath.Join(dir, "a/b/file"), []byte(strings.Repeat(fmt.Sprint(n), n%1000)), 0o644)
				_ = os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, fmt.Sprint("c", n%7)))
				_ = os.Rename(filepath.Join(dir, fmt.Sprint("c", n%5)), filepath.Join(w.source, fmt.Sprint("x", n%3)))
				_ = os.Symlink(fmt.Sprint(n), filepath.Join(dir, "tmp"))
				_ = os.Rename(filepath.Join(dir, "tmp"), filepath.Join(w.source, "..data"))
				_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(w.source, "file"), unix.AT_FDCWD, filepath.Join(dir, "a"), unix.RENAME_EXCHANGE)
				_ = os.RemoveAll(filepath.Join(w.source, fmt.Sprint("x", (n+1)%3)))
			}
		})
	}
	for range 5 {
		assert.NilError(t, w.set.Sync(t.Context()))
	}
	writers.Wait()
	w.same(at)
	w.nothingLost()
}

// TestOverflow loses events: the outcome is right.
func TestOverflow(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	assert.NilError(t, err)
	var most int
	_, err = fmt.Sscan(string(limit), &most)
	assert.NilError(t, err)
	if most > 100_000 {
		t.Skip("this host's queues are too long")
	}
	w := newWorld(t, mirror.DefaultLimits())
	populate(t, w.source)
	_, at := w.start(w.source)
	w.guest.hold.Lock() // the agent is slow
	write(t, filepath.Join(w.source, "file"), "held")
	for i := range most {
		name := filepath.Join(w.source, fmt.Sprint("f", i%2))
		_ = os.Remove(name)
		write(t, name, fmt.Sprint(i))
	}
	swap(t, w.source, "..1", "lost in the crowd")
	ok(t, os.RemoveAll(filepath.Join(w.source, "full")))
	ok(t, os.Chmod(filepath.Join(w.source, "dir"), 0o700))
	w.guest.hold.Unlock()
	w.same(at)
	w.nothingLost()
}
