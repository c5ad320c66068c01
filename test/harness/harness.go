// Package harness runs the real bin/runv for tests: bundles, commands, and the
// proof that nothing is left.
//
// Tests that use it boot real VMs. Main must be the package's TestMain: it makes the
// test process the subreaper of everything that runv starts, as containerd's shim and conmon are,
// so that a process that is left over is a child of the test and cannot hide.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// Timeout bounds one command of a test: a VM boots in seconds, in tens of them under load.
const Timeout = 2 * time.Minute

// Main runs a package's tests with this process as subreaper and fails when
// they leave a process behind.
func Main(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests boot VMs and make mounts: run them as root")
		os.Exit(1)
	}
	if err := LeaveChroot(); err != nil {
		fmt.Fprintln(os.Stderr, "leave the chroot:", err)
		os.Exit(1)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "become subreaper:", err)
		os.Exit(1)
	}
	leave, err := enterCgroups()
	if err != nil {
		fmt.Fprintln(os.Stderr, "enter a cgroup of one's own:", err)
		os.Exit(1)
	}
	code := m.Run()
	if left := awaitNoChildren(20 * time.Second); left != "" {
		fmt.Fprintln(os.Stderr, "the tests left processes:\n"+left)
		code = 1
	}
	if err := leave(); err != nil {
		fmt.Fprintln(os.Stderr, "the tests left cgroups:", err)
		code = 1
	}
	os.Exit(code)
}

// TreeRoot is the root of the source tree.
func TreeRoot() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..")
}

// Census counts what the tests' process and its containers hold, besides what belongs to the test itself:
// equal before and after, if nothing leaks.
type Census struct {
	Processes, Descriptors, Mounts, Cgroups, Files int
}

// Census takes a census, of this process and the Env.
func (e *Env) Census() Census {
	e.t.Helper()
	count := func(pattern string) int {
		all, err := filepath.Glob(pattern)
		assert.NilError(e.t, err)
		return len(all)
	}
	c := Census{
		Processes:   strings.Count(children(), "\n"),
		Descriptors: count("/proc/self/fd/*"),
		Cgroups:     strings.Count(leftCgroups(), "\n"),
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	assert.NilError(e.t, err)
	for line := range bytes.Lines(mounts) {
		if bytes.Contains(line, []byte(e.Dir)) {
			c.Mounts++
		}
	}
	err = filepath.WalkDir(e.Root, func(_ string, _ os.DirEntry, err error) error {
		c.Files++
		if errors.Is(err, os.ErrNotExist) {
			return nil // on its way out
		}
		return err
	})
	assert.NilError(e.t, err)
	return c
}

// Env is a state directory of a test's own.
type Env struct {
	t      testing.TB
	Root   string            // --root
	Dir    string            // for bundles and files; removed after the test
	Runv   string            // the binary under test
	Extra  []string          // global flags of each command
	Setenv map[string]string // of each command
}

// New makes an Env. At the test's end it force-deletes all containers and then fails
// the test if processes, mounts or files are left.
func New(t testing.TB) *Env {
	t.Helper()
	bin := filepath.Join(TreeRoot(), "bin", "runv")
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("%v: run make first", err)
	}
	e := &Env{t: t, Dir: t.TempDir(), Runv: bin}
	e.Root = filepath.Join(e.Dir, "root")
	t.Cleanup(e.close)
	return e
}

// close removes what the test made, and checks that it is all.
func (e *Env) close() {
	if e.t.Failed() {
		e.explain()
	}
	for _, id := range e.ids() {
		if r := e.Run("delete", "--force", id); r.Code != 0 {
			e.t.Errorf("delete --force %s: %s", id, r.Stderr)
		}
	}
	e.CheckNothingLeft()
}

func (e *Env) ids() []string {
	entries, _ := os.ReadDir(filepath.Join(e.Root, "containers"))
	var ids []string
	for _, entry := range entries {
		ids = append(ids, entry.Name())
	}
	return ids
}

