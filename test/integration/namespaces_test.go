package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

const (
	mappedUID = 100000
	mappedGID = 200000
)

// inUserNS gives a bundle a user namespace whose root owns the root file system.
func inUserNS(t *testing.T, e *harness.Env, bundle string) {
	t.Helper()
	e.EditSpec(bundle, func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: mappedUID, Size: 65536}}
		s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: mappedGID, Size: 65536}}
	})
	// Under runc the namespace's root walks there itself.
	for dir := bundle; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		assert.NilError(t, os.Chmod(dir, 0o755))
	}
	assert.NilError(t, filepath.WalkDir(filepath.Join(bundle, "rootfs"), func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, mappedUID, mappedGID)
	}))
}

// anyRunc lets both oracles read a bundle, the older of which does not know the newest specification.
func anyRunc(e *harness.Env, bundle string) {
	e.EditSpec(bundle, func(s *specs.Spec) { s.Version = "1.0.2" })
}

// describeUser tells what a process in a user namespace is and sees, all that must be as under runc.
const describeUser = `
tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; cat /proc/self/setgroups; id
stat -c '%n %u %g %a %t %T' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/pts /dev/shm / /proc/sys /sys /bin/busybox
grep -E '^(Cap|NoNewPrivs|Groups|Uid|Gid|Seccomp:)' /proc/self/status; cat /proc/self/oom_score_adj; ulimit -n
awk '$5 !~ /^.sys.fs.cgroup|^.proc.kcore|^.proc.sysrq/ {print $5, $6}' /proc/self/mountinfo | sort
ls /proc/acpi /sys/firmware; grep -c . /proc/net/dev
echo x >/dev/null || echo no null; echo x 2>&- >/proc/sys/kernel/hostname || echo read-only
mount -t tmpfs x /root 2>/dev/null && umount /root || echo no mount; hostname other 2>/dev/null || echo no hostname; mknod /tmp/n c 1 3 2>/dev/null || echo no mknod
touch /tmp/$NAME /dev/shm/x && stat -c '%u %g' /tmp/$NAME; rm /dev/shm/x`

// TestUserNamespaceLikeRunc compares what init and processes that are added are in a user namespace.
func TestUserNamespaceLikeRunc(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", describeUser + "; exec sleep 1000"}, func(s *specs.Spec) {
		s.Process.Env = append(s.Process.Env, "NAME=init")
		// Both the same: Go's runtime raises the soft limit at times while runc sets it.
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 88, Hard: 88}}
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{syscalls(specs.ActErrno, "swapon")}}
		adj := 100
		s.Process.OOMScoreAdj = &adj
	})
	inUserNS(t, e, bundle)
	rootfs := filepath.Join(bundle, "rootfs")
	// cgroup v1 on the host, v2 in the guest.
	e.EditSpec(bundle, func(s *specs.Spec) {
		s.Mounts = s.Mounts[:6]
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.CgroupNamespace })
	})
	const id = "box"
	execs := [][]string{
		{"exec", "-e", "NAME=root"},
		{"exec", "-e", "NAME=user", "--user", "1000:1001"},
		{"exec", "-e", "NAME=caps", "--user", "0:0", "--cap", "CAP_SYS_ADMIN", "--cap", "CAP_CHOWN"},
	}
	anyRunc(e, bundle)
	all := runtimes(e)
	results := make([][]string, len(all))
	for i, rt := range all {
		run := func(args ...string) harness.Result { return harness.Finish(rt.command(args...)) }
		assert.NilError(t, os.Chmod(filepath.Join(rootfs, "tmp"), 0o1777))
		log := filepath.Join(e.Dir, fmt.Sprint("log", i))
		out, err := os.Create(log)
		assert.NilError(t, err)
		cmd := rt.command("run", "--detach", "--bundle", bundle, id)
		cmd.Stdout, cmd.Stderr = out, out
		assert.NilError(t, cmd.Run())
		assert.NilError(t, out.Close())
		harness.Eventually(t, "init has told all", func() bool {
			_, err := os.Lstat(filepath.Join(rootfs, "tmp/init"))
			data, _ := os.ReadFile(log)
			return err == nil && strings.HasSuffix(string(data), "0 0\n")
		})
		data, err := os.ReadFile(log)
		assert.NilError(t, err)
		results[i] = append(results[i], string(data))
		for _, args := range execs {
			r := run(append(args, id, "sh", "-c", describeUser)...)
			results[i] = append(results[i], fmt.Sprint(r.Code, "\n", r.Stdout, r.Stderr))
		}
		for _, name := range []string{"init", "root", "user", "caps"} {
			path := filepath.Join(rootfs, "tmp", name)
			fi, err := os.Lstat(path)
			assert.NilError(t, err, strings.Join(results[i], "\n"))
			results[i] = append(results[i], fmt.Sprint(name, " ", owner(fi)))
			assert.NilError(t, os.Remove(path))
		}
		r := run("delete", "--force", id)
		assert.Equal(t, r.Code, 0, r.Stderr)
	}
	ours := results[len(all)-1]
	for n, theirs := range results[:len(all)-1] {
		for i, want := range theirs {
			assert.Equal(t, ours[i], want, all[n].name)
		}
	}
	assert.Assert(t, cmp.Contains(ours[0], " 0 100000 65536\n"))
}

