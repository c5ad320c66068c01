package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// unmountRounds bounds the work on mounts that somebody keeps adding.
const unmountRounds = 8

// removeTree deletes a directory. What is mounted on or below it is unmounted
// first, and should something be mounted there nevertheless it is not
// descended into: bind mounts of the user's files must never be emptied. A
// directory that does not exist is success, so two may remove the same one.
func removeTree(dir string) error {
	if err := unmountAll(dir); err != nil {
		return err
	}
	parent, err := unix.Open(filepath.Dir(dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	defer unix.Close(parent)
	if err := removeAt(parent, filepath.Base(dir)); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// removeAt deletes the entry name of the directory parent, with all below it
// that is on the same mount.
func removeAt(parent int, name string) error {
	err := unix.Unlinkat(parent, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s: %w", name, err)
	}
	// Not device numbers but mounts decide: a bind mount of a directory of the
	// same file system has the same device number.
	fd, err := unix.Openat2(parent, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("%s: something is mounted on it", name)
	case err != nil:
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := removeContent(os.NewFile(uintptr(fd), name)); err != nil {
		return fmt.Errorf("%s/%w", name, err)
	}
	err = unix.Unlinkat(parent, name, unix.AT_REMOVEDIR)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// removeContent deletes what is in dir, and closes dir.
func removeContent(dir *os.File) error {
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if err := removeAt(int(dir.Fd()), name); err != nil {
				return err
			}
		}
		if len(names) == 0 {
			if errors.Is(err, io.EOF) || errors.Is(err, fs.ErrNotExist) { // removed by another meanwhile
				return nil
			}
			return err
		}
		// Removing moves positions in some file systems: begin again.
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
}

// unmountAll detaches every mount on or below dir in this mount namespace, the
// deepest first.
func unmountAll(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount below %s: %w", dir, err)
	}
	for range unmountRounds {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(real))
		if err != nil {
			return fmt.Errorf("unmount below %s: read mounts: %w", dir, err)
		}
		if len(mounts) == 0 {
			return nil
		}
		sort.Slice(mounts, func(i, j int) bool { return len(mounts[i].Mountpoint) > len(mounts[j].Mountpoint) })
		for _, m := range mounts {
			// Unmounting below a shared recursive bind would also unmount at its source.
			_ = unix.Mount("", m.Mountpoint, "", unix.MS_PRIVATE, "")
		}
		for _, m := range mounts {
			err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			// EINVAL, ENOENT: gone already, with one that was stacked on it or by another's hand.
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
		}
	}
	return fmt.Errorf("unmount below %s: mounts keep appearing", dir)
}
