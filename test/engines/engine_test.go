package engines

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/mountns"
	"runv/test/harness"
)

// engine is a private Docker or Podman whose containers a runtime runs.
type engine struct {
	testing.TB
	name    string // docker or podman
	runtime string // an oracle's name, or runv
	program string // path of the runtime
	dir     string // of all its files
	netns   *os.File
	env     []string                // of commands, beside this process's
	cgroup  string                  // cgroup of its containers, from the root of each hierarchy
	stop    func()                  // ends what runs between commands
	builtin map[string]func() error // lines of scripts that this program does itself
	state   string                  // the runtime's directory
	links   string                  // of its network namespace, before there were containers
}

// engineProcesses are the programs that engines leave running when the command ends that began them.
var engineProcesses = []string{"aardvark-dns", "catatonit", "conmon", "containerd", "containerd-shim", "docker-proxy", "dockerd", "netavark", "podman", "runc", "runv"}

// newEngine makes the directory and the network namespace of an engine, which end with the test.
func newEngine(t testing.TB, name, runtime string) *engine {
	t.Helper()
	e := &engine{TB: t, name: name, runtime: runtime, program: filepath.Join(harness.TreeRoot(), "bin", "runv"), stop: func() {}}
	for _, o := range harness.Oracles(t) {
		if o.Name == runtime {
			e.program = o.Path
		}
	}
	_, err := os.Stat(e.program)
	assert.NilError(t, err, "run make first")
	e.dir, err = os.MkdirTemp("", "engine") //nolint:usetesting // short, for its sockets' paths
	assert.NilError(t, err)
	t.Cleanup(e.close)
	assert.NilError(t, mountns.OnThread(e.unshareNetwork))
	assert.NilError(t, os.Mkdir(e.path("bin"), 0o755))
	self, err := os.Executable()
	assert.NilError(t, err)
	assert.NilError(t, os.Symlink(self, e.path("bin", terminalName)))
	e.env = []string{
		"PATH=" + e.path("bin") + ":/usr/sbin:/usr/bin:/sbin:/bin", // Debian's programs, whatever else the machine has
		"HOME=" + e.dir,
		"TMPDIR=" + e.dir,
		"LC_ALL=C.UTF-8",
	}
	ctx, cancel := context.WithCancel(context.Background())
	var reaper sync.WaitGroup
	reaper.Go(func() { reapOrphans(ctx) })
	t.Cleanup(func() { cancel(); reaper.Wait() })
	return e
}

// unshareNetwork makes the engine's network namespace. The thread it is called on must end.
func (e *engine) unshareNetwork() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w: %s", err, out)
	}
	var err error
	e.netns, err = os.Open("/proc/thread-self/ns/net")
	return err
}

func (e *engine) path(elem ...string) string {
	return filepath.Join(append([]string{e.dir}, elem...)...)
}

// command makes a command in the engine's network namespace. It is killed when ctx ends.
func (e *engine) command(ctx context.Context, args ...string) *exec.Cmd {
	enter := fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), e.netns.Fd())
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{enter}, args...)...)
	cmd.Env = append(os.Environ(), e.env...)
	cmd.Dir = e.dir
	return cmd
}

// do runs a command in the engine's network namespace to its end.
func (e *engine) do(args ...string) harness.Result {
	ctx, cancel := context.WithTimeout(context.Background(), harness.Timeout)
	defer cancel()
	return harness.Finish(e.command(ctx, args...))
}

// ok is do for what must succeed; it returns the output.
func (e *engine) ok(args ...string) string {
	e.Helper()
	r := e.do(args...)
	assert.Equal(e, r.Code, 0, "%s: %s", strings.Join(args, " "), r.Stderr)
	return r.Stdout
}

// ready is called once the engine answers: it gives it the image, and notes what there is.
func (e *engine) ready() {
	e.Helper()
	archive := e.path("busybox.tar")
	rootfs := e.path("rootfs")
	harness.MakeRootfs(e, rootfs)
	for name, text := range map[string]string{"etc/hostname": "image\n", "usr/share/doc/README": "from the image\n", "var/volume/seed": "seed\n"} {
		assert.NilError(e, os.MkdirAll(filepath.Dir(filepath.Join(rootfs, name)), 0o755))
		assert.NilError(e, os.WriteFile(filepath.Join(rootfs, name), []byte(text), 0o644))
	}
	for _, program := range []string{"flock", "getfacl", "inotifywait", "setfacl", "sqlite3"} {
		path, err := exec.LookPath(program)
		assert.NilError(e, err, "make deps installs it")
		harness.CopyProgram(e, rootfs, path)
	}
	e.ok("tar", "-C", rootfs, "-cf", archive, ".")
	e.ok(e.name, "import", "-c", "ENV PATH=/bin:/usr/bin", "-c", `CMD ["sh"]`, archive, "busybox")
	assert.NilError(e, os.RemoveAll(rootfs))
	assert.NilError(e, os.Remove(archive))
	e.links = e.networkLinks()
}

