package container_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/cgroup"
	"runv/internal/guest/container"
	"runv/internal/guest/eventlog"
	"runv/internal/guest/reaper"
	"runv/internal/guest/stage"
	"runv/internal/guest/stdio"
)

const busybox = "/bin/busybox"

func TestMain(m *testing.M) {
	if os.Args[0] == stage.Name {
		stage.Main()
	}
	os.Exit(m.Run())
}

// world is a set of containers on this machine instead of in a virtual one.
type world struct {
	t         *testing.T
	set       *container.Set
	events    *eventlog.Log
	rootfs    string
	filter    *agentv1.Seccomp   // of the containers to create
	inherited *agentv1.Inherited // of all that is made
	execs     int                // that execOutput has made
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat(busybox); err != nil {
		t.Skip("needs a static busybox")
	}
	if inChroot(t) {
		t.Skip("in a chroot containers are not made as in the guest: the root is not their mount namespace's")
	}
	w := &world{t: t, events: eventlog.New(), rootfs: t.TempDir()}
	for _, dir := range []string{"bin", "etc", "proc", "sys", "dev", "tmp"} {
		assert.NilError(t, os.Mkdir(filepath.Join(w.rootfs, dir), 0o755))
	}
	data, err := os.ReadFile(busybox)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "bin/busybox"), data, 0o755))
	for _, name := range []string{"sh", "cat", "sleep", "true", "id", "ls", "readlink", "stat", "grep", "mkfifo", "tty", "stty", "cut", "tr", "touch"} {
		assert.NilError(t, os.Symlink("busybox", filepath.Join(w.rootfs, "bin", name)))
	}

	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	r := reaper.New(log)
	hierarchy, err := cgroup.Open(mountCgroups(t))
	assert.NilError(t, err)
	w.set, err = container.NewSet(container.Config{Exe: "/proc/self/exe", Reaper: r, Events: w.events, Cgroups: hierarchy, Log: log})
	assert.NilError(t, err)
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	running.Go(func() { hierarchy.Watch(ctx) })
	t.Cleanup(func() {
		for _, c := range w.set.All() {
			assert.Check(t, c.Delete(ctx))
		}
		cancel()
		running.Wait()
	})
	return w
}

// inChroot tells whether / is another directory than the root of the mount
// namespace, to which setns leads.
func inChroot(t *testing.T) bool {
	t.Helper()
	inode := func() [2]uint64 {
		var st unix.Stat_t
		assert.Check(t, unix.Stat("/", &st))
		return [2]uint64{st.Dev, st.Ino}
	}
	before := inode()
	after := make(chan [2]uint64)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		defer close(after)
		fd, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if !assert.Check(t, err) {
			return
		}
		defer unix.Close(fd)
		if assert.Check(t, unix.Unshare(unix.CLONE_FS)) && assert.Check(t, unix.Setns(fd, unix.CLONE_NEWNS)) {
			after <- inode()
		}
	}()
	return <-after != before
}

// mountCgroups returns the path for a hierarchy of the test's own.
func mountCgroups(t *testing.T) string {
	t.Helper()
	mnt := t.TempDir()
	if err := unix.Mount("cgroup2", mnt, "cgroup2", 0, ""); err != nil {
		t.Skipf("needs cgroup v2: %v", err)
	}
	dir := filepath.Join(mnt, fmt.Sprintf("runv-test-%d", os.Getpid()))
	t.Cleanup(func() {
		assert.Check(t, os.Remove(dir))
		assert.Check(t, unix.Unmount(mnt, 0))
	})
	return dir
}

// run is a process's input and output as the host has them.
type run struct {
	streams stdio.Streams
	stdin   net.Conn
	out     [3]*bytes.Buffer
	copying sync.WaitGroup
}

func newRun(terminal bool) *run {
	r := &run{}
	for fd := range 3 {
		if terminal && fd == 2 {
			continue
		}
		host, guest := net.Pipe()
		r.streams[fd] = guest
		if fd == 0 {
			r.stdin = host
			continue
		}
		r.out[fd] = &bytes.Buffer{}
		r.copying.Go(func() { _, _ = io.Copy(r.out[fd], host) })
	}
	return r
}