func owner(fi fs.FileInfo) string {
	st := stat(fi)
	return fmt.Sprint(st.Uid, ":", st.Gid)
}

// TestTimeAndUserNamespaces is what this machine's runc cannot do, or has no right to.
func TestTimeAndUserNamespaces(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", "trap 'exit 5' TERM; cat /proc/self/oom_score_adj; while :; do sleep 1; done"}, func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 5000000}, "monotonic": {Secs: 7, Nanosecs: 8}}
		adj := -900
		s.Process.OOMScoreAdj = &adj
		s.Process.Rlimits = nil
		s.Linux.Sysctl = map[string]string{
			"net.ipv4.ip_forward": "1", "kernel.shmmni": "99", "kernel.domainname": "example.org", "fs.mqueue.queues_max": "11", "user.max_uts_namespaces": "5",
		}
		s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/made/zero", Type: "c", Major: 1, Minor: 5}, {Path: "/dev/fifo", Type: "p"}}
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Access: "rwm"})
	})
	inUserNS(t, e, bundle)
	volume := filepath.Join(e.Dir, "volume")
	assert.NilError(t, os.Mkdir(volume, 0o755))
	assert.NilError(t, os.Chown(volume, 0, 7))
	e.EditSpec(bundle, func(s *specs.Spec) {
		for at, options := range map[string][]string{"/plain": {"bind"}, "/idmap": {"bind", "idmap"}, "/single": {"bind", "ridmap", "ro"}} {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: at, Type: "bind", Source: volume, Options: options})
		}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	sh := func(script string) string {
		t.Helper()
		r := e.Run("exec", "box", "sh", "-c", script)
		assert.Equal(t, r.Code, 0, r.Stderr)
		return r.Stdout
	}
	up, err := strconv.Atoi(strings.TrimSpace(sh("cut -d. -f1 /proc/uptime")))
	assert.NilError(t, err)
	assert.Assert(t, up >= 5000000 && up < 5100000, "%d", up)
	assert.Equal(t, sh("tr -s ' ' < /proc/1/timens_offsets"), "monotonic 7 8\nboottime 5000000 0\n")
	for _, ns := range []string{"time", "user", "net", "cgroup", "mnt"} {
		assert.Equal(t, sh(fmt.Sprintf("[ $(readlink /proc/self/ns/%s) = $(readlink /proc/1/ns/%[1]s) ] && echo same", ns)), "same\n", ns)
	}
	var files unix.Rlimit
	assert.NilError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &files))
	assert.Equal(t, sh("cat /proc/1/oom_score_adj; ulimit -Hn"), fmt.Sprintf("-900\n%d\n", files.Max))
	assert.Equal(t, sh("cd /proc/sys; cat net/ipv4/ip_forward kernel/shmmni kernel/domainname fs/mqueue/queues_max user/max_uts_namespaces"), "1\n99\nexample.org\n11\n5\n")
	assert.Equal(t, sh("stat -c '%F %u' /dev/made/zero /dev/fifo; head -c 3 /dev/made/zero | od -An -tx1"), "character special file 0\nfifo 0\n 00 00 00\n")
	// The group is the namespace's root's, who can make groups in it.
	assert.Equal(t, sh("stat -c %u /sys/fs/cgroup /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids.max"), "0\n0\n65534\n")
	assert.Equal(t, sh("echo reopened >/dev/stdout"), "reopened\n")
	// Files belong to whom they belong on the host, or to whom the mount says.
	assert.Equal(t, sh("stat -c '%u %g' /plain /idmap /single; touch /idmap/new && stat -c '%u %g' /idmap/new; touch /single/x || touch /plain/x || echo denied"),
		"65534 65534\n0 7\n0 7\n0 0\ndenied\n")
	fi, err := os.Stat(filepath.Join(volume, "new"))
	assert.NilError(t, err)
	assert.Equal(t, owner(fi), "0:0")
	e.OK("kill", "box")
	e.AwaitStatus("box", specs.StateStopped)

	// The host's kernel cannot map the ids of all file systems.
	bad := e.Bundle([]string{"true"}, func(s *specs.Spec) {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1, Size: 1}}
		s.Mounts = append(s.Mounts, specs.Mount{
			Destination: "/x", Type: "bind", Source: "/proc", Options: []string{"bind"}, UIDMappings: ids, GIDMappings: ids,
		})
	})
	r := e.Run("run", "--bundle", bad, "bad")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "mounts[7]: bind /proc: map ids: the kernel cannot do that on this file system"))

	past := e.Bundle([]string{"true"}, func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: -86400}}
	})
	r = e.Run("run", "--bundle", past, "past")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "linux.timeOffsets"))
}

