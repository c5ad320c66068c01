package integration

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// buildWatcher builds the watcher and returns what is in its file.
func buildWatcher(t *testing.T, e *harness.Env) []byte {
	t.Helper()
	program := filepath.Join(e.Dir, "watcher")
	build := exec.Command("go", "build", "-o", program, "runv/test/integration/watcher")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	data, err := os.ReadFile(program)
	assert.NilError(t, err)
	return data
}

// shell runs a script on the host.
func shell(t *testing.T, dir, script string) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
}

// readOnlyBind is as engines and the kubelet make them.
func readOnlyBind(source, at string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: at, Options: []string{"rbind", "rprivate", "ro"}}
}

// configMap writes a version of a config map as the kubelet does: to be called in its directory, with the new
// version's name, its content, and the old one's name.
const configMap = `
update() {
	mkdir ..$1; printf %s "$2" >..$1/key; chmod 644 ..$1/key
	ln -s ..$1 ..data_tmp; mv -T ..data_tmp ..data
	[ -z "$3" ] || rm -r ..$3
}
`

// watchSteps are what happens to files on the host, and what programs in a container see of it.
var watchSteps = []struct{ name, script string }{
	{"write in place", `echo two >file`},
	{"append", `echo three >>file`},
	{"create", `echo new >new`},
	{"rename over", `echo replaced >tmp; mv tmp file`},
	{"chmod", `chmod 600 file`},
	{"chown", `chown 1000:1001 file`},
	{"touch", `touch -d @1000000000 file`},
	{"mkdir", `mkdir made`},
	{"to a watched directory", `mv new sub/new`},
	{"out and in", `mv sub/new ../moved; mv ../moved sub/again`},
	{"delete", `rm sub/again; rmdir made`},
	{"link", `ln file hard; rm hard; ln -s file soft; rm soft`},
	{"..data swap", configMap + `update 2 two 1`},
	{"the next ..data swap", configMap + `update 3 three 2`},
	{"single file in place", `echo four >../single`},
	{"single file, attributes", `chmod 640 ../single`},
	{"single file replaced", `echo five >../other; mv ../other ../single; echo six >../single`},
}

// watchSession runs the watcher in a container of a runtime, takes the steps, and returns what it has printed by
// step and how long the last event of each took.
func watchSession(t *testing.T, dir string, cmd *exec.Cmd) (seen []string, took []time.Duration) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	cmd.Stderr = os.Stderr
	assert.NilError(t, cmd.Start())
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			lines <- scanner.Text()
		}
	}()
	until := func(end string) (text string) {
		deadline := time.After(harness.Timeout)
		for {
			select {
			case line, ok := <-lines:
				if !ok {
					t.Fatalf("the watcher ended before %q:\n%s", end, text)
				}
				if line == end {
					return text
				}
				text += line + "\n"
			case <-deadline:
				t.Fatalf("no %q in time, but\n%s", end, text)
			}
		}
	}
	until("ready")
	config := filepath.Join(dir, "config")
	for i, s := range watchSteps {
		mark := fmt.Sprintf("mark%d", i)
		shell(t, config, s.script)
		began := time.Now()
		assert.NilError(t, os.Mkdir(filepath.Join(config, mark), 0o755))
		seen = append(seen, until("/config "+mark+" CREATE DIR"))
		took = append(took, time.Since(began))
	}
	assert.NilError(t, os.Mkdir(filepath.Join(config, "end"), 0o755))
	for range lines { // until it ends
	}
	assert.NilError(t, cmd.Wait())
	return seen, took
}

// watchSource makes what is bound, and returns the directory that has it.
func watchSource(t *testing.T, e *harness.Env, name string) string {
	t.Helper()
	dir := filepath.Join(e.Dir, name)
	assert.NilError(t, os.MkdirAll(filepath.Join(dir, "config", "sub"), 0o755))
	shell(t, filepath.Join(dir, "config"), configMap+`echo one >file; update 1 one; ln -s ..data/key key; echo single >../single`)
	return dir
}

