package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// descriptors are the standard streams that a caller gives; nil: /dev/null in both directions.
type descriptors struct {
	name string
	open [3]func(t *testing.T) *os.File
}

// oddDescriptors are those that a process cannot use as it would like.
func oddDescriptors() []descriptors {
	file := func(path string, flags int) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File {
			f, err := os.OpenFile(path, flags, 0)
			assert.NilError(t, err)
			return f
		}
	}
	pipe := func(end int) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File {
			r, w, err := os.Pipe()
			assert.NilError(t, err)
			ends := []*os.File{r, w}
			t.Cleanup(func() { ends[1-end].Close() })
			return ends[end]
		}
	}
	socket := func(kind int) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File {
			fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
			assert.NilError(t, err)
			return os.NewFile(uintptr(fd), "socket")
		}
	}
	same := func(name string, open func(*testing.T) *os.File) descriptors {
		return descriptors{name, [3]func(*testing.T) *os.File{open, open, open}}
	}
	return []descriptors{
		same("nothing special", nil),
		same("the null device to read", file(os.DevNull, os.O_RDONLY)),
		same("the null device to write", file(os.DevNull, os.O_WRONLY)),
		same("a file to read", file("/proc/self/status", os.O_RDONLY)),
		same("a directory", file("/", os.O_RDONLY)),
		same("O_PATH", file("/etc/passwd", unix.O_PATH)),
		{"the wrong ends of pipes", [3]func(*testing.T) *os.File{pipe(1), pipe(0), pipe(0)}},
		same("a socket without a peer", socket(unix.SOCK_STREAM)),
		{"a datagram socket without a peer", [3]func(*testing.T) *os.File{nil, socket(unix.SOCK_DGRAM), socket(unix.SOCK_DGRAM)}},
	}
}

// probeStdio is a script that writes into a file what it can do with its standard streams.
func probeStdio(file string) string {
	return fmt.Sprintf(`exec 9>%s
head -c 1 >/dev/null 2>&9 && echo reads >&9 || echo does not read >&9
(echo out) 2>/dev/null && echo writes >&9 || echo does not write >&9
sh -c 'echo err >&2' && echo writes errors >&9 || echo does not write errors >&9
echo end >&9`, file)
}

// TestOddDescriptors gives a process standard streams that it cannot use. It starts all the same, and its
// calls fail as under runc.
func TestOddDescriptors(t *testing.T) {
	e := harness.New(t)
	sides := runtimes(e)
	t.Cleanup(func() { harness.ReapOrphans("sh") }) // of exec --detach, which are this process's children under runc
	roots := make([]string, len(sides))
	for i, rt := range sides {
		bundle := e.Bundle([]string{"sleep", "1000"})
		roots[i] = filepath.Join(bundle, "rootfs")
		r := harness.Finish(rt.command("run", "-d", "--bundle", bundle, "box"))
		assert.Equal(t, r.Code, 0, r.Stderr)
	}
	for i, d := range oddDescriptors() {
		for _, detach := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, detached %v", d.name, detach), func(t *testing.T) {
				saw := make([]string, len(sides))
				for side, rt := range sides {
					result := fmt.Sprintf("/result-%d-%v", i, detach)
					args := []string{"exec", "box", "sh", "-c", probeStdio(result)}
					if detach {
						args = append(args[:1], append([]string{"-d"}, args[1:]...)...)
					}
					var files [3]*os.File
					for fd, open := range d.open {
						if open == nil {
							open = func(t *testing.T) *os.File {
								f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
								assert.NilError(t, err)
								return f
							}
						}
						files[fd] = open(t)
						defer files[fd].Close()
					}
					cmd := rt.command(args...)
					cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[2]
					assert.NilError(t, cmd.Run(), rt.name)
					harness.Eventually(t, "the process tells", func() bool {
						data, _ := os.ReadFile(roots[side] + result)
						saw[side] = string(data)
						return strings.HasSuffix(saw[side], "end\n")
					})
				}
				ours := saw[len(saw)-1]
				for i, theirs := range saw[:len(saw)-1] {
					// Who stays in the foreground copies, and how far he was is a matter of time.
					assert.Check(t, !detach || ours == theirs, "%s: %q, runv: %q", sides[i].name, theirs, ours)
				}
				t.Logf("%q", saw)
			})
		}
	}
}

