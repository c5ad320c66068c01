package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// tree is a copy of a part of the mount tree that is attached nowhere.
type tree struct {
	fd  int
	dir bool
	key volumeKey // of its source
	// below says that something is mounted below the source, and copied with it.
	below bool

	made []string // paths of the mount points that were missing
}

func (t tree) close() { _ = unix.Close(t.fd) }

// treeOptions tell how to copy.
type treeOptions struct {
	recursive     bool // with what is mounted below
	readOnly      bool
	readOnlyBelow bool // what is mounted below, too
	mustBeDir     bool
	ids           *IDMap
	points        []MountPoint // to make where they are missing, first
}

// openTree copies the mount tree at path, as the host sees it (nil: this process's).
// The copies are cut off: mounts of the source that come or go later follow it here, nothing
// goes back. The error names the path. When ctx ends first, looking up path goes on
// behind the scenes, for a dead network file system cannot be interrupted.
func openTree(ctx context.Context, host *mountns.Host, path string, opts treeOptions) (tree, error) {
	type result struct {
		tree tree
		err  error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		err := mountns.Do(host, func() (err error) {
			r.tree, err = cloneTree(path, opts)
			return err
		})
		r.err = err
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return tree{}, fmt.Errorf("bind %s: %w", path, kind(r.err))
		}
		return r.tree, nil
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				r.tree.close()
			}
		}()
		return tree{}, fmt.Errorf("bind %s: %w", path, context.Cause(ctx))
	}
}

