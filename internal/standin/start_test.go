package standin_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"runv/internal/standin"
)

// openPty returns the two ends of a terminal in raw mode.
func openPty(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = master.Close() })
	assert.NilError(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	assert.NilError(t, err)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = slave.Close() })
	return master, slave
}

// start starts a stand-in and claims it. It is killed at the test's end.
func start(t *testing.T, opts standin.StartOptions) (*standin.Process, *standin.Peer) {
	t.Helper()
	l, dir := listen(t)
	opts.PodDir, opts.Token = dir, newToken()
	s, err := standin.Start(t.Context(), opts)
	assert.NilError(t, err)
	t.Cleanup(func() {
		if s.Signal(unix.SIGKILL) == nil {
			_, _ = s.Wait()
		}
	})
	return s, await(t, l, opts.Token)
}

func TestStandIn(t *testing.T) {
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	s, p := start(t, standin.StartOptions{Stdin: inR, Stdout: outW})
	assert.Equal(t, p.PID, s.PID)
	assert.Assert(t, p.Stdin != nil && p.Stdout != nil && p.Stderr == nil)

	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", s.PID))
	assert.NilError(t, err)
	assert.Equal(t, string(comm), "runv:standin\n")
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", s.PID))
	assert.NilError(t, err)
	assert.Assert(t, !strings.Contains(string(environ), "PATH="), "%q", environ)

	// The supervisor alone holds the caller's pipes: each end is seen at once.
	assert.NilError(t, outW.Close())
	p.CloseStdio()
	_, err = outR.Read(make([]byte, 1))
	assert.Equal(t, err, io.EOF)
	assert.NilError(t, inR.Close())
	_, err = inW.WriteString("x")
	assert.ErrorIs(t, err, unix.EPIPE)

	heard := make(chan int)
	served := make(chan error, 1)
	go func() { served <- p.Serve(t.Context(), func(n int) { heard <- n }, nil) }()
	for _, n := range []unix.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGABRT, unix.SIGUSR1, unix.SIGSEGV, unix.SIGTERM,
		unix.SIGCONT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGWINCH, unix.SIGSYS, 35, 64,
	} {
		assert.NilError(t, s.Signal(n))
		assert.Equal(t, <-heard, int(n))
	}
	assert.NilError(t, p.Exit(42))
	status, err := s.Wait()
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(42))
	assert.NilError(t, <-served)
}

func TestStandInKilled(t *testing.T) {
	s, p := start(t, standin.StartOptions{})
	assert.NilError(t, s.Signal(unix.SIGKILL))
	assert.NilError(t, p.Serve(t.Context(), nil, nil))
	status, err := s.Wait()
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(137))
	assert.ErrorContains(t, p.Exit(0), "send exit status")
}

func TestStandInWithoutSupervisor(t *testing.T) {
	s, p := start(t, standin.StartOptions{})
	assert.NilError(t, p.Close())
	status, err := s.Wait()
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(137))
}

func TestStandInUnclaimed(t *testing.T) {
	dir := t.TempDir()
	l, err := standin.ListenFor(dir, time.Millisecond)
	assert.NilError(t, err)
	defer l.Close()
	s, err := standin.Start(t.Context(), standin.StartOptions{PodDir: dir, Token: newToken()})
	assert.NilError(t, err)
	status, err := s.Wait()
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(137))
}

func TestConsoleSocket(t *testing.T) {
	// The path is longer than a socket address may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	assert.NilError(t, os.Mkdir(dir, 0o700))
	socket := filepath.Join(dir, "console")
	wd, err := os.Open(dir)
	assert.NilError(t, err)
	defer wd.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/console", wd.Fd()), Net: "unix"})
	assert.NilError(t, err)
	l.SetUnlinkOnClose(false)
	defer l.Close()

	s, p := start(t, standin.StartOptions{Terminal: true, ConsoleSocket: socket})
	conn, err := l.AcceptUnix()
	assert.NilError(t, err)
	defer conn.Close()
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(name, oob)
	assert.NilError(t, err)
	assert.Equal(t, string(name[:n]), "/dev/ptmx")
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	assert.NilError(t, err)
	fds, err := unix.ParseUnixRights(&messages[0])
	assert.NilError(t, err)
	master := os.NewFile(uintptr(fds[0]), "master")
	defer master.Close()

	// It is the stand-in's controlling terminal, in a session of its own.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.PID))
	assert.NilError(t, err)
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	assert.Equal(t, fields[3], strconv.Itoa(s.PID)) // session
	assert.Assert(t, fields[4] != "0")              // tty_nr
	assert.Equal(t, fields[5], strconv.Itoa(s.PID)) // tpgid

	// Bytes pass as they are, both ways.
	assert.Assert(t, p.Terminal)
	_, err = p.Stdout.WriteString("a\nb")
	assert.NilError(t, err)
	buf := make([]byte, 16)
	_, err = io.ReadFull(master, buf[:3])
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:3]), "a\nb")
	_, err = master.WriteString("\x03\r")
	assert.NilError(t, err)
	_, err = io.ReadFull(p.Stdin, buf[:2])
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:2]), "\x03\r")

	sizes := make(chan [2]uint32)
	served := make(chan error, 1)
	go func() {
		served <- p.Serve(t.Context(), func(int) {}, func(w, h uint32) { sizes <- [2]uint32{w, h} })
	}()
	assert.NilError(t, unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: 120, Row: 40}))
	assert.Equal(t, <-sizes, [2]uint32{120, 40})

	assert.NilError(t, p.Exit(0))
	_, err = s.Wait()
	assert.NilError(t, err)
	assert.NilError(t, <-served)
	// With the stand-in and the supervisor's files gone the terminal hangs up.
	p.CloseStdio()
	_, err = master.Read(buf)
	assert.ErrorIs(t, err, unix.EIO)
}

