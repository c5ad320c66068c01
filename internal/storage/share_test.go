package storage_test

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"runv/internal/mountns"
	"runv/internal/shareserver"
	"runv/internal/storage"
)

// hostMounts is the mount namespace that the tests came from, nil without root.
var hostMounts *mountns.Host

// TestMain moves the tests to a mount namespace of their own, so that a test that crashes leaves no
// mounts behind.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == shareserver.Face {
		os.Exit(shareserver.Main(os.Args[2:]))
	}
	if os.Geteuid() == 0 {
		var err error
		if hostMounts, err = mountns.Enter(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if len(os.Args) > 2 && os.Args[1] == "serve" {
		fmt.Fprintln(os.Stderr, serve(os.Args[2]))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// serve is a process with a share: it tells the server's process when a VMM has connected, and
// then does nothing but be there to be killed.
func serve(pod string) error {
	ctx := context.Background()
	s := storage.NewShare(storage.ShareConfig{Dir: pod + "/share", Log: slog.New(slog.DiscardHandler)})
	if err := s.Start(ctx); err != nil {
		return err
	}
	conn, err := net.Dial("unix", s.Socket())
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintln(os.Stdout, s.Processes())
	<-s.Done()
	return s.Err()
}

func needsRoot(t *testing.T) {
	t.Helper()
	if hostMounts == nil {
		t.Skip("needs root, to mount")
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPPID, 0, 0, 0); errno == unix.ENOTSUP {
		t.Skip("needs CGO_ENABLED=0, which the Makefile sets: rights cannot be taken from all threads in a program with a C library")
	}
}

// newShare starts a share with a real server. At the test's end it is
// closed, and then nothing of it may be left.
func newShare(t *testing.T) (*storage.Share, storage.ShareConfig) {
	t.Helper()
	needsRoot(t)
	pod := t.TempDir()
	cfg := storage.ShareConfig{
		Dir: filepath.Join(pod, "share"), LogFile: filepath.Join(pod, "share.log"), Log: slog.New(slog.DiscardHandler),
	}
	s := storage.NewShare(cfg)
	assert.NilError(t, s.Start(t.Context()))
	t.Cleanup(func() {
		pids := s.Processes()
		assert.NilError(t, s.Close(context.Background()))
		<-s.Done()
		checkNothingLeft(t, pod, pids)
		assert.NilError(t, s.Close(context.Background()))
	})
	return s, cfg
}

func checkNothingLeft(t *testing.T, pod string, pids []int) {
	t.Helper()
	assert.DeepEqual(t, mountsBelow(t, "/proc/self/mountinfo", pod), []string{})
	entries, err := os.ReadDir(pod)
	assert.NilError(t, err)
	for _, e := range entries {
		assert.Equal(t, e.Name(), "share.log")
	}
	for _, pid := range pids {
		assert.Assert(t, !alive(pid), "process %d", pid)
	}
}

// alive tells whether a process runs: a zombie, whose parent is slow, does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// mountsBelow lists the mount points below dir, and dir if it is one.
func mountsBelow(t *testing.T, mountinfo, dir string) []string {
	t.Helper()
	data, err := os.ReadFile(mountinfo)
	assert.NilError(t, err)
	points := []string{}
	for line := range strings.Lines(string(data)) {
		if point := strings.Fields(line)[4]; point == dir || strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	return points
}

// connect does what a VMM does first. It returns the root directory that the server serves, by way of /proc.
func connect(t *testing.T, s *storage.Share) (served string) {
	t.Helper()
	conn, err := net.Dial("unix", s.Socket())
	assert.NilError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	served = fmt.Sprintf("/proc/%d/root", s.Processes()[0])
	_, err = os.Stat(served + "/proc")
	assert.ErrorIs(t, err, os.ErrNotExist) // it has left the host's root
	return served
}

// write makes a file with its directories.
func write(t *testing.T, path, content string) string {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	assert.NilError(t, os.WriteFile(path, []byte(content), 0o644))
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	return string(data)
}

// list walks a directory.
func list(t *testing.T, dir string) []string {
	t.Helper()
	names := []string{}
	// The dot goes through a link like /proc/1/root.
	assert.NilError(t, filepath.WalkDir(dir+"/.", func(path string, _ fs.DirEntry, err error) error {
		if name := strings.TrimPrefix(filepath.Clean(path), dir); name != "" {
			names = append(names, name[1:])
		}
		return err
	}))
	return names
}

func tmpfs(t *testing.T, dir string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(dir, 0o755))
	assert.NilError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(dir, 0)) })
}

