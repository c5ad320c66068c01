package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// volume makes a directory on the host that everybody may write to.
func volume(t *testing.T, e *harness.Env, name string) string {
	t.Helper()
	dir := filepath.Join(e.Dir, name)
	assert.NilError(t, os.Mkdir(dir, 0o777))
	assert.NilError(t, os.Chmod(dir, 0o777))
	return dir
}

func bindMount(source, destination string, options ...string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"bind"}, options...)})
	}
}

func asUser(uid, gid uint32, groups ...uint32) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Process.User = specs.User{UID: uid, GID: gid, AdditionalGids: groups} }
}

// accessList is a POSIX ACL: owner rw, one user with the given permissions, everybody else r (linux/posix_acl_xattr.h).
func accessList(uid uint32, permissions uint16) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, permissions uint16
		id               uint32
	}{{1, 6, 1<<32 - 1}, {2, permissions, uid}, {4, 4, 1<<32 - 1}, {16, 6, 1<<32 - 1}, {32, 4, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.permissions)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// What a user may do with the files of the host, and whose the files are that the user makes: groups, modes, ACLs. internal/sharefs
// compares all operations with the host's; this shows that they arrive there from a VM.
func TestRightsOnShareLikeRunc(t *testing.T) {
	e := harness.New(t)
	const script = `
cd /g; umask 022
touch a; mkdir d; touch d/b; ln -s a l; mkfifo f; ln a h
cat denied; cat allowed; echo x >> allowed; cat group; echo y >> group
chmod 2755 a; chgrp 1001 d; chgrp 1005 a
ls -ln . d | awk '{print $1, $2, $3, $4, $NF}'`
	all := runtimes(e)
	results := make([]string, len(all))
	for i, runtime := range all {
		dir := volume(t, e, runtime.name)
		for name, mode := range map[string]os.FileMode{"denied": 0o644, "allowed": 0o600, "group": 0o660} {
			assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(name+"\n"), mode))
		}
		assert.NilError(t, unix.Setxattr(filepath.Join(dir, "denied"), "system.posix_acl_access", accessList(1002, 0), 0))
		assert.NilError(t, unix.Setxattr(filepath.Join(dir, "allowed"), "system.posix_acl_access", accessList(1002, 6), 0))
		assert.NilError(t, os.Chown(filepath.Join(dir, "group"), 0, 1001))
		assert.NilError(t, os.Chown(dir, 0, 1001))
		assert.NilError(t, unix.Chmod(dir, 0o2775))
		bundle := e.Bundle([]string{"sh", "-c", script + "; cd /own; touch a; ls -ln | awk '{print $1, $2, $3, $4, $NF}'"},
			bindMount(dir, "/g"), asUser(1002, 1003, 1001))
		own := filepath.Join(bundle, "rootfs/own") // the same in the container's own root
		assert.NilError(t, os.Mkdir(own, 0o777))
		assert.NilError(t, os.Chown(own, 0, 1001))
		assert.NilError(t, unix.Chmod(own, 0o2775))
		anyRunc(e, bundle)
		r := harness.Finish(runtime.command("run", "--bundle", bundle, "box"))
		results[i] = r.Stdout + r.Stderr
	}
	ours := results[len(all)-1]
	assert.Assert(t, strings.Contains(ours, "1002 1001 a"), ours)
	for i, theirs := range results[:len(all)-1] {
		assert.Equal(t, ours, theirs, all[i].name)
	}
}

