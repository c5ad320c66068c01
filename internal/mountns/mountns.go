// Package mountns gives a process a mount namespace of its own, and lets it look into the one it
// came from.
//
// What the supervisor mounts for a pod exists only in its own namespace: it
// vanishes with the supervisor, however that ends. The supervisor calls Enter first
// thing; internal/storage uses Do to reach what the host mounted later. This
// package mounts nothing itself.
package mountns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// marker is the environment variable that tells the program, executed again by Enter, the
// descriptors of the namespace it came from and of the root it had there, with a comma between
// them.
const marker = "RUNV_HOST_MOUNTS"

// Host is where a process that has entered a namespace came from: a mount namespace, and
// the root directory in it, which is not the namespace's own when the process is in a chroot.
type Host struct {
	mounts, root *os.File
}

// Close closes both. A nil Host may be closed.
func (h *Host) Close() error {
	if h == nil {
		return nil
	}
	return errors.Join(h.mounts.Close(), h.root.Close())
}

// Enter moves the whole process into a mount namespace of its own. Mounts and unmounts of the host
// go on to reach it, where the host's mounts are shared, but none of its own go back.
//
// A namespace belongs to a thread, so a program with more than one enters by executing itself
// again, with the same arguments and process id; the descriptors in keep are inherited though they
// are close-on-exec. Call it at the start of main, before anything that must not happen twice. In
// the second run it returns the namespace that the process came from, for Do; the caller closes it.
// keep is close-on-exec again then.
func Enter(keep ...int) (host *Host, err error) {
	if host, err = entered(keep); host != nil || err != nil {
		return host, err
	}
	// Until the end of this function, whether by execve or by an error, which the program does not
	// survive.
	runtime.LockOSThread()
	fd, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("enter mount namespace: %w", err)
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("enter mount namespace: open the root: %w", err)
	}
	program := self()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("enter mount namespace: unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("enter mount namespace: cut off from the host's: %w", err)
	}
	for _, fd := range append(slices.Clone(keep), fd, root) {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return nil, fmt.Errorf("enter mount namespace: keep descriptor %d: %w", fd, err)
		}
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d,%d", marker, fd, root))
	err = unix.Exec(program, os.Args, env)
	return nil, fmt.Errorf("enter mount namespace: execute %s again: %w", os.Args[0], err)
}

// self returns a path of this program, by its name where possible: executed as /proc/self/exe the
// program would be the file in the namespace that it leaves, and in a chroot os.Executable would
// then answer with a path from outside.
func self() string {
	const exe = "/proc/self/exe"
	name, err := os.Executable()
	if err != nil {
		return exe
	}
	named, err := os.Stat(name)
	if err != nil {
		return exe
	}
	if running, err := os.Stat(exe); err != nil || !os.SameFile(named, running) {
		return exe // replaced since it was started
	}
	return name
}

// entered returns what the first run has left, nil if this is the first run.
func entered(keep []int) (*Host, error) {
	value, ok := os.LookupEnv(marker)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(marker); err != nil {
		return nil, err
	}
	fd, root, err := descriptors(value)
	if err != nil {
		return nil, fmt.Errorf("enter mount namespace: %s=%s: %w", marker, strings.ToValidUTF8(value, "?"), err)
	}
	for _, fd := range append(slices.Clone(keep), fd, root) {
		unix.CloseOnExec(fd)
	}
	// What execve calls a program that it got by this path is "exe".
	_ = os.WriteFile("/proc/self/comm", []byte("runv"), 0)
	return &Host{mounts: os.NewFile(uintptr(fd), "host's mount namespace"), root: os.NewFile(uintptr(root), "host's root")}, nil
}

// descriptors reads a marker's value and checks that its descriptors are what they should be.
func descriptors(value string) (mounts, root int, err error) {
	first, second, _ := strings.Cut(value, ",")
	if mounts, err = strconv.Atoi(first); err != nil {
		return 0, 0, err
	}
	if root, err = strconv.Atoi(second); err != nil {
		return 0, 0, err
	}
	kind, err := unix.IoctlRetInt(mounts, unix.NS_GET_NSTYPE)
	if err != nil {
		return 0, 0, err
	}
	if kind != unix.CLONE_NEWNS {
		return 0, 0, unix.EINVAL
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return 0, 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, 0, unix.ENOTDIR
	}
	return mounts, root, nil
}

// Do calls f with the file system of the host: paths, open_tree and the
// like mean what they mean there. f runs on a thread of its own and must
// not start goroutines or threads that should be there, too. nil means the
// process's own namespace.
func Do(host *Host, f func() error) error {
	if host == nil {
		return f()
	}
	return OnThread(func() error { return inside(host, f) })
}

// OnThread runs f on a thread that ends with it, so that f may change what belongs to a thread, such
// as its namespaces and its root. It is never the process's first thread, which cannot end, and which
// is what /proc/PID shows to others.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- OnThread(f) // elsewhere, for this thread is taken
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the thread ends with the goroutine.
		done <- f()
	}()
	return <-done
}

func inside(host *Host, f func() error) error {
	// A thread that shares its root and working directory with others cannot change namespaces.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter mount namespace: unshare: %w", err)
	}
	if err := with(host.mounts, func(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNS) }); err != nil {
		return fmt.Errorf("enter mount namespace: %w", err)
	}
	// Entering makes the namespace's root the thread's.
	if err := with(host.root, unix.Fchdir); err != nil {
		return fmt.Errorf("enter mount namespace: go to the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter mount namespace: change the root: %w", err)
	}
	return f()
}

// with calls f with a file's descriptor, which stays open meanwhile.
func with(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) { callErr = f(int(fd)) })
	return errors.Join(err, callErr)
}
