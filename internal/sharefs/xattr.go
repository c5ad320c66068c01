package sharefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// GetXAttr implements FUSE_GETXATTR.
func (fs *FS) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (size uint32, code fuse.Status) {
	code = fs.withNode(h.NodeId, func(_ *node, fd int) error {
		n, err := unix.Getxattr(fs.path(fd), name, dest)
		size = uint32(max(n, 0)) //nolint:gosec // at most 64 KiB
		return err
	})
	return size, code
}

// ListXAttr implements FUSE_LISTXATTR.
func (fs *FS) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (size uint32, code fuse.Status) {
	code = fs.withNode(h.NodeId, func(_ *node, fd int) error {
		n, err := unix.Listxattr(fs.path(fd), dest)
		size = uint32(max(n, 0)) //nolint:gosec // at most 64 KiB
		return err
	})
	return size, code
}

// SetXAttr implements FUSE_SETXATTR. An ACL changes the group's bits of the mode as well, and takes away the set-group-id
// bit if the guest's kernel says that the caller is not of the group.
func (fs *FS) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	return fs.withNode(in.NodeId, func(_ *node, fd int) error {
		if err := unix.Setxattr(fs.path(fd), name, data, int(in.Flags)); err != nil || in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID == 0 {
			return err
		}
		st, err := stat(fd)
		if err != nil || st.Mode&unix.S_ISGID == 0 {
			return err
		}
		return unix.Fchmodat(unix.AT_FDCWD, fs.path(fd), uint32(st.Mode)&0o7777&^unix.S_ISGID, 0)
	})
}

// RemoveXAttr implements FUSE_REMOVEXATTR.
func (fs *FS) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.withNode(h.NodeId, func(_ *node, fd int) error { return unix.Removexattr(fs.path(fd), name) })
}
