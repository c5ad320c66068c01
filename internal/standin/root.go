package standin

import (
	"errors"
	"fmt"
	"path"

	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// Root is what is shown at a stand-in as its file system: the nearest thing on the host to what its
// process sees.
type Root struct {
	Path     string // absolute
	ReadOnly bool
	Mounts   []RootMount // in order
}

// RootMount is a directory or file of the host on a path of a Root. Without a Source it is something that exists only
// in the guest, for which an empty directory stands that nobody can write to.
type RootMount struct {
	Source      string // absolute
	Destination string
	ReadOnly    bool
}

// ShowRoot makes root the root of the mount namespace of a stand-in that was started with NewMountNS. Some
// engines copy files to and from a container in the mount namespace of its pid: they must find the container's
// files there, and never the host's. After an error the stand-in is to be killed. A mount whose
// destination does not exist is left out.
func (p *Process) ShowRoot(root Root) error {
	if err := mountns.OnThread(func() error { return showRoot(p.PID, root) }); err != nil {
		return fmt.Errorf("show the root file system at the stand-in: %w", err)
	}
	return nil
}

// showRoot is ShowRoot on a thread that ends with it.
func showRoot(pid int, root Root) error {
	var fds []int
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	keep := func(fd int, err error) (int, error) {
		if err == nil {
			fds = append(fds, fd)
		}
		return fd, err
	}
	ns, err := keep(unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0))
	if err != nil {
		return err
	}
	// In a chroot, the paths of the bundle mean something below the root that the stand-in has.
	view, err := keep(unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0))
	if err != nil {
		return err
	}
	if err := enter(ns); err != nil {
		return err
	}
	outside, err := keep(unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0))
	if err != nil {
		return err
	}
	if err := changeRoot(view); err != nil {
		return err
	}
	tree, err := keep(clone(root.Path, root.ReadOnly))
	if err != nil {
		return fmt.Errorf("%s: %w", root.Path, err)
	}
	sources := make([]int, len(root.Mounts))
	for i, m := range root.Mounts {
		if m.Source == "" {
			sources[i], err = keep(emptyMount())
		} else {
			sources[i], err = keep(clone(m.Source, m.ReadOnly))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", m.Destination, err)
		}
	}
	if err := changeRoot(outside); err != nil {
		return err
	}
	if err := pivot(outside, tree); err != nil {
		return err
	}
	for i, m := range root.Mounts {
		if err := mountBelow(tree, m.Destination, sources[i]); err != nil {
			return fmt.Errorf("%s: %w", m.Destination, err)
		}
	}
	return nil
}

// enter moves this thread into a mount namespace, from which nothing is to go back to the one that it is a copy of.
func enter(ns int) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	var own, theirs unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/thread-self/ns/mnt", &own), unix.Fstat(ns, &theirs)); err != nil {
		return err
	}
	if own.Dev == theirs.Dev && own.Ino == theirs.Ino {
		return errors.New("it has no mount namespace of its own")
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("setns: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("cut off mounts: %w", err)
	}
	return nil
}

func changeRoot(dir int) error {
	if err := unix.Fchdir(dir); err != nil {
		return err
	}
	return unix.Chroot(".")
}

// clone returns a copy of the mounts at a path, attached nowhere.
func clone(path string, readOnly bool) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			_ = unix.Close(fd)
			return -1, fmt.Errorf("mount_setattr: %w", err)
		}
	}
	return fd, nil
}

// emptyMount returns an empty directory that is read-only, attached nowhere.
func emptyMount() (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fs)
	if err := errors.Join(unix.FsconfigSetString(fs, "mode", "555"), unix.FsconfigCreate(fs)); err != nil {
		return -1, fmt.Errorf("fsconfig: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return fd, nil
}

// pivot makes a mount tree the root of the namespace whose root this is, and of all threads in it that have that root.
func pivot(outside, tree int) error {
	const empty = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	if err := unix.MoveMount(tree, "", outside, "", empty); err != nil {
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
		return fmt.Errorf("unmount the host's root: %w", err)
	}
	return unix.Fchdir(tree)
}

// mountBelow puts a mount on a path below a root, whose symbolic links do not lead out of it.
func mountBelow(root int, destination string, mount int) error {
	target, err := unix.Openat2(root, path.Join(".", path.Clean("/"+destination)), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	err = unix.MoveMount(mount, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EINVAL) { // a file where a directory should be
		return nil
	}
	return err
}