func TestShareServesContainers(t *testing.T) {
	s, _ := newShare(t)
	// One is there before the VMM connects, the other comes while the VM runs.
	src := t.TempDir()
	write(t, src+"/root1/etc/hostname", "one")
	_, err := s.Add(t.Context(), "c1", storage.Root{Path: src + "/root1"}, nil)
	assert.NilError(t, err)
	served := connect(t, s)
	assert.Equal(t, read(t, served+"/c1/rootfs/etc/hostname"), "one")

	write(t, src+"/root2/etc/hostname", "two")
	write(t, src+"/data/secret", "s")
	write(t, src+"/data/public", "p")
	write(t, src+"/volume/file", "v")
	m, err := s.Add(t.Context(), "c2", storage.Root{Path: src + "/root2"}, map[int]storage.Bind{
		3: {Source: src + "/data/public"},
		7: {Source: src + "/volume"},
	})
	assert.NilError(t, err)
	assert.DeepEqual(t, m, storage.Mapping{Root: "/run/runv/share/c2/rootfs", Binds: map[int]string{
		3: "/run/runv/share/@1~coherent/public", 7: "/run/runv/share/@2~coherent/volume",
	}})
	assert.DeepEqual(t, list(t, served+"/c2"), []string{"rootfs", "rootfs/etc", "rootfs/etc/hostname"})
	assert.DeepEqual(t, list(t, served+"/@1~coherent"), []string{"public"})
	assert.DeepEqual(t, list(t, served+"/@2~coherent"), []string{"volume", "volume/file"})
	assert.Equal(t, read(t, served+"/@1~coherent/public"), "p")

	// It is coherent both ways.
	write(t, served+"/@2~coherent/volume/new", "from the guest")
	assert.Equal(t, read(t, src+"/volume/new"), "from the guest")
	write(t, served+"/c2/rootfs/tmp/x", "x")
	assert.Equal(t, read(t, src+"/root2/tmp/x"), "x")

	// Beside what is shared there is nothing to write to.
	for _, dir := range []string{"", "/c2", "/@1~coherent"} {
		assert.ErrorIs(t, os.WriteFile(served+dir+"/x", nil, 0o600), unix.EROFS)
	}

	_, err = s.Add(t.Context(), "c2", storage.Root{Path: src + "/root2"}, nil)
	assert.Assert(t, errdefs.IsAlreadyExists(err), "%v", err)
	assert.NilError(t, s.Remove("c2"))
	assert.NilError(t, s.Remove("c2"))
	assert.NilError(t, s.Remove("never added"))
	assert.DeepEqual(t, list(t, served), []string{"c1", "c1/rootfs", "c1/rootfs/etc", "c1/rootfs/etc/hostname"})
	assert.Equal(t, read(t, src+"/volume/file"), "v") // the user's files stay

	_, err = s.Add(t.Context(), "c2", storage.Root{Path: src + "/root2"}, nil)
	assert.NilError(t, err)
	assert.Equal(t, read(t, served+"/c2/rootfs/etc/hostname"), "two")
}

