package harness

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// ownRoot tells a test process, executed again by LeaveChroot, that its root is its namespace's.
const ownRoot = "RUNV_TEST_OWN_ROOT"

// LeaveChroot makes the root of a test process that is in a chroot the root of a mount namespace of
// its own. In a chroot the oracle is none: the kernel makes no user namespace there, and what runc adds
// to a container gets the root outside, since entering a namespace leads to its root.
func LeaveChroot() error {
	if os.Getenv(ownRoot) != "" {
		return os.Unsetenv(ownRoot)
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	return mountns.OnThread(func() error { return pivot(wd) })
}

// pivot returns when this process is in no chroot, or with an error.
func pivot(wd string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	chroot, err := openRoot()
	if err != nil {
		return err
	}
	defer unix.Close(chroot)
	ns, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil { // its root becomes this thread's
		return fmt.Errorf("setns: %w", err)
	}
	outside, err := openRoot()
	if err != nil {
		return err
	}
	defer unix.Close(outside)
	var in, out unix.Statx_t
	for fd, st := range map[int]*unix.Statx_t{chroot: &in, outside: &out} {
		if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_MNT_ID, st); err != nil {
			return err
		}
	}
	if in.Mnt_id == out.Mnt_id && in.Ino == out.Ino {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("cut off mounts: %w", err)
	}
	// A copy on itself, for the new root must be a mount.
	tree, err := unix.OpenTree(chroot, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", chroot, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	if err := unix.Fchdir(tree); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Fchdir(outside); err != nil { // it lies on the new root now
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	if err := unix.Chdir(wd); err != nil {
		return err
	}
	err = unix.Exec(program(), os.Args, append(os.Environ(), ownRoot+"=1"))
	return fmt.Errorf("execute the tests again: %w", err)
}

// program is a path of this program, by its name where possible: executed as /proc/self/exe it would be the file
// on the root that it has left, of which os.Executable knows no path.
func program() string {
	const exe = "/proc/self/exe"
	name, err := filepath.Abs(os.Args[0])
	if err != nil {
		return exe
	}
	if _, err := os.Stat(name); err != nil {
		return exe
	}
	return name
}

func openRoot() (int, error) {
	return unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
