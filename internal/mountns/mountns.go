// Package mountns gives a process a mount namespace of its own, and lets it look into the one it came from.
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

// marker is the environment variable that tells the program, executed again by
// Enter, the descriptor of the namespace it came from.
const marker = "RUNV_HOST_MOUNTS"

// Enter moves the whole process into a mount namespace of its own. Mounts and
// unmounts of the host go on to reach it, where the host's mounts are shared, but none of its own go back.
//
// A namespace belongs to a thread, so a program with more than one enters by
// executing itself again, with the same arguments and process id; the descriptors in keep
// are inherited though they are close-on-exec. Call it at the start of main, before anything that must not happen
// twice. In the second run it returns the namespace that the process came from, for Do;
// the caller closes it. keep is close-on-exec again then.
func Enter(keep ...int) (host *os.File, err error) {
	if host, err = entered(keep); host != nil || err != nil {
		return host, err
	}
	// Until the end of this function, whether by execve or by an error, which the program does not survive.
	runtime.LockOSThread()
	fd, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("enter mount namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("enter mount namespace: unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("enter mount namespace: cut off from the host's: %w", err)
	}
	for _, fd := range append(slices.Clone(keep), fd) {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return nil, fmt.Errorf("enter mount namespace: keep descriptor %d: %w", fd, err)
		}
	}
	env := append(os.Environ(), marker+"="+strconv.Itoa(fd))
	err = unix.Exec("/proc/self/exe", os.Args, env)
	return nil, fmt.Errorf("enter mount namespace: execute %s again: %w", os.Args[0], err)
}

// entered returns what the first run has left, nil if this is the first run.
func entered(keep []int) (*os.File, error) {
	value, ok := os.LookupEnv(marker)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(marker); err != nil {
		return nil, err
	}
	fd, err := strconv.Atoi(value)
	if err == nil {
		var kind int
		if kind, err = unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err == nil && kind != unix.CLONE_NEWNS {
			err = unix.EINVAL
		}
	}
	if err != nil {
		return nil, fmt.Errorf("enter mount namespace: %s=%s: %w", marker, strings.ToValidUTF8(value, "?"), err)
	}
	for _, fd := range append(slices.Clone(keep), fd) {
		unix.CloseOnExec(fd)
	}
	// What execve calls a program that it got by this path is "exe".
	_ = os.WriteFile("/proc/self/comm", []byte("runv"), 0)
	return os.NewFile(uintptr(fd), "host's mount namespace"), nil
}

// Do calls f with the file system of another mount namespace: paths, open_tree and the
// like mean what they mean there. f runs on a thread of its own and must
// not start goroutines or threads that should be there, too. nil means the
// process's own namespace.
func Do(namespace *os.File, f func() error) error {
	if namespace == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, its namespace with it.
		runtime.LockOSThread()
		done <- inside(namespace, f)
	}()
	return <-done
}

func inside(namespace *os.File, f func() error) error {
	// A thread that shares its root and working directory with others cannot change namespaces.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter mount namespace: unshare: %w", err)
	}
	raw, err := namespace.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) { setErr = unix.Setns(int(fd), unix.CLONE_NEWNS) })
	if err := errors.Join(err, setErr); err != nil {
		return fmt.Errorf("enter mount namespace: %w", err)
	}
	return f()
}