func TestShareReadOnly(t *testing.T) {
	s, cfg := newShare(t)
	src := t.TempDir()
	for _, name := range []string{"root", "plain", "deep", "locked"} {
		write(t, src+"/"+name+"/file", "")
		tmpfs(t, src+"/"+name+"/sub")
		write(t, src+"/"+name+"/sub/inner", "")
	}
	m, err := s.Add(t.Context(), "c", storage.Root{Path: src + "/root", ReadOnly: true}, map[int]storage.Bind{
		0: {Source: src + "/plain", ReadOnly: true},
		1: {Source: src + "/deep", ReadOnly: true, Recursive: true},
		2: {Source: src + "/deep", Recursive: true},
		3: {Source: src + "/deep/file", ReadOnly: true, Recursive: true},
		4: {Source: src + "/locked", ReadOnly: true, Recursive: true, ReadOnlyBelow: true},
		5: {Source: src + "/locked", ReadOnly: true, Recursive: true},
		6: {Source: src + "/locked", Recursive: true, ReadOnly: true},
	})
	assert.NilError(t, err)
	at := func(bind int, path string) string { // on the host
		return filepath.Join(cfg.Dir, strings.TrimPrefix(m.Binds[bind], storage.GuestDir), path)
	}
	for path, readOnly := range map[string]bool{
		cfg.Dir + "/c/rootfs/file":    true,
		cfg.Dir + "/c/rootfs/sub/new": false, // as under runc
		at(0, "file"):                 true,
		at(1, "file"):                 true, // by itself, as not all of it is read-only
		at(1, "sub/in"):               false,
		at(2, "file"):                 false,
		at(2, "sub/in"):               false,
		at(3, ""):                     true,
		at(4, "file"):                 true,
		at(4, "sub/in"):               true,
		at(5, "file"):                 true,
		at(5, "sub/in"):               false,
	} {
		err := os.WriteFile(path, nil, 0o600)
		if readOnly {
			assert.ErrorIs(t, err, unix.EROFS, path)
		} else {
			assert.NilError(t, err, path)
		}
	}
	assert.DeepEqual(t, m.HostReadOnly, map[int]bool{1: true, 5: true, 6: true})
	// Without Recursive what is mounted below is left out.
	assert.DeepEqual(t, list(t, at(0, "")), []string{"file", "sub"})
	// The sources are as writable as before.
	write(t, src+"/plain/file", "still")
	write(t, src+"/deep/sub/inner", "still")
}

// Binds of one source are one volume, which stays as long as one of them.
// What nobody else changes may be cached: the directory's name says so to the server. A bind without that promise has a
// volume of its own.
func TestShareExclusiveVolumes(t *testing.T) {
	s, _ := newShare(t)
	src := t.TempDir()
	write(t, src+"/root/x", "")
	write(t, src+"/data/file", "")
	var got []string
	for i, bind := range []storage.Bind{{Exclusive: true}, {}, {Exclusive: true, Recursive: true}, {ReadOnly: true, Recursive: true}, {Recursive: true}} {
		bind.Source = src + "/data"
		m, err := s.Add(t.Context(), fmt.Sprint("c", i), storage.Root{Path: src + "/root"}, map[int]storage.Bind{0: bind})
		assert.NilError(t, err)
		got = append(got, strings.TrimPrefix(m.Binds[0], storage.GuestDir))
	}
	assert.DeepEqual(t, got, []string{"/@1/data", "/@2~coherent/data", "/@3/data", "/@3/data", "/@4~coherent/data"})
}

func TestShareVolumes(t *testing.T) {
	s, cfg := newShare(t)
	src := t.TempDir()
	write(t, src+"/root/x", "")
	write(t, src+"/data/file", "")
	assert.NilError(t, os.Symlink("data", src+"/link"))
	root := storage.Root{Path: src + "/root"}
	add := func(id string, binds ...storage.Bind) map[int]string {
		t.Helper()
		numbered := map[int]storage.Bind{}
		for i, b := range binds {
			numbered[i] = b
		}
		m, err := s.Add(t.Context(), id, root, numbered)
		assert.NilError(t, err)
		return m.Binds
	}
	readOnly := add("r", storage.Bind{Source: src + "/data", ReadOnly: true})[0]
	a := add("a", storage.Bind{Source: src + "/data", ReadOnly: true}, storage.Bind{Source: src + "/data"}, storage.Bind{Source: src + "/data", Recursive: true})
	assert.Assert(t, a[1] != readOnly, "one that cannot be written to is none for who writes")
	assert.Equal(t, a[0], a[1])
	assert.Assert(t, a[2] != a[1], "%v", a)
	b := add("b", storage.Bind{Source: src + "/link"}, storage.Bind{Source: src + "/data/file"})
	assert.Equal(t, b[0], a[1])
	assert.Assert(t, b[1] != b[0])
	assert.NilError(t, s.Remove("a"))
	on := func(guest string) string { return filepath.Join(cfg.Dir, strings.TrimPrefix(guest, storage.GuestDir)) }
	write(t, on(b[0])+"/new", "new")
	assert.Equal(t, read(t, src+"/data/new"), "new")
	assert.NilError(t, s.Remove("r"))
	assert.Equal(t, len(mountsBelow(t, "/proc/self/mountinfo", cfg.Dir)), 1+3, "the share; the root and two volumes of b")
	assert.NilError(t, s.Remove("b"))
	assert.DeepEqual(t, list(t, cfg.Dir), []string{})
	_, err := s.Add(t.Context(), "@1", root, nil)
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	_, err = s.Add(t.Context(), "d", root, map[int]storage.Bind{0: {Source: src + "/data"}, 1: {Source: src + "/none"}})
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.DeepEqual(t, list(t, cfg.Dir), []string{})
}

