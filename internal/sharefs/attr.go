package sharefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// getattrFH in a GETATTR says that it is about an open file; Linux's kernel sets it when it asks before a read, and not
// for stat(2) and fstat(2).
const getattrFH = 1 << 0 // FUSE_GETATTR_FH

func (fs *FS) fillAttr(n *node, st *unix.Statx_t, out *fuse.Attr) {
	*out = fuse.Attr{
		Ino: fs.inode(n.key.dev, st.Ino), Size: st.Size, Blocks: st.Blocks,
		Atime: uint64(st.Atime.Sec), Mtime: uint64(st.Mtime.Sec), Ctime: uint64(st.Ctime.Sec), //nolint:gosec // as the protocol has them
		Atimensec: st.Atime.Nsec, Mtimensec: st.Mtime.Nsec, Ctimensec: st.Ctime.Nsec,
		Mode: uint32(st.Mode), Nlink: st.Nlink, Owner: fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Rdev: encodeDevice(st.Rdev_major, st.Rdev_minor), Blksize: st.Blksize,
	}
}

// encodeDevice writes a device number as the guest's kernel reads it (new_decode_dev in linux/kdev_t.h).
func encodeDevice(major, minor uint32) uint32 {
	return minor&0xff | major&0xfff<<8 | minor&^0xff<<12
}

// inode tells apart files of different devices of the host, which are one device to the guest: all but the first device's
// numbers have the upper bits changed.
func (fs *FS) inode(dev, ino uint64) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	i, ok := fs.devices[dev]
	if !ok {
		i = uint64(len(fs.devices))
		if i < 1<<15 { // the map is bounded; a guest cannot make devices, but the host's automounts can be many
			fs.devices[dev] = i
		}
	}
	return ino ^ i<<48
}

// GetAttr implements FUSE_GETATTR.
func (fs *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Flags()&getattrFH != 0 {
		f, err := fs.file(in.Fh(), in.NodeId)
		if err != nil {
			return status(err)
		}
		defer f.put()
		return status(fs.getAttr(f.node, f.fd, true, out))
	}
	return fs.withNode(in.NodeId, func(n *node, fd int) error { return fs.getAttr(n, fd, false, out) })
}

func (fs *FS) getAttr(n *node, fd int, beforeRead bool, out *fuse.AttrOut) error {
	st, err := stat(fd)
	if err != nil {
		return err
	}
	_, attributes := n.cacheTimes()
	out.SetTimeout(attributes)
	fs.fillAttr(n, &st, &out.Attr)
	if beforeRead {
		out.Mtimensec = fs.cacheVersion(n, &st)
	} else {
		fs.reported(n, &st)
	}
	return nil
}

// SetAttr implements FUSE_SETATTR.
func (fs *FS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	var f *openFile
	if fh, ok := in.GetFh(); ok {
		var err error
		if f, err = fs.file(fh, in.NodeId); err != nil {
			return status(err)
		}
		defer f.put()
	}
	return fs.withNode(in.NodeId, func(n *node, fd int) error {
		if err := fs.setAttr(n, fd, f, &in.SetAttrInCommon); err != nil {
			return err
		}
		return fs.getAttr(n, fd, false, out)
	})
}

func (fs *FS) setAttr(n *node, fd int, f *openFile, in *fuse.SetAttrInCommon) error {
	if mode, ok := in.GetMode(); ok {
		if n.kind == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := unix.Fchmodat(unix.AT_FDCWD, fs.path(fd), mode, 0); err != nil {
			return err
		}
	}
	uid, hasUID := in.GetUID()
	gid, hasGID := in.GetGID()
	if hasUID || hasGID {
		u, g := -1, -1
		if hasUID {
			u = int(uid)
		}
		if hasGID {
			g = int(gid)
		}
		if err := unix.Fchownat(fd, "", u, g, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if size, ok := in.GetSize(); ok {
		if n.kind != unix.S_IFREG {
			return unix.EINVAL
		}
		if err := fs.truncate(fd, f, int64(size), in.Valid&fuse.FATTR_KILL_SUIDGID != 0); err != nil { //nolint:gosec // the kernel checks
			return err
		}
	}
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) != 0 {
		times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
		setTime(&times[0], in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec)
		setTime(&times[1], in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec)
		return unix.UtimesNanoAt(fd, "", times[:], unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	}
	return nil
}

// truncate changes the size of a file, by way of f if that was opened for writing.
func (fs *FS) truncate(path int, f *openFile, size int64, kill bool) error {
	fd := -1
	if f != nil && f.writable {
		fd = f.fd
	} else {
		opened, err := fs.openNode(path, unix.O_WRONLY)
		if err != nil {
			return err
		}
		defer unix.Close(opened)
		fd = opened
	}
	if err := retry(func() error { return unix.Ftruncate(fd, size) }); err != nil || !kill {
		return err
	}
	return killPrivileges(fd)
}

func setTime(t *unix.Timespec, valid, given, now uint32, sec uint64, nsec uint32) {
	switch {
	case valid&now != 0:
		t.Nsec = unix.UTIME_NOW
	case valid&given != 0:
		t.Sec, t.Nsec = int64(sec), int64(nsec) //nolint:gosec // as the protocol has them
	}
}
