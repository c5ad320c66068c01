package sharefs_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/sharefs"
)

// TestMain makes this process what the server is: it keeps its capabilities with another file-system uid, in a mount
// namespace of its own, with the umask 0. It is also the actor: a process of a user's.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "act" {
		actor()
		return
	}
	if os.Geteuid() == 0 {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/hanwen/go-fuse/v2/fuse.(*Server).Serve"))
}

// prepare starts this program again with other securebits, which belong to a thread and are inherited by the program that it
// executes.
func prepare() error {
	unix.Umask(0)
	if bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0); err != nil || bits&sharefs.Securebits != 0 {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, sharefs.Securebits, 0, 0, 0); err != nil {
		return fmt.Errorf("set securebits: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, os.Environ())
}

// share serves a directory over the kernel's own FUSE, whose checks and caches are those of virtio-fs, and returns where
// it is mounted.
func share(t *testing.T, dir string, limits sharefs.Limits) (mounted string, fs *sharefs.FS) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	defer unix.Close(root)
	fs, err = sharefs.New(sharefs.Config{Root: root, Proc: "/proc/self/fd/", Limits: limits})
	assert.NilError(t, err)
	mounted = t.TempDir()
	assert.NilError(t, os.Chmod(mounted, 0o755))
	opts := sharefs.Options()
	opts.AllowOther, opts.DirectMountStrict, opts.DirectMountFlags = true, true, unix.MS_MGC_VAL
	opts.Options = []string{"default_permissions"}
	server, err := fuse.NewServer(fs, mounted, opts)
	assert.NilError(t, err)
	go server.Serve()
	assert.NilError(t, server.WaitMount())
	t.Cleanup(func() {
		assert.NilError(t, server.Unmount())
		server.Wait()
		fs.Close()
	})
	return mounted, fs
}

// defaults are the limits of a server with room.
func defaults() sharefs.Limits { return sharefs.LimitsFor(20_000) }

// A user is who acts.
type user struct {
	UID, GID uint32
	Groups   []uint32
	Drop     []uint // capabilities that root goes without
}

// A step is what an actor does.
type step struct {
	Do          string
	Path, Path2 string
	Mode        uint32
	A, B        int
	Text        []byte // not a string: JSON would change what is no UTF-8
}

// act lets a user do steps below a directory, and returns what each of them gave: an error's name, or a result.
func act(t *testing.T, who user, dir string, umask int, steps []step) []string {
	t.Helper()
	input, err := json.Marshal(map[string]any{"dir": dir, "umask": umask, "steps": steps, "drop": who.Drop})
	assert.NilError(t, err)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "act", string(input))
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: who.UID, Gid: who.GID, Groups: who.Groups}}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	assert.NilError(t, err)
	var results []string
	assert.NilError(t, json.Unmarshal(out, &results))
	return results
}

func actor() {
	runtime.LockOSThread()
	var in struct {
		Dir   string
		Umask int
		Steps []step
		Drop  []uint
	}
	if err := json.Unmarshal([]byte(os.Args[2]), &in); err != nil {
		panic(err)
	}
	unix.Umask(in.Umask)
	if len(in.Drop) > 0 {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			panic(err)
		}
		for _, c := range in.Drop {
			data[c/32].Effective &^= 1 << (c % 32)
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			panic(err)
		}
	}
	results := make([]string, len(in.Steps))
	for i, s := range in.Steps {
		result, err := s.run(in.Dir)
		if errno, ok := errors.AsType[unix.Errno](err); ok {
			result = unix.ErrnoName(errno)
		} else if err != nil {
			result = err.Error()
		}
		results[i] = result
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