func TestShareRemovesUsedContainer(t *testing.T) {
	s, cfg := newShare(t)
	served := connect(t, s)
	src := t.TempDir()
	write(t, src+"/root/file", "")
	tmpfs(t, src+"/root/sub")
	write(t, src+"/root/sub/inner", "x")
	_, err := s.Add(t.Context(), "c", storage.Root{Path: src + "/root"}, nil)
	assert.NilError(t, err)
	for _, path := range []string{served + "/c/rootfs/file", cfg.Dir + "/c/rootfs/sub/inner"} {
		f, err := os.Open(path) // as the server has open what the guest has
		assert.NilError(t, err)
		defer f.Close()
	}
	assert.NilError(t, s.Remove("c"))
	assert.DeepEqual(t, list(t, served), []string{})
	assert.DeepEqual(t, mountsBelow(t, "/proc/self/mountinfo", cfg.Dir), []string{cfg.Dir})
	// Unmounting our copy has not unmounted the user's.
	assert.Equal(t, read(t, src+"/root/sub/inner"), "x")
}

func TestShareAddFails(t *testing.T) {
	s, cfg := newShare(t)
	src := t.TempDir()
	write(t, src+"/root/file", "")
	root := storage.Root{Path: src + "/root"}
	good := storage.Bind{Source: src + "/root/file"}
	for name, test := range map[string]struct {
		id    string
		root  storage.Root
		binds map[int]storage.Bind
		kind  func(error) bool
		want  string
	}{
		"no root": {
			"c",
			storage.Root{Path: src + "/nothing"},
			nil, errdefs.IsNotFound,
			"share container c: bind " + src + "/nothing: no such file or directory",
		},
		"root is a file": {
			"c",
			storage.Root{Path: src + "/root/file"},
			nil, errdefs.IsInvalidArgument,
			"bind " + src + "/root/file: not a directory",
		},
		"relative root": {"c", storage.Root{Path: "root"}, nil, errdefs.IsInvalidArgument, `"root": not an absolute path`},
		"no source": {
			"c", root,
			map[int]storage.Bind{0: good, 1: {Source: src + "/gone"}, 2: good},
			errdefs.IsNotFound,
			"bind " + src + "/gone: no such file or directory",
		},
		"relative source": {"c", root, map[int]storage.Bind{0: {Source: "../file"}}, errdefs.IsInvalidArgument, "not an absolute path"},
		"empty id":        {"", root, nil, errdefs.IsInvalidArgument, "invalid name"},
		"id with a slash": {"a/b", root, nil, errdefs.IsInvalidArgument, "invalid name"},
		"parent":          {"..", root, nil, errdefs.IsInvalidArgument, "invalid name"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.Add(t.Context(), test.id, test.root, test.binds)
			assert.ErrorContains(t, err, test.want)
			assert.Assert(t, test.kind(err), "%v", err)
			assert.DeepEqual(t, list(t, cfg.Dir), []string{})
			assert.DeepEqual(t, mountsBelow(t, "/proc/self/mountinfo", cfg.Dir), []string{cfg.Dir})
		})
	}
	_, err := s.Add(t.Context(), "c", root, map[int]storage.Bind{0: good})
	assert.NilError(t, err)
}

// TestShareHostMounts: what the host mounts after the supervisor has left its namespace is found
// there.
func TestShareHostMounts(t *testing.T) {
	needsRoot(t)
	pod, src := t.TempDir(), t.TempDir()
	onHost := func(f func() error) { assert.NilError(t, mountns.Do(hostMounts, f)) }
	onHost(func() error { return unix.Mount("tmpfs", src, "tmpfs", 0, "size=64k") })
	defer onHost(func() error { return unix.Unmount(src, 0) })
	onHost(func() error {
		if err := os.Mkdir(src+"/root", 0o755); err != nil {
			return err
		}
		return os.WriteFile(src+"/root/file", []byte("host"), 0o644)
	})
	s := storage.NewShare(storage.ShareConfig{Dir: pod + "/share", HostMounts: hostMounts, Log: slog.New(slog.DiscardHandler)})
	assert.NilError(t, s.Start(t.Context()))
	served := connect(t, s)
	_, err := s.Add(t.Context(), "c", storage.Root{Path: src + "/root"}, map[int]storage.Bind{0: {Source: src + "/root/file"}})
	assert.NilError(t, err)
	assert.Equal(t, read(t, served+"/c/rootfs/file"), "host")
	assert.Equal(t, read(t, served+"/@1~coherent/file"), "host")
	// The host sees none of our mounts.
	onHost(func() error {
		assert.DeepEqual(t, mountsBelow(t, "/proc/thread-self/mountinfo", pod), []string{})
		return nil
	})
	pids := s.Processes()
	assert.NilError(t, s.Close(t.Context()))
	checkNothingLeft(t, pod, pids)
}