// spec is the default of `runc spec`, more or less.
func (w *world) spec(args ...string) *specs.Spec {
	caps := []string{"CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	return &specs.Spec{
		Root:     &specs.Root{Path: w.rootfs},
		Hostname: "box",
		Process: &specs.Process{
			Args:         args,
			Env:          []string{"PATH=/bin"},
			Cwd:          "/",
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 1024}},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths:   []string{"/proc/version", "/proc/acpi", "/nowhere"},
			ReadonlyPaths: []string{"/proc/sys", "/nowhere"},
		},
	}
}

func (w *world) create(id string, spec *specs.Spec) (*run, error) {
	data, err := json.Marshal(spec)
	assert.NilError(w.t, err)
	r := newRun(spec.Process.Terminal)
	_, err = w.set.Create(w.t.Context(), &agentv1.CreateRequest{Id: id, Bundle: "/the/bundle", Spec: data, Seccomp: w.filter, Inherited: w.inherited}, r.streams)
	return r, err
}

func (w *world) start(id string) error {
	c, err := w.set.Get(id)
	assert.NilError(w.t, err)
	return c.Start(w.t.Context())
}

func (w *world) exec(id, execID string, p *specs.Process) (*run, error) {
	c, err := w.set.Get(id)
	assert.NilError(w.t, err)
	data, err := json.Marshal(p)
	assert.NilError(w.t, err)
	r := newRun(p.Terminal)
	_, err = c.Exec(w.t.Context(), &agentv1.ExecRequest{ContainerId: id, ExecId: execID, Process: data, Inherited: w.inherited}, r.streams)
	return r, err
}

// end waits for a process's exit and for its output to be sent.
func (w *world) end(id, execID string) (status uint32, drained *agentv1.Drained) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	for after := uint64(0); ; {
		events, err := w.events.After(ctx, after)
		assert.NilError(w.t, err)
		for _, ev := range events {
			after = ev.Seq
			if ev.ContainerId != id || ev.ExecId != execID {
				continue
			}
			if e := ev.GetExit(); e != nil {
				status = e.Status
			}
			if d := ev.GetDrained(); d != nil {
				return status, d
			}
		}
	}
}

// output runs a container to its end and returns its output.
func (w *world) output(id string, spec *specs.Spec) string {
	w.t.Helper()
	r, err := w.create(id, spec)
	assert.NilError(w.t, err)
	assert.NilError(w.t, w.start(id))
	status, _ := w.end(id, "")
	r.copying.Wait()
	assert.Equal(w.t, status, uint32(0), "%s%s", r.out[1], r.out[2])
	return r.out[1].String()
}

func TestRun(t *testing.T) {
	w := newWorld(t)
	r, err := w.create("a", w.spec("sh", "-c", "echo out; echo error >&2; cat; exit 7"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	_, err = r.stdin.Write([]byte("in\n"))
	assert.NilError(t, err)
	assert.NilError(t, r.stdin.Close())
	status, drained := w.end("a", "")
	r.copying.Wait()
	assert.Equal(t, status, uint32(7))
	assert.Equal(t, r.out[1].String(), "out\nin\n")
	assert.Equal(t, r.out[2].String(), "error\n")
	assert.Equal(t, drained.StdoutBytes, uint64(7))
	assert.Equal(t, drained.StderrBytes, uint64(6))
	assert.ErrorIs(t, w.start("a"), errdefs.ErrFailedPrecondition)
}

// filter makes sync kill and another system call fail with ENOSYS.
func filter(t *testing.T, denied uint32) *agentv1.Seccomp {
	t.Helper()
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SYNC, SkipFalse: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_KILL_PROCESS},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: denied, SkipFalse: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	})
	assert.NilError(t, err)
	f := &agentv1.Seccomp{}
	for _, in := range raw {
		f.Program = binary.LittleEndian.AppendUint16(f.Program, in.Op)
		f.Program = append(f.Program, in.Jt, in.Jf)
		f.Program = binary.LittleEndian.AppendUint32(f.Program, in.K)
	}
	return f
}