// twoVMs runs a program in two containers that bind the same directory, and returns when both run.
func twoVMs(t *testing.T, e *harness.Env, dir string) [2]string {
	t.Helper()
	var ids [2]string
	var wg sync.WaitGroup
	for i := range ids {
		ids[i] = fmt.Sprint("vm", i)
		bundle := e.Bundle([]string{"sleep", "1000"}, bindMount(dir, "/v"))
		harness.CopyProgram(t, filepath.Join(bundle, "rootfs"), "/usr/bin/flock")
		wg.Go(func() {
			if r := e.Run("run", "--detach", "--bundle", bundle, ids[i]); r.Code != 0 {
				t.Errorf("%+v", r)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return ids
}

func TestVolumeOfTwoVMs(t *testing.T) {
	e := harness.New(t)
	dir := volume(t, e, "volume")
	ids := twoVMs(t, e, dir)

	t.Run("the second is warned", func(t *testing.T) {
		r := e.Run("create", "--bundle", e.Bundle([]string{"true"}, bindMount(dir, "/deep")), "third")
		assert.Equal(t, r.Code, 0, "%+v", r)
		assert.Assert(t, strings.Contains(r.Stderr, "writes to "+dir+" as well, from another VM"), r.Stderr)
		e.OK("delete", "--force", "third")
	})
	t.Run("locks and data", func(t *testing.T) {
		// Each of two VMs and the host counts up a file under a lock; nothing may be lost, whoever cached what.
		const script = `cd %s; i=0; while [ $i -lt 60 ]; do flock lock sh -c 'n=$(cat count); echo $((n + 1)) > count'; i=$((i + 1)); done`
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "count"), []byte("0\n"), 0o666))
		var wg sync.WaitGroup
		for _, id := range ids {
			wg.Go(func() {
				if r := e.Run("exec", id, "sh", "-c", fmt.Sprintf(script, "/v")); r.Code != 0 {
					t.Errorf("%+v", r)
				}
			})
		}
		wg.Go(func() {
			if r := harness.Finish(exec.Command("sh", "-c", fmt.Sprintf(script, dir))); r.Code != 0 {
				t.Errorf("%+v", r)
			}
		})
		wg.Wait()
		data, err := os.ReadFile(filepath.Join(dir, "count"))
		assert.NilError(t, err)
		assert.Equal(t, string(data), "180\n")
	})
	t.Run("names and appends", func(t *testing.T) {
		for i := range 20 {
			from, to := ids[i%2], ids[(i+1)%2]
			e.OK("exec", from, "sh", "-c", fmt.Sprintf("echo %d > /v/new; mv /v/new /v/mail%d; echo %d >> /v/log", i, i, i))
			assert.Equal(t, e.OK("exec", to, "sh", "-c", fmt.Sprintf("cat /v/mail%d; tail -n 1 /v/log; rm /v/mail%d", i, i)), fmt.Sprintf("%d\n%d\n", i, i))
		}
	})
	t.Run("a signal ends a wait", func(t *testing.T) {
		lock, err := os.OpenFile(filepath.Join(dir, "held"), os.O_RDWR|os.O_CREATE, 0o666)
		assert.NilError(t, err)
		defer lock.Close()
		assert.NilError(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
		for _, signal := range []string{"TERM", "KILL"} {
			cmd := e.Command("exec", ids[0], "sh", "-c", "echo $$; exec flock /v/held true")
			var out bytes.Buffer
			cmd.Stdout = &out
			assert.NilError(t, cmd.Start())
			harness.Eventually(t, "the program waits", func() bool {
				// flock(2) is system call 73; the kernel shows where a thread is only when it sleeps.
				r := e.Run("exec", ids[0], "sh", "-c", "grep -l ^73 /proc/[0-9]*/syscall")
				return r.Code == 0
			})
			pid := strings.TrimSpace(out.String())
			_, err := strconv.Atoi(pid)
			assert.NilError(t, err)
			e.OK("exec", ids[0], "kill", "-"+signal, pid)
			code := harness.ExitCode(cmd.Wait())
			assert.Equal(t, code, 128+map[string]int{"TERM": 15, "KILL": 9}[signal])
		}
		// And the container can be paused and killed meanwhile.
		waiting := e.Command("exec", ids[1], "flock", "/v/held", "true")
		assert.NilError(t, waiting.Start())
		harness.Eventually(t, "the program waits", func() bool {
			return e.Run("exec", ids[1], "sh", "-c", "grep -l ^73 /proc/[0-9]*/syscall").Code == 0
		})
		e.OK("pause", ids[1])
		e.OK("resume", ids[1])
		e.OK("kill", ids[1], "KILL")
		e.AwaitStatus(ids[1], specs.StateStopped)
		_ = waiting.Wait()
	})
}

// A container that knows many files goes on working, and so do execs.
func TestManyFiles(t *testing.T) {
	e := harness.New(t)
	dir := volume(t, e, "many")
	const directories, files = 50, 500
	for d := range directories {
		sub := filepath.Join(dir, fmt.Sprint("d", d))
		assert.NilError(t, os.Mkdir(sub, 0o755))
		for f := range files {
			assert.NilError(t, os.WriteFile(filepath.Join(sub, fmt.Sprint("f", f)), nil, 0o644))
		}
	}
	var hard unix.Rlimit
	assert.NilError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &hard))
	bundle := e.Bundle([]string{"sleep", "1000"}, bindMount(dir, "/many"))
	e.OK("run", "--detach", "--bundle", bundle, "web")
	assert.Equal(t, strings.TrimSpace(e.OK("exec", "web", "sh", "-c", "ls -lR /many | grep -c ^-")), strconv.Itoa(directories*files))
	assert.Equal(t, e.OK("exec", "web", "cat", "/many/d7/f7"), "")
	server := e.Pod("web").VM[1].PID
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", server))
	assert.NilError(t, err)
	assert.Assert(t, len(open) < 10_000, "%d descriptors", len(open))
}