func TestServerKilled(t *testing.T) {
	s, _ := newShare(t)
	connect(t, s)
	assert.NilError(t, s.Err())
	pids := s.Processes()
	assert.NilError(t, unix.Kill(pids[0], unix.SIGKILL))
	<-s.Done()
	assert.ErrorContains(t, s.Err(), "share server ended: signal: killed; it said last: ")
	assert.Equal(t, len(s.Processes()), 0)
}

// TestSupervisorKilled: the server and the mounts do not outlive the process that made them.
func TestSupervisorKilled(t *testing.T) {
	needsRoot(t)
	pod := t.TempDir()
	cmd := exec.Command(os.Args[0], "serve", pod)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	var server int
	_, err = fmt.Fscanf(out, "[%d]\n", &server)
	killErr := cmd.Process.Kill()
	waitErr := cmd.Wait()
	assert.NilError(t, err)
	assert.NilError(t, killErr)
	assert.ErrorContains(t, waitErr, "killed")
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if alive(server) {
			return poll.Continue("%d", server)
		}
		return poll.Success()
	}, poll.WithDelay(time.Millisecond))
	assert.DeepEqual(t, list(t, pod), []string{"share", "share.sock"}) // plain files, for delete to remove
	assert.NilError(t, os.RemoveAll(pod))
}

func TestServerEndsWithVMM(t *testing.T) {
	s, _ := newShare(t)
	conn, err := net.Dial("unix", s.Socket())
	assert.NilError(t, err)
	assert.NilError(t, conn.Close())
	<-s.Done()
	assert.NilError(t, s.Err())
}

func TestStartFails(t *testing.T) {
	needsRoot(t)
	instead := func(script string) func(*exec.Cmd) error {
		return func(cmd *exec.Cmd) error {
			cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", script}
			return cmd.Start()
		}
	}
	for name, test := range map[string]struct {
		launch func(*exec.Cmd) error
		want   string
	}{
		"dies":    {instead("echo out of luck >&2; exit 3"), "start share: share server ended: exit status 3; it said last: out of luck"},
		"ends":    {instead("exit 0"), "start share: share server ended at once"},
		"missing": {func(*exec.Cmd) error { return os.ErrNotExist }, "start share: start share server: file does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := t.TempDir()
			s := storage.NewShare(storage.ShareConfig{Dir: pod + "/share", Launch: test.launch, Log: slog.New(slog.DiscardHandler)})
			assert.Error(t, s.Start(t.Context()), test.want)
			<-s.Done()
			checkNothingLeft(t, pod, nil)
			assert.NilError(t, s.Close(t.Context()))
		})
	}
	t.Run("hangs", func(t *testing.T) {
		pod := t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		s := storage.NewShare(storage.ShareConfig{Dir: pod + "/share", Launch: instead("exec sleep 1000"), Log: slog.New(slog.DiscardHandler)})
		assert.ErrorIs(t, s.Start(ctx), context.DeadlineExceeded)
		<-s.Done()
		checkNothingLeft(t, pod, nil)
	})
}

func TestLongPath(t *testing.T) {
	needsRoot(t)
	pod := filepath.Join(t.TempDir(), strings.Repeat("d", 150))
	assert.NilError(t, os.Mkdir(pod, 0o700))
	s := storage.NewShare(storage.ShareConfig{Dir: pod + "/share", Log: slog.New(slog.DiscardHandler)})
	assert.NilError(t, s.Start(t.Context()))
	assert.NilError(t, s.Close(t.Context()))
	checkNothingLeft(t, pod, nil)
}