func TestSeccomp(t *testing.T) {
	w := newWorld(t)
	w.filter = filter(t, unix.SYS_MKDIR)
	for _, noNewPrivs := range []bool{false, true} {
		for _, uid := range []uint32{0, 1000} {
			id := fmt.Sprint("box", noNewPrivs, uid)
			spec := w.spec("sh", "-c", "grep -E '^(Seccomp|CapPrm|CapEff):' /proc/self/status; busybox mkdir /tmp/x; busybox sync; echo $?; cat")
			spec.Process.NoNewPrivileges = noNewPrivs
			spec.Process.User.UID = uid
			r, err := w.create(id, spec)
			assert.NilError(t, err)
			assert.NilError(t, w.start(id))
			exec, err := w.exec(id, "x", spec.Process)
			assert.NilError(t, err)
			for i, r := range []*run{exec, r} {
				assert.NilError(t, r.stdin.Close())
				status, _ := w.end(id, []string{"x", ""}[i])
				r.copying.Wait()
				assert.Equal(t, status, uint32(0))
				set := "0000000020000420"
				if uid != 0 {
					set = "0000000000000000"
				}
				assert.Equal(t, r.out[1].String(), "CapPrm:\t"+set+"\nCapEff:\t"+set+"\nSeccomp:\t2\n159\n")
				assert.Assert(t, is.Contains(r.out[2].String(), "Function not implemented"))
			}
		}
	}
}

func TestBadSeccomp(t *testing.T) {
	w := newWorld(t)
	for name, f := range map[string]*agentv1.Seccomp{
		"empty":     {},
		"odd":       {Program: make([]byte, 9)},
		"too large": {Program: make([]byte, 8*4097)},
		"flags":     {Program: make([]byte, 8), Flags: unix.SECCOMP_FILTER_FLAG_NEW_LISTENER},
	} {
		w.filter = f
		_, err := w.create("bad", w.spec("true"))
		assert.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	// What only the kernel can tell fails when the program is to begin.
	w.filter = &agentv1.Seccomp{Program: make([]byte, 8)}
	_, err := w.create("bad", w.spec("true"))
	assert.NilError(t, err)
	assert.ErrorContains(t, w.start("bad"), "load seccomp filter: invalid argument")
	// Without no_new_privs a last capset comes after the filter.
	w.filter = filter(t, unix.SYS_CAPSET)
	_, err = w.create("strict", w.spec("true"))
	assert.NilError(t, err)
	assert.ErrorContains(t, w.start("strict"), "set capabilities: function not implemented")
}

func TestContainerIsAsSpecified(t *testing.T) {
	w := newWorld(t)
	spec := w.spec("sh", "-c", `
cat /proc/sys/kernel/hostname; id -u; id -g; id -G; pwd; umask; echo $HOME $A
while read k v; do case $k in CapEff:|CapBnd:|NoNewPrivs:) echo $k $v;; esac; done < /proc/self/status
readlink /dev/fd; readlink /dev/ptmx; stat -c %t:%T:%a /dev/null
ulimit -n; echo $$; grep ^0: /proc/self/cgroup
echo x > /file || echo read-only root
echo x > /proc/sys/kernel/hostname || echo read-only path
cat /proc/version && echo masked file; ls /proc/acpi && echo masked directory
echo x > /data/file || echo read-only bind
cat /copied/file /single`)
	umask := uint32(0o27)
	spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5}, Umask: &umask}
	spec.Process.Env = append(spec.Process.Env, "A=1", "A=2")
	spec.Process.Cwd = "/made/dir"
	spec.Process.NoNewPrivileges = true
	spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 88}}
	spec.Root.Readonly = true
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "etc/passwd"), []byte("bob:x:1000:1001::/home/bob:/bin/sh\n"), 0o644))
	assert.NilError(t, os.Mkdir(filepath.Join(w.rootfs, "copied"), 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "copied/file"), []byte("copied\n"), 0o644))
	data := t.TempDir()
	assert.NilError(t, os.Chmod(data, 0o777))
	single := filepath.Join(data, "single")
	assert.NilError(t, os.WriteFile(single, []byte("single\n"), 0o644))
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/data", Type: "none", Source: data, Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/single", Type: "bind", Source: single, Options: []string{"bind"}},
		specs.Mount{Destination: "/copied", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup"}},
	)
	out := w.output("a", spec)
	assert.Equal(t, out, `box
1000
1001
1001 5
/made/dir
0027
/home/bob 2
CapEff: 0000000000000000
CapBnd: 0000000020000420
NoNewPrivs: 1
/proc/self/fd
pts/ptmx
1:3:666
77
1
0::/
read-only root
read-only path
masked file
masked directory
read-only bind
copied
single
`)
	_, err := os.Stat(filepath.Join(w.rootfs, "file"))
	assert.Assert(t, os.IsNotExist(err))
}