// TestSandboxStreams creates a container as containerd creates its sandboxes: with /dev/null as output that is
// open for reading only.
func TestSandboxStreams(t *testing.T) {
	e := harness.New(t)
	for _, rt := range runtimes(e) {
		bundle := e.Bundle([]string{"sh", "-c", probeStdio("/result")})
		null, err := os.Open(os.DevNull)
		assert.NilError(t, err)
		cmd := rt.command("run", "-d", "--bundle", bundle, "sandbox")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
		assert.NilError(t, cmd.Run(), rt.name)
		assert.NilError(t, null.Close())
		var saw string
		harness.Eventually(t, "the program tells", func() bool {
			data, _ := os.ReadFile(filepath.Join(bundle, "rootfs", "result"))
			saw = string(data)
			return strings.HasSuffix(saw, "end\n")
		})
		// runc opens the container's own null device in its place, for both directions.
		assert.Equal(t, saw, "reads\nwrites\nwrites errors\nend\n", rt.name)
	}
}

// TestTerminalOfTheForeground looks at both ends of the terminals of a process in the foreground, and at what its
// caller captures.
func TestTerminalOfTheForeground(t *testing.T) {
	e := harness.New(t)
	sides := runtimes(e)
	// runc sets the terminal up while the program runs already.
	const script = `n=0; until { stty -a | grep -q -e -onlcr && test "$(stty size)" = "25 81"; } 2>/dev/null || test $n = 200; do sleep 0.05; n=$((n+1)); done
stty -a; echo ready; read line; printf "got $line\nb\r\nend\n"`
	bundle := e.Bundle([]string{"sh", "-c", script}, func(s *specs.Spec) { s.Process.Terminal = true })
	holder := e.Bundle([]string{"sleep", "1000"})
	for _, rt := range sides {
		r := harness.Finish(rt.command("run", "-d", "--bundle", holder, "box"))
		assert.Equal(t, r.Code, 0, r.Stderr)
	}
	type view struct {
		Shown, Captured       string
		Before, During, After unix.Termios
	}
	look := func(t *testing.T, rt commandLine, args []string, redirect bool) (v view) {
		pty, slave := openTerminal(t, 81, 25)
		termios := func() unix.Termios {
			got, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
			assert.NilError(t, err)
			return *got
		}
		v.Before = termios()
		cmd := rt.command(args...)
		captured := filepath.Join(t.TempDir(), "captured")
		out, err := os.Create(captured)
		assert.NilError(t, err)
		defer out.Close()
		if redirect {
			startInTerminalWith(t, cmd, slave, out)
		} else {
			startInTerminal(t, cmd, slave)
		}
		s := newScreen(pty)
		if redirect {
			harness.Eventually(t, "the program is ready", func() bool {
				data, _ := os.ReadFile(captured)
				return strings.Contains(string(data), "ready")
			})
		} else {
			s.await(t, "ready\r\n")
		}
		harness.Eventually(t, "the terminal is raw", func() bool { return termios().Lflag&unix.ICANON == 0 })
		v.During = termios()
		s.send(t, "typed\r")
		if !redirect {
			s.await(t, "end\r\n")
		}
		assert.Equal(t, harness.ExitCode(cmd.Wait()), 0)
		data, err := os.ReadFile(captured)
		assert.NilError(t, err)
		v.Captured, v.Shown, v.After = string(data), string(s.past), termios()
		return v
	}
	for name, args := range map[string][]string{
		"exec": {"exec", "-t", "box", "sh", "-c", script},
		"run":  {"run", "--bundle", bundle, "web"},
	} {
		for _, redirect := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, output redirected %v", name, redirect), func(t *testing.T) {
				var views []view
				for _, rt := range sides {
					views = append(views, look(t, rt, args, redirect))
				}
				ours := views[len(views)-1]
				for i, theirs := range views[:len(views)-1] {
					assert.Check(t, cmp.DeepEqual(ours, theirs), sides[i].name)
				}
				assert.Equal(t, ours.After, ours.Before)
				assert.Equal(t, strings.Contains(ours.Captured, "end\n"), redirect)
			})
		}
	}
}
