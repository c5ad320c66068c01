package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// TestExec runs many processes in one container.
func TestExec(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"})
	assert.NilError(t, os.WriteFile(filepath.Join(bundle, "rootfs", "plain"), []byte("no program"), 0o644))
	e.OK("run", "--detach", "--bundle", bundle, "box")

	t.Run("output and status", func(t *testing.T) {
		r := e.Run("exec", "box", "sh", "-c", "echo out; echo err >&2; exit 3")
		assert.Equal(t, r.Code, 3)
		assert.Equal(t, r.Stdout, "out\n")
		assert.Equal(t, r.Stderr, "err\n")
	})
	t.Run("flags of the program are its own", func(t *testing.T) {
		assert.Equal(t, e.OK("exec", "box", "echo", "-n", "--debug", "-x"), "--debug -x")
		assert.Equal(t, e.OK("exec", "box", "--", "echo", "-t"), "-t\n")
	})
	t.Run("user, env, cwd", func(t *testing.T) {
		out := e.OK("exec", "-u", "1000:2000", "-e", "COLOR=blue", "-e", "EMPTY=", "--cwd", "/tmp", "box",
			"sh", "-c", `echo $(id -u):$(id -g) $COLOR "[$EMPTY]" $(pwd) $HOME`)
		assert.Equal(t, out, "1000:2000 blue [] /tmp /tmp\n")
	})
	t.Run("status after a signal", func(t *testing.T) {
		assert.Equal(t, e.Run("exec", "box", "sh", "-c", "kill -TERM $$").Code, 143)
		assert.Equal(t, e.Run("exec", "box", "sh", "-c", "kill -KILL $$").Code, 137)
	})
	t.Run("signals to runv exec", func(t *testing.T) {
		cmd := e.Command("exec", "box", "sh", "-c", `trap "exit 42" INT; echo ready; while :; do sleep 0.1; done`)
		stdout, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		_, err = stdout.Read(make([]byte, 1))
		assert.NilError(t, err)
		assert.NilError(t, cmd.Process.Signal(syscall.SIGINT))
		assert.Equal(t, harness.ExitCode(cmd.Wait()), 42)
	})
	t.Run("a signal while it waits to start", func(t *testing.T) {
		e.OK("pause", "box")
		cmd := e.Command("exec", "--ignore-paused", "box", "true")
		ended := make(chan harness.Result, 1)
		assert.NilError(t, cmd.Start())
		go func() { ended <- harness.Result{Code: harness.ExitCode(cmd.Wait())} }()
		harness.Eventually(t, "exec ends", func() bool {
			_ = cmd.Process.Signal(syscall.SIGINT)
			select {
			case r := <-ended:
				assert.Equal(t, r.Code, 130)
				return true
			default:
				return false
			}
		})
		e.OK("resume", "box")
		e.OK("exec", "box", "true")
	})
	t.Run("missing program", func(t *testing.T) {
		r := e.Run("exec", "box", "nosuch")
		assert.Equal(t, r.Code, 127)
		assert.Assert(t, cmp.Contains(r.Stderr, `exec: "nosuch": executable file not found in $PATH`))
		assert.Equal(t, strings.Count(r.Stderr, "\n"), 1, r.Stderr)
		r = e.Run("exec", "box", "/nosuch")
		assert.Equal(t, r.Code, 127)
		assert.Assert(t, cmp.Contains(r.Stderr, `exec: "/nosuch": stat /nosuch: no such file or directory`))
	})
	t.Run("program that is not executable", func(t *testing.T) {
		r := e.Run("exec", "box", "/plain")
		assert.Equal(t, r.Code, 126)
		assert.Assert(t, cmp.Contains(r.Stderr, `exec: "/plain": permission denied`))
	})
	t.Run("process.json", func(t *testing.T) {
		path := filepath.Join(e.Dir, "process.json")
		data, err := json.Marshal(specs.Process{
			Args: []string{"sh", "-c", "id -u; ulimit -n; grep CapEff /proc/self/status"}, Cwd: "/", Env: []string{"PATH=/bin"},
			User: specs.User{UID: 1000}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 77}},
		})
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(path, data, 0o600))
		assert.Equal(t, e.OK("exec", "--process", path, "box"), "1000\n77\nCapEff:\t0000000000000000\n")
	})
	t.Run("detached, with a pid file", func(t *testing.T) {
		pidFile := filepath.Join(e.Dir, "exec.pid")
		e.OK("exec", "-d", "--pid-file", pidFile, "box", "sh", "-c", "echo done > /tmp/detached; exec sleep 1000")
		harness.Eventually(t, "the detached process has written", func() bool {
			return e.Run("exec", "box", "cat", "/tmp/detached").Stdout == "done\n"
		})
		pid := readPID(t, pidFile)
		assert.NilError(t, syscall.Kill(pid, syscall.SIGTERM))
		harness.Eventually(t, "its process has gone", func() bool {
			return !strings.Contains(e.OK("ps", "box"), "sleep 1000\n")
		})
	})
	t.Run("a stand-in that is killed takes its process along", func(t *testing.T) {
		pidFile := filepath.Join(e.Dir, "killed.pid")
		e.OK("exec", "-d", "--pid-file", pidFile, "box", "sleep", "2000")
		assert.Assert(t, cmp.Contains(e.OK("ps", "box"), "sleep 2000"))
		assert.NilError(t, syscall.Kill(readPID(t, pidFile), syscall.SIGKILL))
		harness.Eventually(t, "its process has gone", func() bool {
			return !strings.Contains(e.OK("ps", "box"), "sleep 2000")
		})
	})
	t.Run("100 MB there and back", func(t *testing.T) { echoBytes(t, e, 100<<20) })
	t.Run("a slow reader stalls nobody", func(t *testing.T) { slowReader(t, e) })
	t.Run("a reader that goes breaks the pipe", func(t *testing.T) {
		cmd := e.Command("exec", "box", "sh", "-c", "yes; echo status $? > /tmp/yes")
		stdout, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		_, err = io.ReadFull(stdout, make([]byte, 100))
		assert.NilError(t, err)
		assert.NilError(t, stdout.Close())
		_ = cmd.Wait()
		harness.Eventually(t, "yes has ended", func() bool { return !strings.Contains(e.OK("ps", "box"), "yes\n") })
	})
	t.Run("what is left in the background writes on", func(t *testing.T) {
		cmd := e.Command("exec", "box", "sh", "-c", "(sleep 1; echo late) & echo early; exit 4")
		stdout, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		out, err := io.ReadAll(stdout)
		assert.NilError(t, err)
		assert.Equal(t, string(out), "early\nlate\n")
		assert.Equal(t, harness.ExitCode(cmd.Wait()), 4)
	})
	t.Run("terminal of runv exec -t", func(t *testing.T) { ownTerminal(t, e) })
	t.Run("terminal through a console socket", func(t *testing.T) { consoleSocket(t, e) })
	t.Run("many at once", func(t *testing.T) {
		const n = 8
		type answer struct {
			i int
			r harness.Result
		}
		answers := make(chan answer)
		for i := range n {
			go func() { answers <- answer{i, e.Run("exec", "box", "sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i))} }()
		}
		for range n {
			a := <-answers
			assert.Check(t, cmp.Equal(a.r.Code, a.i), a.r.Stderr)
			assert.Check(t, cmp.Equal(a.r.Stdout, fmt.Sprintln(a.i)))
		}
	})
	t.Run("container that does not exist", func(t *testing.T) {
		r := e.Run("exec", "nobox", "true")
		assert.Equal(t, r.Code, 255)
		assert.Assert(t, cmp.Contains(r.Stderr, "container does not exist"))
	})
}

func readPID(t *testing.T, path string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	pid, err := strconv.Atoi(string(data))
	assert.NilError(t, err)
	return pid
}

func echoBytes(t *testing.T, e *harness.Env, size int64) {
	cmd := e.Command("exec", "box", "cat")
	stdin, err := cmd.StdinPipe()
	assert.NilError(t, err)
	stdout, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	sent := sha256.New()
	go func() {
		defer stdin.Close()
		_, err := io.Copy(io.MultiWriter(stdin, sent), io.LimitReader(rand.Reader, size))
		assert.Check(t, err)
	}()
	got := sha256.New()
	n, err := io.Copy(got, stdout)
	assert.NilError(t, err)
	assert.Equal(t, n, size)
	assert.NilError(t, cmd.Wait())
	assert.DeepEqual(t, got.Sum(nil), sent.Sum(nil))
}

func slowReader(t *testing.T, e *harness.Env) {
	cmd := e.Command("exec", "box", "dd", "if=/dev/zero", "bs=65536", "count=320", "status=none")
	stdout, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	_, err = io.ReadFull(stdout, make([]byte, 1)) // and then nothing for a while
	assert.NilError(t, err)
	for range 5 {
		assert.Equal(t, e.State("box").Status, specs.StateRunning)
		assert.Equal(t, e.OK("exec", "box", "echo", "quick"), "quick\n")
	}
	n, err := io.Copy(io.Discard, stdout)
	assert.NilError(t, err)
	assert.Equal(t, n, int64(320*65536-1))
	assert.NilError(t, cmd.Wait())
}

// openTerminal makes a terminal of a size, both its ends, as a terminal emulator does.
func openTerminal(t *testing.T, width, height uint16) (pty console.Console, slave *os.File) {
	t.Helper()
	pty, path, err := console.NewPty()
	assert.NilError(t, err)
	t.Cleanup(func() { pty.Close() })
	slave, err = os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	assert.NilError(t, err)
	t.Cleanup(func() { slave.Close() })
	assert.NilError(t, pty.Resize(console.WinSize{Width: width, Height: height}))
	return pty, slave
}

// startInTerminal starts a command in a terminal of its own, as a shell does.
func startInTerminal(t *testing.T, cmd *exec.Cmd, slave *os.File) {
	t.Helper()
	startInTerminalWith(t, cmd, slave, slave)
}

// startInTerminalWith is startInTerminal with another standard output.
func startInTerminalWith(t *testing.T, cmd *exec.Cmd, slave, stdout *os.File) {
	t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, stdout, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	assert.NilError(t, cmd.Start())
}

// ownTerminal runs `runv exec -t` in a terminal, as a user's shell does.
func ownTerminal(t *testing.T, e *harness.Env) {
	pty, slave := openTerminal(t, 91, 33)
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	assert.NilError(t, err)
	cmd := e.Command("exec", "-t", "box", "sh")
	startInTerminal(t, cmd, slave)
	screen := newScreen(pty)
	screen.await(t, "# ")
	screen.send(t, "tty; stty size\n")
	screen.await(t, "/dev/pts/")
	screen.await(t, "33 91\r\n") // not CR CR LF: one terminal translates, not two
	assert.NilError(t, pty.Resize(console.WinSize{Width: 120, Height: 50}))
	harness.Eventually(t, "the new size arrives", func() bool {
		screen.send(t, "stty size\n")
		return screen.sees("50 120", 500*time.Millisecond)
	})
	screen.send(t, "sleep 3000\n")
	harness.Eventually(t, "sleep runs", func() bool { return strings.Contains(e.OK("ps", "box"), "sleep 3000") })
	screen.send(t, "\x03") // interrupts sleep, not the shell
	screen.send(t, "echo $((40+2)); exit 5\n")
	screen.await(t, "42")
	assert.Equal(t, harness.ExitCode(cmd.Wait()), 5)
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	assert.NilError(t, err)
	assert.DeepEqual(t, before, after)
}

// consoleSocket takes the terminal as containerd and conmon do.
func consoleSocket(t *testing.T, e *harness.Env) {
	path := filepath.Join(e.Dir, "console.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	assert.NilError(t, err)
	defer l.Close()
	got := make(chan *os.File, 1)
	go func() {
		defer close(got)
		conn, err := l.AcceptUnix()
		if !assert.Check(t, err) {
			return
		}
		defer conn.Close()
		oob := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
		assert.Check(t, err)
		msgs, err := unix.ParseSocketControlMessage(oob[:n])
		if !assert.Check(t, err) || !assert.Check(t, cmp.Len(msgs, 1)) {
			return
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if assert.Check(t, err) {
			got <- os.NewFile(uintptr(fds[0]), "master")
		}
	}()
	pidFile := filepath.Join(e.Dir, "tty.pid")
	e.OK("exec", "-t", "-d", "--console-socket", path, "--pid-file", pidFile, "box", "sh")
	master, ok := <-got
	assert.Assert(t, ok)
	defer master.Close()
	pty, err := console.ConsoleFromFile(master)
	assert.NilError(t, err)
	screen := newScreen(pty)
	screen.await(t, "# ")
	assert.NilError(t, pty.Resize(console.WinSize{Width: 132, Height: 43}))
	harness.Eventually(t, "the size arrives", func() bool {
		screen.send(t, "stty size\n")
		return screen.sees("43 132", 500*time.Millisecond)
	})
	screen.send(t, "exit 0\n")
	pid := readPID(t, pidFile)
	harness.Eventually(t, "the stand-in ends", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(stat, []byte(") Z "))
	})
}

// screen collects what a terminal shows.
type screen struct {
	pty  io.Writer
	text chan []byte
	seen []byte
	past []byte // what was seen before
}

func newScreen(pty io.ReadWriter) *screen {
	s := &screen{pty: pty, text: make(chan []byte, 1024)}
	go func() {
		defer close(s.text)
		for {
			buf := make([]byte, 4096)
			n, err := pty.Read(buf)
			if err != nil {
				return
			}
			s.text <- buf[:n]
		}
	}()
	return s
}

func (s *screen) send(t *testing.T, text string) {
	t.Helper()
	_, err := io.WriteString(s.pty, text)
	assert.NilError(t, err)
}

// sees tells whether text appears within a time; what came before it is forgotten then.
func (s *screen) sees(text string, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		if i := bytes.Index(s.seen, []byte(text)); i >= 0 {
			s.past = append(s.past, s.seen[:i+len(text)]...)
			s.seen = s.seen[i+len(text):]
			return true
		}
		select {
		case part, ok := <-s.text:
			if !ok {
				return false
			}
			s.seen = append(s.seen, part...)
		case <-ctx.Done():
			return false
		}
	}
}

func (s *screen) await(t *testing.T, text string) {
	t.Helper()
	if !s.sees(text, 30*time.Second) {
		t.Fatalf("the terminal does not show %q but %q", text, s.seen)
	}
}

// TestRunWithTerminal runs a shell in the foreground as a user would.
func TestRunWithTerminal(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh"}, func(s *specs.Spec) { s.Process.Terminal = true })
	pty, slave := openTerminal(t, 100, 30)
	cmd := e.Command("run", "--bundle", bundle, "web")
	startInTerminal(t, cmd, slave)
	screen := newScreen(pty)
	screen.await(t, "# ")
	screen.send(t, "stty size; ls -l /dev/console\n")
	screen.await(t, "30 100")
	assert.NilError(t, pty.Resize(console.WinSize{Width: 80, Height: 24}))
	harness.Eventually(t, "the new size arrives", func() bool {
		screen.send(t, "stty size\n")
		return screen.sees("24 80", 500*time.Millisecond)
	})
	screen.send(t, "exit 9\n")
	assert.Equal(t, harness.ExitCode(cmd.Wait()), 9)
}

// TestOutputOutlivesItsProcess reads late: the process, its VM even, have ended by then.
func TestOutputOutlivesItsProcess(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"dd", "if=/dev/zero", "bs=1000", "count=300", "status=none"})
	cmd := e.Command("run", "--bundle", bundle, "web")
	stdout, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	harness.Eventually(t, "web has stopped", func() bool {
		return strings.Contains(e.Run("state", "web").Stdout, `"stopped"`)
	})
	harness.Eventually(t, "its VM has ended", func() bool {
		return syscall.Kill(e.Pod("web").VM[0].PID, 0) != nil
	})
	<-time.After(2 * time.Second) // longer than the news of the exit wait for the reader
	n, err := io.Copy(io.Discard, stdout)
	assert.NilError(t, err)
	assert.Equal(t, n, int64(300_000))
	assert.NilError(t, cmd.Wait())
}

// TestDetachedTerminalNeedsASocket is runc's rule.
func TestDetachedTerminalNeedsASocket(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh"}, func(s *specs.Spec) { s.Process.Terminal = true })
	for _, args := range [][]string{{"create"}, {"run", "-d"}} {
		r := e.Run(append(args, "--bundle", bundle, "web")...)
		assert.Equal(t, r.Code, 1)
		assert.Assert(t, cmp.Contains(r.Stderr, "console socket"))
	}
	e.CheckNothingLeft()
}