func TestHostileRootStaysInside(t *testing.T) {
	w := newWorld(t)
	outside := t.TempDir()
	for _, dir := range []string{"etc", "dev", "data"} {
		path := filepath.Join(w.rootfs, dir)
		assert.NilError(t, os.RemoveAll(path))
		assert.NilError(t, os.Symlink(outside, path)) // absolute: another place inside
	}
	up := strings.Repeat("../", 20) + strings.TrimPrefix(outside, "/")
	assert.NilError(t, os.Symlink(up, filepath.Join(w.rootfs, "up")))
	spec := w.spec("sh", "-c", "pwd; ls "+outside+" | grep -v core; echo x >/dev/null")
	spec.Process.Cwd = "/up/cwd"
	spec.Linux.MaskedPaths = []string{"/etc/fd"}
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/data/sub", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/up/file", Type: "bind", Source: busybox, Options: []string{"bind"}})
	out := w.output("a", spec)
	// All of it is the tmpfs that is mounted on the first.
	assert.Equal(t, out, outside+"/cwd\n"+strings.ReplaceAll("cwd fd file full null ptmx pts random stderr stdin stdout sub tty urandom zero ", " ", "\n"))
	entries, err := os.ReadDir(outside)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0, "%v", entries)
}

// What a link leads to is made where it leads in the container, as under runc.
func TestMountsOnDanglingLinks(t *testing.T) {
	w := newWorld(t)
	single := filepath.Join(t.TempDir(), "single")
	assert.NilError(t, os.WriteFile(single, []byte("single\n"), 0o644))
	for i, tc := range []struct {
		links map[string]string
		at    string // to mount on
		made  string // is there then
		err   string
	}{
		{map[string]string{"etc/resolv.conf": "../run/x/resolv.conf"}, "/etc/resolv.conf", "run/x/resolv.conf", ""},
		{map[string]string{"etc/abs": "/run/abs/file"}, "/etc/abs", "run/abs/file", ""},
		{map[string]string{"one": "two", "two": strings.Repeat("../", 30) + "run/three"}, "/one", "run/three", ""},
		{map[string]string{"dir": "run/dir"}, "/dir/file", "run/dir/file", ""},
		{map[string]string{"deep": "etc/deep", "etc/deep": "../run/deep/."}, "/deep/a/b", "run/deep/a/b", ""},
		{map[string]string{"miss": "nowhere/../run/miss"}, "/miss", "run/miss", ""},
		{nil, "/new/../../run/up", "run/up", ""},
		{map[string]string{"loop": "pool", "pool": "loop"}, "/loop", "", "too many levels of symbolic links"},
		{map[string]string{"loop1": "loop1/x"}, "/loop1", "", "too many levels of symbolic links"},
		{map[string]string{"magic": "/proc/self/root/file"}, "/magic", "", "too many levels of symbolic links"},
		{map[string]string{"file": "bin/busybox/x"}, "/file", "", "not a directory"},
	} {
		for link, target := range tc.links {
			assert.NilError(t, os.Symlink(target, filepath.Join(w.rootfs, link)))
		}
		id := fmt.Sprint("c", i)
		spec := w.spec("cat", "/"+tc.made)
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: tc.at, Type: "bind", Source: single, Options: []string{"bind"}})
		if tc.err != "" {
			_, err := w.create(id, spec)
			assert.ErrorContains(t, err, tc.err)
			continue
		}
		assert.Equal(t, w.output(id, spec), "single\n", tc.at)
		fi, err := os.Lstat(filepath.Join(w.rootfs, tc.made))
		assert.NilError(t, err)
		assert.Assert(t, fi.Mode().IsRegular() && fi.Size() == 0)
		// The same for a directory.
		assert.NilError(t, os.Remove(filepath.Join(w.rootfs, tc.made)))
		spec.Process.Args = []string{"stat", "-f", "-c", "%T", "/" + tc.made}
		spec.Mounts[len(spec.Mounts)-1] = specs.Mount{Destination: tc.at, Type: "tmpfs", Source: "tmpfs"}
		assert.Equal(t, w.output(id+"dir", spec), "tmpfs\n", tc.at)
		fi, err = os.Lstat(filepath.Join(w.rootfs, tc.made))
		assert.NilError(t, err)
		assert.Assert(t, fi.IsDir())
	}
	_, err := os.Lstat(filepath.Join(w.rootfs, "nowhere"))
	assert.Assert(t, os.IsNotExist(err))
}