// TestUserNamespaceOfAnother joins a container's user namespace and nothing else of it, under runc, too. The first has more
// bind mounts than its program may have files open.
func TestUserNamespaceOfAnother(t *testing.T) {
	e := harness.New(t)
	volume := filepath.Join(e.Dir, "volume")
	assert.NilError(t, os.Mkdir(volume, 0o755))
	first := e.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 20, Hard: 20}}
		for i := range 30 {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: fmt.Sprint("/tmp/", i), Type: "bind", Source: volume, Options: []string{"bind"}})
		}
	})
	inUserNS(t, e, first)
	const look = `cat /proc/self/uid_map; ls /sys/class/net; grep -E ' /(sys|proc) ' /proc/self/mountinfo | cut -d ' ' -f 5-6; id; grep Cap /proc/self/status`
	second := e.Bundle([]string{"sh", "-c", look})
	inUserNS(t, e, second)
	life := func(of commandLine) string {
		for _, id := range []string{"a", "b"} {
			_ = harness.Finish(of.command("delete", "--force", id))
		}
		r := harness.Finish(of.command("run", "--detach", "--bundle", first, "a"))
		assert.Equal(t, r.Code, 0, "%s: %s", of.name, r.Stderr)
		r = harness.Finish(of.command("exec", "a", "sh", "-c", "ulimit -n; cut -d ' ' -f 5 /proc/self/mountinfo | grep -c ^/tmp/"))
		assert.Equal(t, r.Stdout, "20\n30\n", "%s: %s", of.name, r.Stderr)
		var state specs.State
		assert.NilError(t, json.Unmarshal([]byte(harness.Finish(of.command("state", "a")).Stdout), &state))
		e.EditSpec(second, func(s *specs.Spec) {
			for i := range s.Linux.Namespaces {
				if ns := &s.Linux.Namespaces[i]; ns.Type == specs.UserNamespace {
					ns.Path = fmt.Sprintf("/proc/%d/ns/user", state.Pid)
				}
			}
		})
		r = harness.Finish(of.command("run", "--bundle", second, "b"))
		assert.Equal(t, r.Code, 0, "%s: %s", of.name, r.Stderr)
		r.Stdout = strings.ReplaceAll(r.Stdout, "\nsit0", "") // as the kernel has modules
		return r.Stdout
	}
	all := runtimes(e)
	seen := life(all[len(all)-1])
	assert.Assert(t, cmp.Contains(seen, "\nlo\n"))
	e.OK("delete", "--force", "a")
	// The newer one wants no mappings with a path, and open files for mounts that are not to be open.
	assert.Equal(t, seen, life(all[0]))
}

func stat(fi fs.FileInfo) *syscall.Stat_t { return fi.Sys().(*syscall.Stat_t) }
