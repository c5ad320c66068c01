package shareserver_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/shareserver"
)

// TestMain makes the test the program that has the server's face, and one that makes a forbidden system call.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case shareserver.Face:
			os.Exit(shareserver.Main(os.Args[2:]))
		case "steps":
			os.Exit(doSteps(os.Args[2]))
		case "call":
			os.Exit(call(os.Args[2:]))
		}
	}
	goleak.VerifyTestMain(m)
}

// pure skips a test in a program with a C library, in which rights cannot be taken from all threads. The Makefile sets
// CGO_ENABLED=0 for all that it builds.
func pure(t testing.TB) {
	t.Helper()
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPPID, 0, 0, 0); errno == unix.ENOTSUP {
		t.Skip("needs CGO_ENABLED=0")
	}
}

// A server is a running share server.
type server struct {
	dir     string // served, a shared mount
	cmd     *exec.Cmd
	control *shareserver.Client
	socket  string
	ended   chan struct{} // closed then
	err     error         // of the process
}

const patience = 20 * time.Second

// start starts a server for a new directory.
func start(t testing.TB) *server {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces")
	}
	pure(t)
	s := &server{dir: filepath.Join(t.TempDir(), "share"), ended: make(chan struct{})}
	assert.NilError(t, os.Mkdir(s.dir, 0o755))
	assert.NilError(t, unix.Mount(s.dir, s.dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(s.dir, unix.MNT_DETACH)) })
	assert.NilError(t, unix.Mount("", s.dir, "", unix.MS_PRIVATE, ""))
	assert.NilError(t, unix.Mount("", s.dir, "", unix.MS_SHARED, ""))

	s.socket = filepath.Join(filepath.Dir(s.dir), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	assert.NilError(t, err)
	defer l.Close()
	l.SetUnlinkOnClose(false)
	listener, err := l.File()
	assert.NilError(t, err)
	defer listener.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	assert.NilError(t, err)
	s.control = shareserver.NewClient(conn)

	s.cmd = shareserver.Command(s.dir, listener, theirs)
	s.cmd.Stderr = os.Stderr
	s.run(t)
	select {
	case <-s.control.Ready():
	case <-s.ended:
		t.Fatal("the server ended")
	case <-time.After(patience):
		t.Fatal("the server is not ready")
	}
	return s
}

// run starts the command, and sees to its end.
func (s *server) run(t testing.TB) {
	t.Helper()
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the server dies with the thread
		if err := s.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		s.err = s.cmd.Wait()
		close(s.ended)
	}()
	assert.NilError(t, <-started)
	t.Cleanup(func() {
		_ = s.control.Close()
		_ = s.cmd.Process.Kill()
		<-s.ended
	})
}

func (s *server) connect(t testing.TB) *vmm {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.socket, Net: "unix"})
	assert.NilError(t, err)
	return connect(t, conn)
}

// wait returns how the server ended.
func (s *server) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-s.ended:
		return s.err
	case <-time.After(patience):
		t.Fatal("the server does not end")
		return nil
	}
}

func TestEnd(t *testing.T) {
	t.Run("the VMM hangs up", func(t *testing.T) {
		s := start(t)
		v := s.connect(t)
		assert.NilError(t, v.conn.Close())
		assert.NilError(t, s.wait(t))
	})
	t.Run("the control socket is closed", func(t *testing.T) {
		s := start(t)
		assert.NilError(t, s.control.Close())
		assert.NilError(t, s.wait(t))
	})
	t.Run("the VMM breaks the protocol", func(t *testing.T) {
		s := start(t)
		v := s.connect(t)
		v.send(t, 99, nil)
		assert.Error(t, s.wait(t), "exit status 1")
	})
}