func TestProcMustBeADirectory(t *testing.T) {
	w := newWorld(t)
	assert.NilError(t, os.Remove(filepath.Join(w.rootfs, "proc")))
	assert.NilError(t, os.Symlink("/tmp", filepath.Join(w.rootfs, "proc")))
	_, err := w.create("a", w.spec("true"))
	assert.ErrorContains(t, err, "ordinary directory")
}

// Hooks run as the program will, in what is its place already.
func TestHooks(t *testing.T) {
	w := newWorld(t)
	assert.NilError(t, os.Mkdir(filepath.Join(w.rootfs, "job"), 0o777))
	assert.NilError(t, os.Chmod(filepath.Join(w.rootfs, "job"), 0o777))
	hook := func(script string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}}}
	}
	spec := w.spec("sh", "-c", "cat log")
	spec.Process.Cwd = "/job"
	spec.Process.User = specs.User{UID: 1000, GID: 1000}
	spec.Annotations = map[string]string{"a": "b"}
	const tell = `{ id -u; grep CapEff /proc/self/status; readlink /proc/self/cwd; cat; echo; } >>log`
	spec.Hooks = &specs.Hooks{CreateContainer: hook(tell), StartContainer: hook(tell)}
	r, err := w.create("a", spec)
	assert.NilError(t, err)
	data, err := os.ReadFile(filepath.Join(w.rootfs, "job/log"))
	assert.NilError(t, err)
	want := func(status string) string {
		return "1000\nCapEff:\t0000000000000000\n/job\n" + fmt.Sprintf(
			`{"pid":1,"ociVersion":%q,"id":"a","status":%q,"bundle":"/the/bundle","annotations":{"a":"b"}}`, specs.Version, status) + "\n"
	}
	assert.Equal(t, string(data), want("creating"))
	assert.NilError(t, w.start("a"))
	status, _ := w.end("a", "")
	assert.Equal(t, status, uint32(0))
	r.copying.Wait()
	assert.Equal(t, r.out[1].String(), want("creating")+want("created"))

	for id, tc := range map[string]struct {
		hooks specs.Hooks
		start bool
		want  string
	}{
		"b": {specs.Hooks{CreateContainer: hook("echo no; exit 4")}, false, "hooks.createContainer[0] /bin/sh: exit status 4: no"},
		"c": {specs.Hooks{CreateContainer: []specs.Hook{{Path: busybox + "-of-the-host"}}}, false, "no such file or directory"},
		"d": {specs.Hooks{StartContainer: append(hook("exit 0"), hook("exit 4")...)}, true, "hooks.startContainer[1] /bin/sh: exit status 4"},
	} {
		spec.Hooks = &tc.hooks
		_, err := w.create(id, spec)
		if tc.start {
			assert.NilError(t, err)
			err = w.start(id)
		}
		assert.ErrorContains(t, err, tc.want)
		if tc.start {
			status, _ := w.end(id, "")
			assert.Equal(t, status, uint32(1))
		}
	}

	spec.Hooks = &specs.Hooks{StartContainer: hook(": >/job/fifo; sleep 1000")}
	assert.NilError(t, unix.Mkfifo(filepath.Join(w.rootfs, "job/fifo"), 0o666))
	assert.NilError(t, os.Chmod(filepath.Join(w.rootfs, "job/fifo"), 0o666))
	_, err = w.create("e", spec)
	assert.NilError(t, err)
	c, err := w.set.Get("e")
	assert.NilError(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() {
		if f, err := os.Open(filepath.Join(w.rootfs, "job/fifo")); err == nil { // until the hook runs
			f.Close()
		}
		cancel(errors.New("patience is at its end"))
	}()
	assert.ErrorContains(t, c.Start(ctx), "patience is at its end")
	status, _ = w.end("e", "")
	assert.Equal(t, status, uint32(137), "killed with its hook")
}