func TestStartFails(t *testing.T) {
	_, dir := listen(t)
	for name, test := range map[string]struct {
		opts standin.StartOptions
		want string
	}{
		"no supervisor": {standin.StartOptions{PodDir: t.TempDir()}, "no such file"},
		"relative":      {standin.StartOptions{PodDir: "pod"}, `relative directory "pod"`},
		"no executable": {standin.StartOptions{PodDir: dir, Executable: "/nonexistent"}, "/nonexistent"},
		"wrong program": {standin.StartOptions{PodDir: dir, Executable: "/bin/true"}, "ended during its setup"},
		"no console":    {standin.StartOptions{PodDir: dir, Terminal: true, ConsoleSocket: "/nonexistent/sock"}, "console socket: connect to /nonexistent/sock"},
		"no terminal":   {standin.StartOptions{PodDir: dir, ConsoleSocket: "/nonexistent/sock"}, "without a terminal"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := standin.Start(t.Context(), test.opts)
			assert.ErrorContains(t, err, test.want)
			assert.ErrorContains(t, err, "start stand-in: ")
			_, err = unix.Wait4(-1, nil, unix.WNOHANG, nil)
			assert.ErrorIs(t, err, unix.ECHILD)
		})
	}
	t.Run("program that does nothing", func(t *testing.T) {
		script := filepath.Join(t.TempDir(), "hang")
		assert.NilError(t, os.WriteFile(script, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700))
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := standin.Start(ctx, standin.StartOptions{PodDir: dir, Executable: script})
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		_, err = unix.Wait4(-1, nil, unix.WNOHANG, nil)
		assert.ErrorIs(t, err, unix.ECHILD)
	})
}

func TestStarterDies(t *testing.T) {
	_, dir := listen(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	theirs := os.NewFile(uintptr(fds[1]), "setup")
	defer theirs.Close()
	cmd := exec.Command(os.Args[0], "standin", dir)
	cmd.ExtraFiles = []*os.File{theirs}
	assert.NilError(t, cmd.Start())
	assert.NilError(t, theirs.Close())
	assert.NilError(t, unix.Close(fds[0]))
	assert.ErrorContains(t, cmd.Wait(), "exit status 1")
}

func TestStartedByHand(t *testing.T) {
	for _, args := range [][]string{{"standin"}, {"standin", "/dir"}} {
		out, err := exec.Command(os.Args[0], args...).CombinedOutput()
		assert.ErrorContains(t, err, "exit status 1")
		assert.Assert(t, strings.Contains(string(out), "started by runv itself only"), "%s", out)
	}
}

// TestStandInIsSmall only reports: the number depends on the program, and a test's is not runv's.
func TestStandInIsSmall(t *testing.T) {
	s, _ := start(t, standin.StartOptions{})
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", s.PID))
		if err != nil {
			return poll.Error(err)
		}
		for line := range strings.Lines(string(data)) {
			if strings.HasPrefix(line, "Pss") || strings.HasPrefix(line, "Rss") {
				t.Log(strings.TrimSpace(line))
			}
		}
		return poll.Success()
	})
}

func TestNetworkNamespace(t *testing.T) {
	of := func(pid string) string {
		link, err := os.Readlink("/proc/" + pid + "/ns/net")
		assert.NilError(t, err)
		return link
	}
	own, _ := start(t, standin.StartOptions{NewNetNS: true})
	assert.Assert(t, of(strconv.Itoa(own.PID)) != of("self"))

	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", own.PID))
	assert.NilError(t, err)
	defer ns.Close()
	guest, _ := start(t, standin.StartOptions{NetNS: ns})
	assert.Equal(t, of(strconv.Itoa(guest.PID)), of(strconv.Itoa(own.PID)))
	plain, _ := start(t, standin.StartOptions{})
	assert.Equal(t, of(strconv.Itoa(plain.PID)), of("self"))

	null, err := os.Open(os.DevNull)
	assert.NilError(t, err)
	defer null.Close()
	_, err = standin.Start(t.Context(), standin.StartOptions{PodDir: t.TempDir(), NetNS: null})
	assert.Error(t, err, "start stand-in: enter network namespace: invalid argument")
}