// close ends the engine and fails the test if it has left anything.
func (e *engine) close() {
	if e.netns == nil {
		return
	}
	if e.Failed() { // what a check has not come to
		n := e.name
		e.do("sh", "-c", fmt.Sprintf("%[1]s rm -f $(%[1]s ps -aq); %[1]s pod rm -fa; %[1]s network prune -f", n))
	}
	left := e.left()
	for deadline := time.Now().Add(20 * time.Second); left != "" && time.Now().Before(deadline); left = e.left() {
		<-time.After(50 * time.Millisecond)
	}
	if left != "" {
		e.Errorf("%s with %s has left behind before it ended:\n%s", e.name, e.runtime, left)
	}
	e.stop()
	e.netns.Close()
	left = e.leftAfter()
	for deadline := time.Now().Add(20 * time.Second); left != "" && time.Now().Before(deadline); left = e.leftAfter() {
		<-time.After(50 * time.Millisecond)
	}
	if left != "" {
		e.Errorf("%s with %s has left behind:\n%s", e.name, e.runtime, left)
	}
	assert.Check(e, harness.RemoveCgroups(e.cgroup))
	assert.Check(e, os.RemoveAll(e.dir))
}

// reapOrphans waits for the processes that engines leave to whoever is above them: some of their callers look
// whether a pid is still there.
func reapOrphans(ctx context.Context) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var reaper harness.OrphanReaper
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			reaper.Reap(engineProcesses)
		}
	}
}

// left describes what there should not be any more once all containers are removed.
func (e *engine) left() string {
	var b strings.Builder
	for _, p := range descendants() {
		if strings.HasPrefix(p.name, "containerd-shim") || strings.HasPrefix(p.name, "runv") || strings.HasPrefix(p.name, "qemu") ||
			p.name == "conmon" || p.name == "docker-proxy" || p.name == "aardvark-dns" {
			fmt.Fprintf(&b, "process %d %s: %s\n", p.pid, p.name, p.args)
		}
	}
	if links := e.networkLinks(); links != e.links {
		fmt.Fprintf(&b, "links %s, which were %s\n", links, e.links)
	}
	for _, dir := range cgroupsBelow(e.cgroup) {
		// Podman removes a pod's cgroup where it knows the controller, whatever the runtime.
		foreign := e.name == "podman" && (strings.HasPrefix(dir, "/sys/fs/cgroup/systemd/") || strings.HasPrefix(dir, "/sys/fs/cgroup/unified/"))
		if filepath.Base(dir) != "conmon" && !foreign {
			fmt.Fprintf(&b, "cgroup %s\n", dir)
		}
	}
	for _, pattern := range []string{"containers/*", "pods/*", "tmp/*"} { // runv's
		files, _ := filepath.Glob(filepath.Join(e.state, pattern))
		for _, file := range files {
			fmt.Fprintf(&b, "file %s\n", file)
		}
	}
	return b.String()
}

// leftAfter describes what is left of the engine itself.
func (e *engine) leftAfter() string {
	var b strings.Builder
	for _, p := range descendants() {
		fmt.Fprintf(&b, "process %d %s: %s\n", p.pid, p.name, p.args)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		fmt.Fprintln(&b, err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, e.dir) || strings.Contains(line, " /run/netns/netns-") {
			fmt.Fprintf(&b, "mount %s", line)
		}
	}
	return b.String()
}

// networkLinks lists the links of the engine's network namespace.
func (e *engine) networkLinks() string {
	var names []string
	for line := range strings.Lines(e.do("ip", "-o", "link").Stdout) {
		if fields := strings.Fields(line); len(fields) > 1 {
			names = append(names, strings.TrimSuffix(fields[1], ":"))
		}
	}
	return strings.Join(names, " ")
}

// cgroupsBelow lists the cgroups in one of a name, in all hierarchies.
func cgroupsBelow(name string) []string {
	var all []string
	roots, _ := filepath.Glob("/sys/fs/cgroup/*/" + name + "/*")
	for _, path := range append(roots, name) {
		if info, err := os.Stat(path); err == nil && info.IsDir() && path != name {
			all = append(all, path)
		}
	}
	return all
}

// process is one that this test has started or inherited.
type process struct {
	pid        int
	name, args string
}

// descendants lists the living processes below this one.
func descendants() []process {
	var all []process
	var walk func(pid int)
	walk = func(pid int) {
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		for _, list := range lists {
			data, _ := os.ReadFile(list)
			for field := range strings.FieldsSeq(string(data)) {
				child, err := strconv.Atoi(field)
				if err != nil {
					continue
				}
				comm, _ := os.ReadFile(filepath.Join("/proc", field, "comm"))
				args, _ := os.ReadFile(filepath.Join("/proc", field, "cmdline"))
				if len(args) > 0 { // else it is dead
					all = append(all, process{child, strings.TrimSpace(string(comm)), fmt.Sprintf("%.300s", bytes.ReplaceAll(args, []byte{0}, []byte{' '}))})
				}
				walk(child)
			}
		}
	}
	walk(os.Getpid())
	return all
}