func TestProgramErrors(t *testing.T) {
	w := newWorld(t)
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "bin/noexec"), nil, 0o644))
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "bin/garbage"), []byte{1, 2, 3}, 0o755))
	for _, tc := range []struct {
		program, text string
		kind          error
	}{
		{"nope", `exec: "nope": executable file not found in $PATH`, errdefs.ErrNotFound},
		{"noexec", `exec: "noexec": permission denied`, errdefs.ErrPermissionDenied},
		{"/bin/noexec", `exec: "/bin/noexec": permission denied`, errdefs.ErrPermissionDenied},
		{"/nope", `exec: "/nope": stat /nope: no such file or directory`, errdefs.ErrNotFound},
		{"/bin", `exec: "/bin": is a directory: permission denied`, errdefs.ErrPermissionDenied},
	} {
		t.Run(tc.program, func(t *testing.T) {
			_, err := w.create("a", w.spec(tc.program))
			assert.Error(t, err, tc.text)
			assert.ErrorIs(t, err, tc.kind)
			_, err = w.set.Get("a")
			assert.ErrorIs(t, err, errdefs.ErrNotFound)
		})
	}
	t.Run("start", func(t *testing.T) {
		_, err := w.create("b", w.spec("/bin/garbage"))
		assert.NilError(t, err)
		err = w.start("b")
		assert.Error(t, err, "exec /bin/garbage: exec format error")
		assert.ErrorIs(t, err, errdefs.ErrPermissionDenied)
		status, _ := w.end("b", "")
		assert.Equal(t, status, uint32(1))
	})
}

func TestExec(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", w.spec("sleep", "1000"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	p := w.spec("sh", "-c", "cat /proc/sys/kernel/hostname; cat /proc/1/comm; grep ^0: /proc/self/cgroup; ls /proc/self/fd; exit 3").Process
	r, err := w.exec("a", "e", p)
	assert.NilError(t, err)
	status, drained := w.end("a", "e")
	r.copying.Wait()
	assert.Equal(t, status, uint32(3))
	assert.Equal(t, r.out[1].String(), "box\nsleep\n0::/\n0\n1\n2\n3\n")
	assert.Equal(t, drained.StdoutBytes, uint64(r.out[1].Len()))

	p.Args = []string{"nope"}
	_, err = w.exec("a", "f", p)
	assert.Error(t, err, `exec: "nope": executable file not found in $PATH`)
	p.Args = []string{"true"}
	p.Cwd = "/nope"
	_, err = w.exec("a", "g", p)
	assert.ErrorContains(t, err, `chdir to cwd ("/nope")`)
}

// What a process leaves behind may go on writing after the exit.
func TestDrainedDoesNotWaitForOthers(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", w.spec("sleep", "1000"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	p := w.spec("sh", "-c", "mkfifo /tmp/f; echo one; { read x; echo two; } </tmp/f &").Process
	r, err := w.exec("a", "e", p)
	assert.NilError(t, err)
	_, drained := w.end("a", "e")
	assert.Equal(t, drained.StdoutBytes, uint64(4))
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "tmp/f"), []byte("go\n"), 0))
	r.copying.Wait()
	assert.Equal(t, r.out[1].String(), "one\ntwo\n")
}

func TestTerminal(t *testing.T) {
	w := newWorld(t)
	spec := w.spec("sh", "-c", "tty; stty size; read line; echo got $line; stty size")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Width: 99, Height: 33}
	r, err := w.create("a", spec)
	assert.NilError(t, err)
	c, err := w.set.Get("a")
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	assert.NilError(t, c.Resize("", 120, 40))
	_, err = r.stdin.Write([]byte("text\n"))
	assert.NilError(t, err)
	status, drained := w.end("a", "")
	r.copying.Wait()
	assert.Equal(t, status, uint32(0))
	out := r.out[1].String()
	assert.Assert(t, is.Contains(out, "/dev/pts/0"))
	assert.Assert(t, is.Contains(out, "got text\r\n40 120\r\n"))
	assert.Equal(t, drained.StdoutBytes, uint64(len(out)))
}