// CheckNothingLeft fails the test unless, within seconds, there is no process,
// mount, socket, cgroup or directory of a container or pod.
func (e *Env) CheckNothingLeft() {
	e.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		left := e.left()
		if left == "" {
			return
		}
		if time.Now().After(deadline) {
			e.t.Errorf("left behind:\n%s", left)
			return
		}
		pause()
	}
}

func (e *Env) left() string {
	var b strings.Builder
	b.WriteString(children())
	for _, sub := range []string{"containers", "pods", "tmp"} {
		entries, _ := os.ReadDir(filepath.Join(e.Root, sub))
		for _, entry := range entries {
			fmt.Fprintf(&b, "directory %s/%s\n", sub, entry.Name())
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		fmt.Fprintln(&b, err)
	}
	for line := range strings.SplitSeq(string(mounts), "\n") {
		if strings.Contains(line, e.Dir) {
			fmt.Fprintf(&b, "mount %s\n", line)
		}
	}
	b.WriteString(leftCgroups())
	return b.String()
}

// children reaps the dead children of this process that nobody waits for and
// describes the living ones that runv has started.
func children() string {
	var b strings.Builder
	reap(func(name string) bool {
		return strings.HasPrefix(name, "runv") || strings.HasPrefix(name, "qemu") ||
			strings.HasPrefix(name, "pasta")
	}, func(pid int, name string) {
		cmdline, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		fmt.Fprintf(&b, "process %d %s: %.200s\n", pid, name, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
	})
	return b.String()
}

// ReapOrphans reaps the dead processes of a name that this process has inherited. A container of runc's
// does not end before those of its processes that somebody else must wait for are gone.
func ReapOrphans(name string) {
	reap(func(n string) bool { return n == name }, func(int, string) {})
}

// An OrphanReaper reaps as ReapOrphans does, but only what was dead at the call before as well: a child that this process
// started and waits for itself is gone by then, and must not be taken from who waits. The zero value is ready.
type OrphanReaper struct{ dead map[int]bool }

// Reap looks once, at processes of these names.
func (r *OrphanReaper) Reap(names []string) {
	dead := make(map[int]bool)
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, task := range tasks {
		data, _ := os.ReadFile(task)
		for field := range strings.FieldsSeq(string(data)) {
			stat, _ := os.ReadFile(filepath.Join("/proc", field, "stat"))
			_, rest, _ := strings.Cut(string(stat), " (")
			name, rest, _ := strings.Cut(rest, ") ")
			pid, err := strconv.Atoi(field)
			if err != nil || !slices.Contains(names, name) || !strings.HasPrefix(rest, "Z") {
				continue
			}
			if !r.dead[pid] {
				dead[pid] = true
				continue
			}
			var status syscall.WaitStatus
			_, _ = syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		}
	}
	r.dead = dead
}

// reap reaps this process's dead children with certain names, and tells of the living ones.
func reap(which func(name string) bool, living func(pid int, name string)) {
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, task := range tasks {
		data, _ := os.ReadFile(task)
		for field := range strings.FieldsSeq(string(data)) {
			pid, _ := strconv.Atoi(field)
			comm, _ := os.ReadFile(filepath.Join("/proc", field, "comm"))
			name := strings.TrimSpace(string(comm))
			if !which(name) {
				continue
			}
			var status syscall.WaitStatus
			if got, _ := syscall.Wait4(pid, &status, syscall.WNOHANG, nil); got != pid {
				living(pid, name)
			}
		}
	}
}

func awaitNoChildren(limit time.Duration) string {
	for deadline := time.Now().Add(limit); ; pause() {
		left := children()
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

// pause is the interval of the harness's polling for what has no event.
func pause() { <-time.After(10 * time.Millisecond) }

// Eventually fails the test unless cond comes true within seconds.
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); pause() {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr string
	Code           int // exit status; 128+n when killed by signal n
	Took           time.Duration
}

// Command makes a runv command that the caller runs. It is killed after Timeout.
func (e *Env) Command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	e.t.Cleanup(cancel)
	global := append([]string{"--root", e.Root}, e.Extra...)
	cmd := exec.CommandContext(ctx, e.Runv, append(global, args...)...)
	cmd.Env = os.Environ()
	for k, v := range e.Setenv {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

// Run runs runv without input.
func (e *Env) Run(args ...string) Result { return e.RunInput(nil, args...) }

// RunInput runs runv with this standard input.
func (e *Env) RunInput(stdin io.Reader, args ...string) Result {
	e.t.Helper()
	cmd := e.Command(args...)
	cmd.Stdin = stdin
	return Finish(cmd)
}

// Finish runs a command to its end and returns what it wrote until then. Output goes
// through files: a detached container keeps its stdout open, and a pipe would be waited for.
func Finish(cmd *exec.Cmd) Result {
	var files [2]*os.File
	for i, w := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		if *w != nil {
			continue
		}
		f, err := os.CreateTemp("", "runv-test-output")
		if err != nil {
			return Result{Code: -1, Stderr: err.Error()}
		}
		defer f.Close()
		defer os.Remove(f.Name())
		files[i], *w = f, f
	}
	began := time.Now()
	err := cmd.Run()
	r := Result{Code: ExitCode(err), Took: time.Since(began)}
	for i, text := range []*string{&r.Stdout, &r.Stderr} {
		if files[i] != nil {
			data, _ := os.ReadFile(files[i].Name())
			*text = string(data)
		}
	}
	if r.Code < 0 {
		r.Stderr += err.Error()
	}
	return r
}

// ExitCode is the exit status that err of exec.Cmd stands for; -1 when the command did not run.
func ExitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return exit.ExitCode()
	}
	return -1
}

// OK runs runv, fails the test unless it exits with 0, and returns its output.
func (e *Env) OK(args ...string) string {
	e.t.Helper()
	r := e.Run(args...)
	if r.Code != 0 {
		e.t.Fatalf("runv %s: exit status %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Bundle makes a bundle whose root file system is busybox and whose process runs
// args, and returns its path. edit may change the configuration.
func (e *Env) Bundle(args []string, edit ...func(*specs.Spec)) string {
	e.t.Helper()
	dir, err := os.MkdirTemp(e.Dir, "bundle")
	assert.NilError(e.t, err)
	MakeRootfs(e.t, filepath.Join(dir, "rootfs"))
	cmd := exec.Command(e.Runv, "spec", "--bundle", dir)
	out, err := cmd.CombinedOutput()
	assert.NilError(e.t, err, "%s", out)
	e.EditSpec(dir, func(s *specs.Spec) {
		s.Process.Terminal = false
		s.Process.Args = args
		s.Root.Readonly = false
	})
	for _, f := range edit {
		e.EditSpec(dir, f)
	}
	return dir
}

// EditSpec changes a bundle's configuration.
func (e *Env) EditSpec(dir string, edit func(*specs.Spec)) {
	e.t.Helper()
	path := filepath.Join(dir, "config.json")
	data, err := os.ReadFile(path)
	assert.NilError(e.t, err)
	var s specs.Spec
	assert.NilError(e.t, json.Unmarshal(data, &s))
	edit(&s)
	data, err = json.MarshalIndent(&s, "", "\t")
	assert.NilError(e.t, err)
	assert.NilError(e.t, os.WriteFile(path, data, 0o600))
}

// MakeRootfs makes a root file system of the host's static busybox.
func MakeRootfs(t testing.TB, dir string) {
	t.Helper()
	assert.NilError(t, WriteRootfs(dir))
}

// WriteRootfs is MakeRootfs for programs that are no test.
func WriteRootfs(dir string) error {
	const busybox = "/bin/busybox"
	for _, sub := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return fmt.Errorf("%w: install busybox-static", err)
	}
	for name, data := range map[string][]byte{
		"bin/busybox": program,
		"etc/passwd":  []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"),
		"etc/group":   []byte("root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o755); err != nil {
			return err
		}
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return err
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil {
			return err
		}
	}
	return nil
}

// CopyProgram copies a program of the host, with the libraries that it needs, to the same places in a root file system.
func CopyProgram(t testing.TB, rootfs, path string) {
	t.Helper()
	CopyFile(t, rootfs, path)
	out, err := exec.Command("ldd", path).Output()
	assert.NilError(t, err)
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") {
			CopyFile(t, rootfs, word)
		}
	}
}

// CopyFile copies a file of the host to the same place in a root file system.
func CopyFile(t testing.TB, rootfs, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	target := filepath.Join(rootfs, path)
	assert.NilError(t, os.MkdirAll(filepath.Dir(target), 0o755))
	assert.NilError(t, os.WriteFile(target, data, 0o755))
}

// State is what `runv state` prints.
type State struct {
	specs.State
	Rootfs  string `json:"rootfs"`
	Created string `json:"created"`
}

// State returns a container's state.
func (e *Env) State(id string) State {
	e.t.Helper()
	var s State
	assert.NilError(e.t, json.Unmarshal([]byte(e.OK("state", id)), &s))
	return s
}

// AwaitStatus waits until a container has a status.
func (e *Env) AwaitStatus(id string, status specs.ContainerState) {
	e.t.Helper()
	Eventually(e.t, fmt.Sprintf("%s becomes %s", id, status), func() bool { return e.State(id).Status == status })
}

// PodDir is the directory of a container's pod.
func (e *Env) PodDir(id string) string {
	e.t.Helper()
	dir, err := filepath.EvalSymlinks(filepath.Join(e.Root, "containers", id, "pod"))
	assert.NilError(e.t, err)
	return dir
}

// Pod is what the tests read of pod.json.
type Pod struct {
	Supervisor struct {
		PID int `json:"pid"`
	} `json:"supervisor"`
	VM []struct {
		PID int `json:"pid"`
	} `json:"vm"`
	Command []string `json:"command"`
	Phases  []struct {
		Name string  `json:"name"`
		MS   float64 `json:"ms"`
	} `json:"phases"`
}

// Pod reads the record of a container's pod. VM[0] is QEMU, VM[1] the share server.
func (e *Env) Pod(id string) Pod {
	e.t.Helper()
	data, err := os.ReadFile(filepath.Join(e.PodDir(id), "pod.json"))
	assert.NilError(e.t, err)
	var p Pod
	assert.NilError(e.t, json.Unmarshal(data, &p))
	return p
}

// explain prints what one needs to understand a failure.
func (e *Env) explain() {
	logs, _ := filepath.Glob(filepath.Join(e.Root, "pods", "*", "*.log"))
	for _, path := range logs {
		data, err := os.ReadFile(path)
		if err != nil || len(data) == 0 {
			continue
		}
		if len(data) > 8<<10 {
			data = data[len(data)-8<<10:]
		}
		e.t.Logf("--- %s\n%s", path, data)
	}
	pods, _ := filepath.Glob(filepath.Join(e.Root, "pods", "*", "pod.json"))
	for _, path := range pods {
		data, _ := os.ReadFile(path)
		e.t.Logf("--- %s\n%s", path, data)
	}
}

// Supervisor is the pid of a container's supervisor, 0 if there is none yet.
func (e *Env) Supervisor(id string) int {
	data, err := os.ReadFile(filepath.Join(e.Root, "containers", id, "pod", "pod.json"))
	if err != nil {
		return 0
	}
	var p Pod
	if json.Unmarshal(data, &p) != nil {
		return 0
	}
	return p.Supervisor.PID
}

// OpenFiles counts the descriptors of a process, without those that only name a file (O_PATH): of these the share server keeps
// a bounded number for files that the guest knows.
func OpenFiles(t testing.TB, pid int) (n int) {
	t.Helper()
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	assert.NilError(t, err)
	for _, info := range infos {
		data, err := os.ReadFile(info)
		if errors.Is(err, os.ErrNotExist) {
			continue // it was closed meanwhile
		}
		assert.NilError(t, err)
		_, rest, _ := strings.Cut(string(data), "flags:")
		word, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
		flags, err := strconv.ParseUint(word, 8, 64)
		assert.NilError(t, err, "%s", data)
		if flags&unix.O_PATH == 0 {
			n++
		}
	}
	return n
}