// TestWatchesLikeRunc has a program in a container see changes of the host as under runc, in the same order.
func TestWatchesLikeRunc(t *testing.T) {
	e := harness.New(t)
	watcher := buildWatcher(t, e)
	bundle := func(dir string) string {
		b := e.Bundle([]string{"/watcher", "/config", "/config/sub", "/single"}, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, readOnlyBind(filepath.Join(dir, "config"), "/config"), readOnlyBind(filepath.Join(dir, "single"), "/single"))
		})
		assert.NilError(t, os.WriteFile(filepath.Join(b, "rootfs", "watcher"), watcher, 0o755))
		return b
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("needs runc")
	}
	ctx, cancel := context.WithTimeout(t.Context(), harness.Timeout)
	defer cancel()
	dir := watchSource(t, e, "runc-source")
	b := bundle(dir)
	e.EditSpec(b, func(s *specs.Spec) { s.Version = "1.0.2" })
	oracle := exec.CommandContext(ctx, runc, "--root", filepath.Join(e.Dir, "runc"), "run", "--bundle", b, fmt.Sprintf("runv-test-%d", os.Getpid()))
	want, _ := watchSession(t, dir, oracle)
	dir = watchSource(t, e, "runv-source")
	have, took := watchSession(t, dir, e.Command("run", "--bundle", bundle(dir), "watching"))
	for i, s := range watchSteps {
		t.Run(s.name, func(t *testing.T) {
			assert.Assert(t, want[i] != "" || strings.HasPrefix(s.name, "touch"), "runc shows nothing")
			assert.Equal(t, have[i], want[i])
			t.Logf("seen %s after it was done", took[i])
		})
	}
}

// TestMirrorShowsTheSource compares what a container sees of mirrored binds with the host, while it lasts, and when it is given up.
func TestMirrorShowsTheSource(t *testing.T) {
	e := harness.New(t)
	dir := watchSource(t, e, "source")
	config := filepath.Join(dir, "config")
	shell(t, config, `echo deep >sub/deep; chown 1000:1001 sub/deep; chmod 4755 sub/deep; ln sub/deep sub/hard; touch -d @1000000000 file`)
	bind := func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, readOnlyBind(config, "/config"), readOnlyBind(filepath.Join(dir, "single"), "/single"))
	}
	e.OK("run", "-d", "--bundle", e.Bundle([]string{"sleep", "100000"}, bind), "web")
	exec := func(script string) string {
		t.Helper()
		return e.OK("exec", "web", "sh", "-c", script)
	}
	const list = `cd %s && find . ! -type d | sort | xargs stat -c '%%n %%f %%u:%%g %%s %%h %%Y'; find . -type d | sort | xargs stat -c '%%n %%f %%u:%%g'; cat file sub/deep key`
	same := func(t *testing.T) {
		t.Helper()
		want, err := execOnHost(fmt.Sprintf(list, config))
		assert.NilError(t, err)
		assert.Equal(t, exec(fmt.Sprintf(list, "/config")), want)
	}
	isMirror := func() bool { return strings.Contains(exec("stat -f -c %T /config"), "tmpfs") }

	assert.Assert(t, isMirror())
	t.Run("as at the start", same)
	t.Run("an exec sees what was changed before it", func(t *testing.T) {
		for i := range 5 {
			shell(t, config, fmt.Sprintf("echo %d >file; mkdir d%d; echo x >d%d/x", i, i, i))
			same(t)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		for _, try := range []string{"echo x >/config/file", "echo x >/config/x", "echo x >/single", "mount -o remount,rw,bind /config", "chmod 0 /config/file"} {
			r := e.Run("exec", "web", "sh", "-c", try)
			assert.Assert(t, r.Code != 0, try)
			assert.Assert(t, cmp.Regexp("(?i)read-only|not permitted|denied", r.Stderr))
		}
	})
	t.Run("a single file is the inode", func(t *testing.T) {
		shell(t, dir, "echo in place >single")
		assert.Equal(t, exec("cat /single"), "in place\n")
		shell(t, dir, "echo another >other; mv other single")
		assert.Equal(t, exec("cat /single"), "in place\n")
	})
	t.Run("another container has the same", func(t *testing.T) {
		side := e.Bundle([]string{"sleep", "100000"}, bind, sharing(e.State("web").Pid, specs.NetworkNamespace))
		e.OK("run", "-d", "--bundle", side, "side")
		id := func(container string) string {
			return e.OK("exec", container, "stat", "-c", "%d %i", "/config/file")
		}
		assert.Equal(t, id("side"), id("web"))
		e.OK("delete", "--force", "side")
		shell(t, config, "echo without the other >file")
		same(t)
	})
	t.Run("a container that may write gives it up", func(t *testing.T) {
		writer := e.Bundle([]string{"sleep", "100000"}, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: filepath.Join(config, "sub"), Destination: "/rw", Options: []string{"rbind", "rw"}})
		}, sharing(e.State("web").Pid, specs.NetworkNamespace))
		e.OK("run", "-d", "--bundle", writer, "writer")
		assert.Assert(t, !isMirror())
		assert.Equal(t, e.OK("exec", "web", "stat", "-c", "%i", "/config/sub/deep"), e.OK("exec", "writer", "stat", "-c", "%i", "/rw/deep"))
		assert.Assert(t, cmp.Contains(e.State("web").Annotations["dev.runv.lost-watches"], config+": container writer may write to it"))
		r := e.Run("exec", "web", "sh", "-c", "echo x >/config/file")
		assert.Assert(t, r.Code != 0)
		e.OK("delete", "--force", "writer")
		same(t)
	})
}