// What the host mounts below a slave bind it can unmount again while the container has used it.
func TestUnmountBelowBind(t *testing.T) {
	e := harness.New(t)
	dir := volume(t, e, "slave")
	assert.NilError(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	assert.NilError(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	defer func() { assert.NilError(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	below := filepath.Join(dir, "below")
	assert.NilError(t, os.Mkdir(below, 0o777))
	bundle := e.Bundle([]string{"sleep", "1000"}, bindMount(dir, "/s", "rbind", "rslave"))
	e.OK("run", "--detach", "--bundle", bundle, "web")
	for range 3 {
		assert.NilError(t, unix.Mount("none", below, "tmpfs", 0, ""))
		e.OK("exec", "web", "sh", "-c", "echo x > /s/below/file && ls -lR /s && cat /s/below/file")
		// The guest's kernel tells of a closed file a moment after close(2).
		harness.Eventually(t, "the host can unmount", func() bool { return unix.Unmount(below, 0) == nil })
		assert.Equal(t, e.OK("exec", "web", "ls", "/s/below"), "")
	}
}

// A read-only bind is so without what is mounted below it, unless it says otherwise.
func TestReadOnlyBindWithMountBelowLikeRunc(t *testing.T) {
	e := harness.New(t)
	dir := volume(t, e, "ro")
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "below"), 0o777))
	assert.NilError(t, unix.Mount("none", filepath.Join(dir, "below"), "tmpfs", 0, ""))
	defer func() { assert.NilError(t, unix.Unmount(filepath.Join(dir, "below"), 0)) }()
	all := runtimes(e)
	results := make([]string, len(all))
	for i, runtime := range all {
		bundle := e.Bundle([]string{"sh", "-c", "for d in /ro /ro/below /rro /rro/below /rw /rw/below; do touch $d/file && echo $d; done; rm -f /rw/file /rw/below/file"},
			bindMount(dir, "/ro", "rbind", "ro"), bindMount(dir, "/rro", "rbind", "rro"), bindMount(dir, "/rw", "rbind"))
		anyRunc(e, bundle)
		results[i] = harness.Finish(runtime.command("run", "--bundle", bundle, "box")).Stdout
	}
	assert.Equal(t, results[len(all)-1], "/ro/below\n/rw\n/rw/below\n")
	for i, theirs := range results {
		assert.Equal(t, results[len(all)-1], theirs, all[i].name)
	}
}
