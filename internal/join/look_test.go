package join_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/join"
)

// sleeper is a process with some namespaces of its own.
func sleeper(t *testing.T, flags uintptr) int {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // for Pdeathsig
	assert.NilError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		runtime.UnlockOSThread()
	})
	return cmd.Process.Pid
}

func inode(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	assert.NilError(t, unix.Stat(path, &st))
	return st
}

// A namespace that a process has open is one that nobody is known to be in.
func TestLookAtAnOpenFile(t *testing.T) {
	n := sleeper(t, unix.CLONE_NEWNET)
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", n))
	assert.NilError(t, err)
	defer file.Close()
	f, err := join.Look(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()))
	assert.NilError(t, err)
	st := inode(t, fmt.Sprintf("/proc/%d/ns/net", n))
	assert.DeepEqual(t, f, join.File{Type: net, Dev: st.Dev, Ino: st.Ino})
}

func TestLookFollowsToTheProcess(t *testing.T) {
	n := sleeper(t, unix.CLONE_NEWNET)
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	assert.NilError(t, os.Symlink(fmt.Sprintf("/proc/%d/ns/pid", n), link))
	assert.NilError(t, os.Symlink("link", filepath.Join(dir, "again")))
	assert.NilError(t, os.Symlink(fmt.Sprintf("/proc/%d", n), filepath.Join(dir, "process")))
	for path, f := range map[string]join.File{
		fmt.Sprintf("/proc/%d/ns/pid", n):                     {Type: pid, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/net", n):                     {Type: net, PID: n},
		fmt.Sprintf("/proc/%d/ns/ipc", n):                     {Type: ipc, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/uts", n):                     {Type: uts, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/user", n):                    {Type: user, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/cgroup", n):                  {Type: cgroup, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/time", n):                    {Type: timens, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/mnt", n):                     {Type: "mount", PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/ns/pid_for_children", n):        {Type: pid, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/task/%d/ns/pid", n, n):          {Type: pid, PID: n, OfHost: true},
		fmt.Sprintf("/proc//%d/./task/%d/ns/../ns/pid", n, n): {Type: pid, PID: n, OfHost: true},
		fmt.Sprintf("/proc/%d/root/proc/%d/ns/pid", n, n):     {Type: pid, PID: n, OfHost: true},
		link:                                 {Type: pid, PID: n, OfHost: true},
		filepath.Join(dir, "again"):          {Type: pid, PID: n, OfHost: true},
		filepath.Join(dir, "process/ns/net"): {Type: net, PID: n},
		"/proc/self/ns/net":                  {Type: net, PID: os.Getpid(), OfHost: true},
	} {
		got, err := join.Look(path)
		assert.NilError(t, err)
		st := inode(t, path)
		f.Dev, f.Ino = st.Dev, st.Ino
		assert.DeepEqual(t, got, f)
	}
}

// A namespace that is bound to a file tells nothing of a process.
func TestLookAtBoundNamespace(t *testing.T) {
	n := sleeper(t, unix.CLONE_NEWNET)
	file := filepath.Join(t.TempDir(), "netns")
	assert.NilError(t, os.WriteFile(file, nil, 0o600))
	source := fmt.Sprintf("/proc/%d/ns/net", n)
	assert.NilError(t, unix.Mount(source, file, "", unix.MS_BIND, ""))
	defer func() { assert.Check(t, unix.Unmount(file, unix.MNT_DETACH)) }()
	got, err := join.Look(file)
	assert.NilError(t, err)
	st := inode(t, source)
	assert.DeepEqual(t, got, join.File{Type: net, Dev: st.Dev, Ino: st.Ino})
}

func TestLookRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	assert.NilError(t, unix.Mkfifo(fifo, 0o600))
	loop := filepath.Join(dir, "loop")
	assert.NilError(t, os.Symlink("loop", loop))
	plain := filepath.Join(dir, "plain")
	assert.NilError(t, os.WriteFile(plain, nil, 0o600))
	for path, want := range map[string]string{
		"":                         ": is not an absolute path",
		"proc/1/ns/net":            "proc/1/ns/net: is not an absolute path",
		fifo:                       fifo + ": is not a namespace",
		plain:                      plain + ": is not a namespace",
		dir:                        dir + ": is not a namespace",
		"/dev/tty":                 "/dev/tty: is not a namespace",
		"/proc/self/status":        "/proc/self/status: is not a namespace",
		loop:                       loop + ": too many levels of symbolic links",
		filepath.Join(dir, "none"): filepath.Join(dir, "none") + ": no such file or directory",
		"/proc/" + strconv.Itoa(1<<30) + "/ns/net": "/proc/" + strconv.Itoa(1<<30) + "/ns/net: no such file or directory",
	} {
		_, err := join.Look(path)
		assert.Error(t, err, want)
	}
}