func TestSignals(t *testing.T) {
	w := newWorld(t)
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
		t.Run("created/"+unix.SignalName(sig), func(t *testing.T) {
			id := "created" + unix.SignalName(sig)
			_, err := w.create(id, w.spec("sleep", "1000"))
			assert.NilError(t, err)
			c, err := w.set.Get(id)
			assert.NilError(t, err)
			assert.NilError(t, c.Signal("", uint32(unix.SIGWINCH), false))
			assert.NilError(t, c.Signal("", uint32(sig), false))
			status, _ := w.end(id, "")
			assert.Equal(t, status, 128+uint32(sig))
			assert.ErrorIs(t, c.Signal("", uint32(sig), false), errdefs.ErrNotFound)
			assert.NilError(t, c.Delete(t.Context()))
		})
		t.Run("running/"+unix.SignalName(sig), func(t *testing.T) {
			id := "running" + unix.SignalName(sig)
			_, err := w.create(id, w.spec("sleep", "1000"))
			assert.NilError(t, err)
			assert.NilError(t, w.start(id))
			c, err := w.set.Get(id)
			assert.NilError(t, err)
			// The init of a pid namespace gets only signals that it handles; SIGKILL always.
			_, err = w.exec(id, "e", w.spec("sleep", "1000").Process)
			assert.NilError(t, err)
			assert.NilError(t, c.Signal("e", uint32(sig), false))
			status, _ := w.end(id, "e")
			assert.Equal(t, status, 128+uint32(sig))
			assert.NilError(t, c.Signal("", uint32(unix.SIGKILL), true))
			status, _ = w.end(id, "")
			assert.Equal(t, status, uint32(137))
		})
	}
}

func TestPauseAndDelete(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", w.spec("sleep", "1000"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	c, err := w.set.Get("a")
	assert.NilError(t, err)
	assert.NilError(t, c.Pause(t.Context()))
	_, err = w.exec("a", "e", w.spec("true").Process)
	assert.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	assert.NilError(t, c.Resume(t.Context()))
	_, err = w.exec("a", "e", w.spec("true").Process)
	assert.NilError(t, err)
	w.end("a", "e")
	list, err := c.Processes()
	assert.NilError(t, err)
	assert.Equal(t, len(list), 1)
	assert.Equal(t, list[0].Command, "sleep 1000")
	assert.Assert(t, list[0].Init)
	assert.NilError(t, c.Pause(t.Context()))
	assert.NilError(t, c.Delete(t.Context()))
	status, _ := w.end("a", "")
	assert.Equal(t, status, uint32(137))
	_, err = w.set.Get("a")
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
}

// Without a pid namespace the kernel does not kill what init leaves behind.
func TestSharedPIDNamespace(t *testing.T) {
	w := newWorld(t)
	spec := w.spec("sh", "-c", "sleep 1000 & echo started")
	spec.Linux.Namespaces = spec.Linux.Namespaces[1:]
	_, err := w.create("a", spec)
	assert.NilError(t, err)
	c, err := w.set.Get("a")
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	w.end("a", "")
	assert.NilError(t, c.Delete(t.Context()))
}

func TestRefusedSpecifications(t *testing.T) {
	w := newWorld(t)
	for name, change := range map[string]func(*specs.Spec){
		"no args":            func(s *specs.Spec) { s.Process.Args = nil },
		"relative cwd":       func(s *specs.Spec) { s.Process.Cwd = "tmp" },
		"unknown rlimit":     func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} },
		"no mount namespace": func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[:1] },
		"unknown device":     func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Type: "x", Path: "/dev/x"}} },
	} {
		t.Run(name, func(t *testing.T) {
			spec := w.spec("true")
			change(spec)
			_, err := w.create("a", spec)
			assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		})
	}
	_, err := w.create("../a", w.spec("true"))
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// TestManyMounts: absurd, but no reason to fail.
func TestManyMounts(t *testing.T) {
	w := newWorld(t)
	const n = 5000
	data := t.TempDir()
	spec := w.spec("sh", "-c", "grep -c ' /tmp/m' /proc/self/mountinfo; stat -f -c %T /tmp/m9999")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"})
	for i := range n {
		spec.Mounts = append(spec.Mounts,
			specs.Mount{Destination: fmt.Sprint("/tmp/m", 2*i), Type: "bind", Source: data, Options: []string{"bind"}},
			specs.Mount{Destination: fmt.Sprint("/tmp/m", 2*i+1), Type: "tmpfs", Source: "tmpfs"})
	}
	assert.Equal(t, w.output("a", spec), "10000\ntmpfs\n")
}