// cloneTree does that on the right thread.
func cloneTree(path string, opts treeOptions) (_ tree, err error) {
	// Everything below goes by this descriptor: who renames path now is too late.
	source, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return tree{}, err
	}
	defer unix.Close(source)
	var st unix.Stat_t
	if err := unix.Fstat(source, &st); err != nil {
		return tree{}, err
	}
	t := tree{dir: st.Mode&unix.S_IFMT == unix.S_IFDIR}
	if t.key, err = keyOf(source, &st, opts.recursive); err != nil {
		return tree{}, err
	}
	if opts.mustBeDir && !t.dir {
		return tree{}, unix.ENOTDIR
	}
	if err := checkAccessControl(source); err != nil {
		return tree{}, err
	}
	if t.made, err = makeMountPoints(source, opts.points); err != nil {
		return tree{}, err
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if opts.recursive && t.dir {
		flags |= unix.AT_RECURSIVE
	}
	if flags&unix.AT_RECURSIVE != 0 {
		if t.below, err = mountsBelow(source); err != nil {
			return tree{}, err
		}
	}
	if t.fd, err = unix.OpenTree(source, "", flags); err != nil {
		return tree{}, fmt.Errorf("copy mount: %w", err)
	}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if opts.ids != nil {
		if err = opts.ids.apply(t.fd); err != nil {
			return tree{}, err
		}
	}
	// The server needs none of these on the host. What a device node or a
	// set-user-id bit means to the guest is the guest's affair.
	all := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_SLAVE,
	}
	top := unix.MountAttr{}
	if opts.readOnly {
		top.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if opts.readOnlyBelow {
		all.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	for _, set := range []struct {
		flags uint
		attr  *unix.MountAttr
	}{{unix.AT_RECURSIVE, &all}, {0, &top}} {
		if err = unix.MountSetattr(t.fd, "", unix.AT_EMPTY_PATH|set.flags, set.attr); err != nil {
			return tree{}, fmt.Errorf("set mount attributes: %w", err)
		}
	}
	return t, nil
}

// mountsBelow tells whether something is mounted below a directory, in the mount namespace of this thread.
func mountsBelow(dir int) (bool, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/thread-self/fd/%d", dir))
	if err != nil {
		return false, err
	}
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	prefix := strings.TrimSuffix(path, "/") + "/"
	mounts, err := mountinfo.GetMountsFromReader(f, func(m *mountinfo.Info) (skip, stop bool) {
		below := strings.HasPrefix(m.Mountpoint, prefix)
		return !below, below
	})
	if err != nil {
		return false, fmt.Errorf("list mounts: %w", err)
	}
	return len(mounts) > 0, nil
}

// checkAccessControl refuses a file system whose access control lists the guest's kernel does not know. The guest decides who
// may open what, so it must not decide by less than the host would. It does know modes and POSIX ACLs.
func checkAccessControl(source int) error {
	names := make([]byte, 64<<10)
	n, err := unix.Listxattr(fmt.Sprintf("/proc/self/fd/%d", source), names)
	if err != nil {
		return nil //nolint:nilerr // a file system without extended attributes has no lists either
	}
	if kind := foreignLists(names[:n]); kind != "" {
		return fmt.Errorf("its files have %s access control lists, which the guest cannot enforce: %w", kind, errdefs.ErrNotImplemented)
	}
	return nil
}

// foreignLists names the kind of access control lists that are in a list of extended attributes, other than POSIX's.
func foreignLists(names []byte) string {
	for name := range strings.SplitSeq(string(names), "\x00") {
		switch name {
		case "system.nfs4_acl", "system.nfs4_dacl": // nfs4_acl(5)
			return "NFSv4"
		case "system.richacl":
			return "rich"
		case "system.cifs_acl", "system.cifs_ntsd", "system.smb3_acl", "system.ntfs_acl": // mount.cifs(8), ntfs-3g(8)
			return "Windows"
		}
	}
	return ""
}

// makeMountPoints makes mount points in a root file system that is about to become
// read-only. Its content is hostile: its links are resolved inside of it, and
// what exists, whatever it is, is left alone. It returns the paths of those that were missing.
func makeMountPoints(root int, points []MountPoint) (made []string, err error) {
	if len(points) == 0 {
		return nil, nil
	}
	fd, err := unix.FcntlInt(uintptr(root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), "rootfs")
	defer dir.Close()
	for _, p := range points {
		missing, err := makeMountPoint(dir, p)
		if err != nil {
			return nil, fmt.Errorf("make mount point %s in it: %w", p.Path, err)
		}
		if missing {
			made = append(made, p.Path)
		}
	}
	return made, nil
}

// makeMountPoint makes a mount point and tells whether it was missing.
func makeMountPoint(root *os.File, p MountPoint) (missing bool, err error) {
	found, err := pathrs.OpenatInRoot(root, p.Path)
	if err == nil {
		return false, found.Close()
	}
	if !errors.Is(err, unix.ENOENT) {
		return false, err
	}
	// Links may lead to what is missing. Whoever changes them meanwhile gets an error, or something
	// else in the root.
	base := fmt.Sprintf("/proc/self/fd/%d", root.Fd())
	point, err := securejoin.SecureJoin(base, p.Path)
	if err != nil {
		return false, err
	}
	point = "/" + strings.TrimPrefix(strings.TrimPrefix(point, base), "/")
	parent := point
	if p.File {
		parent = path.Dir(point)
	}
	made, err := pathrs.MkdirAllHandle(root, parent, 0o755)
	if err != nil {
		return false, err
	}
	defer made.Close()
	if !p.File {
		return true, nil
	}
	err = unix.Mknodat(int(made.Fd()), path.Base(point), unix.S_IFREG|0o644, 0)
	if errors.Is(err, unix.EEXIST) { // by somebody else, just now
		return false, nil
	}
	return err == nil, err
}

// attach mounts the tree on the path below dir and uses it up.
func (t tree) attach(dir *os.File, path string) error {
	defer t.close()
	target, err := unix.Openat2(int(dir.Fd()), path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return fmt.Errorf("open mount point %s: %w", path, err)
	}
	defer unix.Close(target)
	if err := unix.MoveMount(t.fd, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount on %s: %w", path, err)
	}
	return nil
}

// unmount detaches what is mounted on path; nothing mounted, or no such path,
// is success. What the server still has open of it stays alive until that is
// closed, so a plain unmount, which refuses then, is only tried for the sake of a clean end.
func unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// kind gives an error of a caller's path its errdefs kind.
func kind(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return &sourceError{err, errdefs.ErrNotFound}
	case errors.Is(err, unix.ENOTDIR):
		return &sourceError{err, errdefs.ErrInvalidArgument}
	}
	return err
}

// sourceError has the text of its cause and a kind besides.
type sourceError struct{ cause, kind error }

func (e *sourceError) Error() string   { return e.cause.Error() }
func (e *sourceError) Unwrap() []error { return []error{e.cause, e.kind} }