func execOnHost(script string) (string, error) {
	out, err := exec.Command("busybox", "sh", "-c", script).CombinedOutput()
	return string(out), err
}

// TestMirrorOutgrown has a small tree become a large one: its files are right, and it is told that watches are not.
func TestMirrorOutgrown(t *testing.T) {
	e := harness.New(t)
	dir := watchSource(t, e, "source")
	config := filepath.Join(dir, "config")
	e.OK("run", "-d", "--bundle", e.Bundle([]string{"sleep", "100000"}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, readOnlyBind(config, "/config"), readOnlyBind(config, "/user/config"))
	}), "web")
	assert.Assert(t, cmp.Contains(e.OK("exec", "web", "stat", "-f", "-c", "%T", "/config"), "tmpfs"))
	shell(t, config, `head -c 20000000 /dev/urandom >large`)
	sum, err := execOnHost("md5sum <" + filepath.Join(config, "large"))
	assert.NilError(t, err)
	for _, at := range []string{"/config", "/user/config"} {
		assert.Equal(t, e.OK("exec", "web", "sh", "-c", "md5sum <"+at+"/large"), sum)
		assert.Assert(t, cmp.Regexp("fuse|UNKNOWN", e.OK("exec", "web", "stat", "-f", "-c", "%T", at)))
		r := e.Run("exec", "web", "sh", "-c", "echo x >"+at+"/file")
		assert.Assert(t, r.Code != 0)
	}
	harness.Eventually(t, "the state tells it", func() bool {
		return strings.Contains(e.State("web").Annotations["dev.runv.lost-watches"], config+": it has grown to more than ")
	})
	// The supervisor's end takes all with it; the harness looks.
	assert.NilError(t, unix.Kill(e.Supervisor("web"), unix.SIGKILL))
}

// TestMirrorOff has the configuration leave all on the share.
func TestMirrorOff(t *testing.T) {
	e := harness.New(t)
	e.Setenv = map[string]string{"RUNV_MIRRORS": "off"}
	dir := watchSource(t, e, "source")
	r := e.Run("run", "--bundle", e.Bundle([]string{"stat", "-f", "-c", "%T", "/config"}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, readOnlyBind(filepath.Join(dir, "config"), "/config"))
	}), "web")
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Assert(t, cmp.Regexp("fuse|UNKNOWN", r.Stdout))
}
