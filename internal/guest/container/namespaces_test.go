package container_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/internal/guest/stage"
)

// buildInit builds the program that is linked as the guest's: this test's own cannot enter a user or time
// namespace.
func buildInit(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	// Who is root of a user namespace must reach it.
	for path := dir; path != os.TempDir(); path = filepath.Dir(path) {
		assert.NilError(t, os.Chmod(path, 0o755))
	}
	program := filepath.Join(dir, "runv-init")
	out, err := exec.Command("go", "build", "-ldflags=-E="+stage.EntrySymbol, "-o", program, "runv/cmd/runv-init").CombinedOutput()
	assert.NilError(t, err, "%s", out)
	return program
}

const hostRoot = 100000

// inUserNS gives a specification a user namespace, and its root file system to that namespace's root.
func (w *world) inUserNS(spec *specs.Spec) {
	for _, kind := range []specs.LinuxNamespaceType{specs.UserNamespace, specs.NetworkNamespace} {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: kind})
	}
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: hostRoot, Size: 65536}}
	spec.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 2 * hostRoot, Size: 65536}}
	for path := w.rootfs; path != os.TempDir(); path = filepath.Dir(path) {
		assert.NilError(w.t, os.Chmod(path, 0o755))
	}
	assert.NilError(w.t, filepath.WalkDir(w.rootfs, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, hostRoot, 2*hostRoot)
	}))
}

func TestUserNamespace(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	spec := w.spec("sh", "-c", `
cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups | tr -s ' '; id -u; id -G; stat -c '%u %g' /bin/busybox
grep CapEff: /proc/self/status; cat /proc/self/oom_score_adj; ulimit -n
echo x > /dev/null && stat -c '%t:%T:%a:%u' /dev/null /dev/made; cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward
echo to stderr > /dev/stderr; grep -c lo: /proc/net/dev; stat -c '%U' /sys/fs/cgroup/cgroup.procs
touch /tmp/file; stat -c '%u %g' /tmp/file; read x`)
	w.inUserNS(spec)
	spec.Process.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{5}}
	adj, uid := 500, uint32(7)
	spec.Process.OOMScoreAdj = &adj
	spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 20, Hard: 20}}
	assert.NilError(t, os.WriteFile(filepath.Join(w.rootfs, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\n"), 0o644))
	assert.NilError(t, os.Chmod(filepath.Join(w.rootfs, "tmp"), 0o1777))
	spec.Linux.Sysctl = map[string]string{"kernel.msgmax": "7777", "net.ipv4.ip_forward": "1"}
	spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/made", Type: "c", Major: 1, Minor: 5, UID: &uid}}
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev"}},
		specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue"},
	)
	for i := range 30 { // more than the program may have files open
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: fmt.Sprint("/tmp/", i), Type: "bind", Source: w.rootfs, Options: []string{"bind"}})
	}
	r, err := w.create("a", spec)
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))

	// A process that is added has all capabilities of the namespace before it is its user.
	p := w.spec("sh", "-c", "grep -c 100000 /proc/self/uid_map; id -u; cat /proc/self/oom_score_adj; echo x > /dev/stderr; touch /tmp/other; stat -c %u /tmp/other").Process
	p.OOMScoreAdj = &adj
	for i, want := range []string{"1\n0\n500\n0\n", "1\n9\n500\n9\n"} {
		p.User.UID = uint32(9 * i)
		id := fmt.Sprint("e", i)
		e, err := w.exec("a", id, p)
		assert.NilError(t, err)
		status, _ := w.end("a", id)
		e.copying.Wait()
		assert.Equal(t, e.out[1].String(), want, e.out[2])
		assert.Equal(t, e.out[2].String(), "x\n")
		assert.Equal(t, status, uint32(0))
		assert.NilError(t, os.Remove(filepath.Join(w.rootfs, "tmp/other")))
	}
	p.User.UID = 65536
	_, err = w.exec("a", "f", p)
	assert.ErrorContains(t, err, "set uid 65536: not mapped in the user namespace")
	p.User.UID, p.Terminal, p.Args = 9, true, []string{"sh", "-c", "tty; stat -c %u /dev/pts/0; readlink /proc/self/ns/user"}
	e, err := w.exec("a", "g", p)
	assert.NilError(t, err)
	w.end("a", "g")
	e.copying.Wait()
	ours, err := os.Readlink("/proc/self/ns/user")
	assert.NilError(t, err)
	assert.Assert(t, is.Contains(e.out[1].String(), "/dev/pts/0\r\n9\r\nuser:"))
	assert.Assert(t, !strings.Contains(e.out[1].String(), ours))

	_, err = r.stdin.Write([]byte("\n"))
	assert.NilError(t, err)
	status, _ := w.end("a", "")
	r.copying.Wait()
	assert.Equal(t, status, uint32(0))
	assert.Equal(t, r.out[1].String(), ` 0 100000 65536
 0 200000 65536
allow
7
8 5
0 0
CapEff:	0000000000000000
500
20
1:3:666:65534
1:5:666:7
7777
1
1
root
7 8
`)
	assert.Equal(t, r.out[2].String(), "to stderr\n")
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(w.rootfs, "tmp/file"), &st))
	assert.Equal(t, st.Uid, uint32(hostRoot+7))
}

func TestTimeNamespace(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	uptime := func() int {
		var ts unix.Timespec
		assert.NilError(t, unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts))
		return int(ts.Sec)
	}
	for _, user := range []bool{false, true} {
		id := fmt.Sprint("user", user)
		spec := w.spec("sh", "-c", "cut -d. -f1 /proc/uptime; tr -s ' ' < /proc/self/timens_offsets; cat")
		if user {
			w.inUserNS(spec)
		}
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1000000}, "monotonic": {Secs: 5, Nanosecs: 6}}
		r, err := w.create(id, spec)
		assert.NilError(t, err)
		assert.NilError(t, w.start(id))
		e, err := w.exec(id, "e", w.spec("cut", "-d.", "-f1", "/proc/uptime").Process)
		assert.NilError(t, err)
		w.end(id, "e")
		assert.NilError(t, r.stdin.Close())
		w.end(id, "")
		e.copying.Wait()
		r.copying.Wait()
		first, rest, _ := strings.Cut(r.out[1].String(), "\n")
		assert.Equal(t, rest, "monotonic 5 6\nboottime 1000000 0\n", r.out[2])
		for _, out := range []string{first, strings.TrimSpace(e.out[1].String())} {
			up, err := strconv.Atoi(out)
			assert.NilError(t, err)
			assert.Assert(t, up >= 1000000 && up <= 1000000+uptime(), "%d", up)
		}
	}
	spec := w.spec("true")
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: -1 << 40}}
	_, err := w.create("past", spec)
	assert.ErrorContains(t, err, "linux.timeOffsets: a clock would be below zero")
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// A program without the entry point must not run in the wrong namespace.
func TestNoEntry(t *testing.T) {
	w := newWorld(t)
	spec := w.spec("sleep", "1000")
	w.inUserNS(spec)
	_, err := w.create("a", spec)
	assert.NilError(t, err)
	_, err = w.exec("a", "e", w.spec("true").Process)
	assert.ErrorContains(t, err, "not linked to start in")
}
