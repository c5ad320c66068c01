package sharefs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// lookup finds a name in a directory and gives the guest a reference to what is there.
func (fs *FS) lookup(parent *node, dir int, name string, out *fuse.EntryOut) error {
	fd, err := fs.withRoom(func() (int, error) { return openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW, 0) })
	if err != nil {
		return err
	}
	n, st, err := fs.adopt(parent, name, fd)
	if err != nil {
		return err
	}
	fs.fillEntry(n, &st, out)
	return nil
}

func (fs *FS) fillEntry(n *node, st *unix.Statx_t, out *fuse.EntryOut) {
	out.NodeId = n.id
	entry, attributes := n.cacheTimes()
	out.SetEntryTimeout(entry)
	out.SetAttrTimeout(attributes)
	fs.fillAttr(n, st, &out.Attr)
	fs.reported(n, st)
}

// inDir runs f with a descriptor of the directory that the guest named, and with a valid name in it.
func (fs *FS) inDir(id uint64, name string, f func(parent *node, dir int) error) fuse.Status {
	if err := validName(name); err != nil {
		return status(err)
	}
	return fs.withNode(id, f)
}

// make runs f, which makes a file, with its mode, as the caller, and looks the file up.
func (fs *FS) make(h *fuse.InHeader, name string, out *fuse.EntryOut, f func(dir int) error) fuse.Status {
	return fs.inDir(h.NodeId, name, func(parent *node, dir int) error {
		err := fs.as(&h.Caller, func() error { return f(dir) })
		if err != nil {
			return err
		}
		return fs.lookup(parent, dir, name, out)
	})
}

// Lookup implements FUSE_LOOKUP.
func (fs *FS) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	return fs.inDir(h.NodeId, name, func(parent *node, dir int) error {
		err := fs.lookup(parent, dir, name, out)
		if errors.Is(err, unix.ENOENT) && parent.keepsAbsence() {
			*out = fuse.EntryOut{} // no node: the name is not there
			out.SetEntryTimeout(cacheTime)
			return nil
		}
		return err
	})
}

// Mkdir implements FUSE_MKDIR.
func (fs *FS) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return fs.make(&in.InHeader, name, out, func(dir int) error {
		return unix.Mkdirat(dir, name, fs.newMode(dir, in.Mode&0o7777, in.Umask))
	})
}

// Mknod implements FUSE_MKNOD, for files of all kinds but directories and symbolic links.
func (fs *FS) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
	default:
		return fuse.EINVAL
	}
	return fs.make(&in.InHeader, name, out, func(dir int) error {
		return unix.Mknodat(dir, name, fs.newMode(dir, in.Mode, in.Umask), decodeDevice(in.Rdev))
	})
}

// decodeDevice reads a device number as the guest's kernel writes it (new_encode_dev in linux/kdev_t.h).
func decodeDevice(dev uint32) int {
	return int(unix.Mkdev(dev&0xfff00>>8, dev&0xff|dev>>12&0xfff00)) //nolint:gosec // 32 bits
}

// Symlink implements FUSE_SYMLINK.
func (fs *FS) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return fs.make(h, name, out, func(dir int) error { return unix.Symlinkat(target, dir, name) })
}

// Link implements FUSE_LINK.
func (fs *FS) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	old, err := fs.find(in.Oldnodeid)
	if err != nil {
		return status(err)
	}
	d, err := fs.acquire(old)
	if err != nil {
		return status(err)
	}
	defer fs.release(d)
	return fs.make(&in.InHeader, name, out, func(dir int) error { return unix.Linkat(d.fd, "", dir, name, unix.AT_EMPTY_PATH) })
}

// Unlink implements FUSE_UNLINK.
func (fs *FS) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.remove(h, name, 0)
}

// Rmdir implements FUSE_RMDIR.
func (fs *FS) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.remove(h, name, unix.AT_REMOVEDIR)
}

func (fs *FS) remove(h *fuse.InHeader, name string, flags int) fuse.Status {
	return fs.inDir(h.NodeId, name, func(parent *node, dir int) error {
		n := fs.hold(parent, dir, name)
		if err := unix.Unlinkat(dir, name, flags); err != nil {
			return err
		}
		fs.nameGone(n, parent, name)
		return nil
	})
}

// hold is called before a name goes. It keeps a descriptor of the node there if nothing else will lead to the inode, which the
// guest may go on using: that is so on file systems without handles. nil: there is none, or it is not needed.
func (fs *FS) hold(parent *node, dir int, name string) *node {
	if parent.handle != nil {
		return nil
	}
	n, d := fs.at(dir, name)
	if n == nil {
		return nil
	}
	fs.mu.Lock()
	closing := fs.keep(n, d, nil)
	fs.mu.Unlock()
	closeAll(closing)
	return n
}

// nameGone records that the name of a node that is held is gone, if the node was not seen elsewhere since, by another link.
func (fs *FS) nameGone(n *node, parent *node, name string) {
	if n == nil {
		return
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if n.parent == parent && n.name == name {
		n.name = ""
	}
}

// Rename implements FUSE_RENAME and FUSE_RENAME2.
func (fs *FS) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	return fs.inDir(in.NodeId, oldName, func(oldParent *node, oldDir int) error {
		return asError(fs.inDir(in.Newdir, newName, func(newParent *node, newDir int) error {
			exchange := in.Flags&unix.RENAME_EXCHANGE != 0
			var replaced *node
			if !exchange {
				replaced = fs.hold(newParent, newDir, newName)
			}
			// A whiteout is made by rename itself: it is the caller's.
			err := fs.as(&in.Caller, func() error {
				return unix.Renameat2(oldDir, oldName, newDir, newName, uint(in.Flags))
			})
			if err != nil || newParent.handle != nil {
				return err
			}
			fs.nameGone(replaced, newParent, newName)
			fs.movedTo(newParent, newDir, newName)
			if exchange {
				fs.movedTo(oldParent, oldDir, oldName)
			}
			return nil
		}))
	})
}

// movedTo records the new place of what now has a name.
func (fs *FS) movedTo(parent *node, dir int, name string) {
	if n, d := fs.at(dir, name); n != nil {
		closeAll([]*descriptor{d})
		fs.mu.Lock()
		n.parent, n.name = parent, name
		fs.mu.Unlock()
	}
}

// Readlink implements FUSE_READLINK.
func (fs *FS) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	var target []byte
	code := fs.withNode(h.NodeId, func(_ *node, fd int) error {
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return err
		}
		target = buf[:n]
		return nil
	})
	return target, code
}

// withNode runs f with a descriptor of the node that the guest named.
func (fs *FS) withNode(id uint64, f func(n *node, fd int) error) fuse.Status {
	n, err := fs.find(id)
	if err != nil {
		return status(err)
	}
	d, err := fs.acquire(n)
	if err != nil {
		return status(err)
	}
	defer fs.release(d)
	return status(f(n, d.fd))
}

// StatFs implements FUSE_STATFS.
func (fs *FS) StatFs(_ <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return fs.withNode(h.NodeId, func(_ *node, fd int) error {
		var st unix.Statfs_t
		if err := unix.Fstatfs(fd, &st); err != nil {
			return err
		}
		*out = fuse.StatfsOut{
			Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
			Bsize: uint32(st.Bsize), NameLen: uint32(st.Namelen), Frsize: uint32(st.Frsize), //nolint:gosec // as the protocol has them
		}
		return nil
	})
}
