package shareserver

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"runv/internal/sharefs"
)

// namespaces are those that the server begins in.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// enterSandbox leaves all of the host but the directory, and all rights but those that serving it takes. The result is
// a descriptor of the directory. The working directory is that of the process's descriptors.
func enterSandbox(dir string) (root int, err error) {
	if err := enterRoot(dir); err != nil {
		return -1, fmt.Errorf("make %s the root: %w", dir, err)
	}
	root, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open root: %w", err)
	}
	unix.Umask(0) // the guest's kernel has applied its own
	if err := dropRights(); err != nil {
		return -1, fmt.Errorf("drop rights: %w", err)
	}
	return root, nil
}

// enterRoot makes the directory the root of all threads. What is mounted below it on the host later appears here, too.
func enterRoot(dir string) error {
	// Open files are opened again by way of /proc. Nothing else of it must be in reach: the copy of the
	// mount begins with the directory of descriptors, so that ".." stays there.
	fds, err := unix.OpenTree(unix.AT_FDCWD, "/proc/self/fd", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("copy mount of /proc/self/fd: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("set propagation: %w", err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	// The old root comes to lie on the new one (pivot_root(2), "pivot_root(".", ".")").
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the host's root: %w", err)
	}
	if err := unix.Fchdir(fds); err != nil {
		return fmt.Errorf("enter directory of descriptors: %w", err)
	}
	return nil // fds stays open: closing it would unmount the copy
}

const (
	secbitNoSetuidFixupLocked = 1 << 3 // linux/securebits.h
	capLast                   = 63     // the kernel has fewer, and says so
)

// dropRights takes from all threads what serving does not take. Rights belong to a thread, and Go's runtime has several.
func dropRights() error {
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, sharefs.Securebits|secbitNoSetuidFixupLocked); err != nil {
		return fmt.Errorf("set securebits: %w", err)
	}
	var keep [2]uint32
	for _, c := range sharefs.Capabilities {
		keep[c/32] |= 1 << (c % 32)
	}
	for c := range uintptr(capLast + 1) {
		if keep[c/32]&(1<<(c%32)) != 0 {
			continue
		}
		if err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c); errors.Is(err, unix.EINVAL) {
			break // there are no more
		} else if err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	if err := setCapabilities(keep); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid dumps: %w", err)
	}
	return nil
}

// allThreads makes a system call on each thread.
func allThreads(trap, a1, a2 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