// TestSandbox looks at the server from the outside.
func TestSandbox(t *testing.T) {
	s := start(t)
	v := s.connect(t)
	v.initialize(t)
	pid := s.cmd.Process.Pid

	for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts"} {
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		assert.NilError(t, err)
		ours, err := os.Readlink("/proc/self/ns/" + ns)
		assert.NilError(t, err)
		assert.Check(t, theirs != ours, "in the host's namespace %s", ns)
	}

	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	assert.NilError(t, err)
	assert.Assert(t, len(tasks) > 4)
	// What capability.h calls CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD and SETFCAP.
	const capabilities = "00000000880000df"
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		assert.NilError(t, err)
		for name, want := range map[string]string{
			"CapInh": "0000000000000000", "CapPrm": capabilities, "CapEff": capabilities, "CapBnd": capabilities,
			"CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
		} {
			_, rest, _ := strings.Cut(string(status), "\n"+name+":")
			got, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
			assert.Check(t, got == want, "%s: %s is %s, not %s", task, name, got, want)
		}
	}

	// Nothing is mounted there but the share.
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	assert.NilError(t, err)
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		assert.Check(t, fields[4] == "/", "%s", line)
	}

	// What is mounted later comes and goes.
	sub := filepath.Join(s.dir, "sub")
	assert.NilError(t, os.Mkdir(sub, 0o755))
	assert.NilError(t, unix.Mount("tmpfs", sub, "tmpfs", 0, ""))
	assert.NilError(t, os.WriteFile(filepath.Join(sub, "file"), []byte("text"), 0o600))
	attr, err := v.request(opLookup, 1, []byte("sub\x00"))
	assert.NilError(t, err)
	node := uint64(attr[0]) | uint64(attr[1])<<8
	_, err = v.request(opLookup, node, []byte("file\x00"))
	assert.NilError(t, err)
	assert.NilError(t, unix.Unmount(sub, unix.MNT_DETACH))
	_, err = v.request(opLookup, 1, []byte("sub\x00"))
	assert.NilError(t, err)
	mounts, err = os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	assert.NilError(t, err)
	assert.Check(t, !strings.Contains(string(mounts), " /sub "), "%s", mounts)
}

// TestBadRequests shows that what is no request gets an error for an answer, and that the server goes on.
func TestBadRequests(t *testing.T) {
	s := start(t)
	v := s.connect(t)
	v.initialize(t)
	slot := <-v.free
	for name, test := range map[string]struct {
		in   []byte
		room int
		want []byte
	}{
		"nothing":        {nil, 100, append(u32s(16, 0xfffffffb), u64s(0)...)},
		"short":          {u32s(40, opGetattr), 100, append(u32s(16, 0xfffffffb), u64s(0)...)},
		"short by one":   {append(u32s(44, opOpen), u64s(7, 1, 0, 0)...)[:44], 100, append(u32s(16, 0xfffffffb), u64s(7)...)},
		"no room":        {append(u32s(56, opGetattr), u64s(7, 1, 0, 0, 0, 0)...), 20, append(u32s(16, 0xfffffffb), u64s(7)...)},
		"little room":    {append(u32s(56, opGetattr), u64s(7, 1, 0, 0, 0, 0)...), 10, append(u32s(16, 0xfffffffb), u64s(7)...)[:10]},
		"unknown":        {append(u32s(40, 99), u64s(7, 1, 0, 0)...), 100, append(u32s(16, 0xffffffda), u64s(7)...)},
		"write, no head": {append(u32s(40, opWrite), u64s(7, 1, 0, 0)...), 100, append(u32s(16, 0xfffffffb), u64s(7)...)},
		"no such node":   {append(u32s(56, opGetattr), u64s(7, 99, 0, 0, 0, 0)...), 200, append(u32s(16, 0xffffff8c), u64s(7)...)},
	} {
		t.Run(name, func(t *testing.T) {
			n := copy(v.in(slot), test.in)
			clear(v.out(slot)[:200])
			got, err := v.submit(slot, n, test.room)
			assert.NilError(t, err)
			assert.DeepEqual(t, v.out(slot)[:got], test.want)
		})
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{
		nil,
		{"--dir=/x", "--listener=3"},
		{"--dir=/x", "--listener=3", "--control=4", "more"},
		{"--dir=/x", "--listener=0", "--control=0"},
		{"--wrong"},
	} {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", append([]string{shareserver.Face}, args...)...)
		out, err := cmd.CombinedOutput()
		assert.Error(t, err, "exit status 1")
		assert.Assert(t, strings.Contains(string(out), "share server ended"), "%s", out)
	}
}
