package sharefs

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// An openFile is what the guest has opened: a file, or a directory.
type openFile struct {
	id       uint64
	node     *node
	fd       int
	writable bool
	append   bool
	refs     atomic.Int64 // the guest's, and one for each request that uses it; the last one closes fd
	dir      directory
}

// get takes a reference, unless the file has been closed.
func (f *openFile) get() bool {
	for {
		n := f.refs.Load()
		if n == 0 {
			return false
		}
		if f.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (f *openFile) put() {
	if f.refs.Add(-1) == 0 {
		_ = unix.Close(f.fd)
	}
}

// file returns an open file with a reference, by the numbers that the guest gave.
func (fs *FS) file(fh, nodeID uint64) (*openFile, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.files[fh]
	if f == nil || f.node.id != nodeID || !f.get() {
		return nil, unix.EBADF
	}
	return f, nil
}

// executed in the flags of an open says that the kernel opens a program to execute it (__FMODE_EXEC, linux/fs.h).
const executed = 0x20

// room tells whether the guest may have one more file of a volume open.
func (fs *FS) room(v *volume, flags uint32) error {
	limit := fs.limits.Files
	if flags&executed == 0 {
		limit -= fs.limits.Programs
		if v != nil && v.bind {
			limit -= fs.limits.Programs / 2
		}
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if len(fs.files)+fs.locked >= limit {
		return unix.ENFILE
	}
	return nil
}

// add makes an open file of a descriptor, which it uses up.
func (fs *FS) add(n *node, fd int, flags uint32) *openFile {
	f := &openFile{
		node: n, fd: fd, writable: flags&unix.O_ACCMODE != unix.O_RDONLY, append: flags&unix.O_APPEND != 0,
	}
	f.refs.Store(1)
	fs.mu.Lock()
	fs.lastFile++
	f.id = fs.lastFile
	fs.files[f.id] = f
	if n.opened == nil { // most nodes are never opened
		n.opened = make(map[*openFile]struct{})
	}
	n.opened[f] = struct{}{}
	fs.mu.Unlock()
	return f
}

// forgetFile takes the guest's reference back. Idempotent.
func (fs *FS) forgetFile(f *openFile) {
	fs.mu.Lock()
	known := fs.files[f.id] == f
	if known {
		delete(fs.files, f.id)
		delete(f.node.opened, f)
	}
	fs.mu.Unlock()
	if known {
		f.put()
	}
}

// openFlags are the flags for the host of those that the guest's program gave. What concerns the guest's page cache only,
// and what could lead elsewhere, is left out.
func openFlags(flags uint32) int {
	const passed = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME
	return int(flags&passed) | unix.O_CLOEXEC | unix.O_NOCTTY
}

// Open implements FUSE_OPEN.
func (fs *FS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return fs.withNode(in.NodeId, func(n *node, fd int) error {
		if n.kind != unix.S_IFREG {
			return unix.EINVAL // the guest's kernel opens all other kinds itself
		}
		if err := fs.room(n.volume, in.Flags); err != nil {
			return err
		}
		opened, err := fs.openNode(fd, in.Flags)
		if err != nil {
			return err
		}
		if in.Mode&fuse.OPEN_KILL_SUIDGID != 0 { // the file has been truncated
			if err := killPrivileges(opened); err != nil {
				_ = unix.Close(opened)
				return err
			}
		}
		settled := fs.settled(n, opened)
		out.Fh = fs.add(n, opened, in.Flags).id
		if settled {
			out.OpenFlags = fuse.FOPEN_KEEP_CACHE
		}
		return nil
	})
}

// openNode opens the inode of a descriptor.
func (fs *FS) openNode(path int, flags uint32) (int, error) {
	return fs.withRoom(func() (fd int, err error) {
		err = retry(func() error {
			fd, err = unix.Open(fs.path(path), openFlags(flags), 0)
			return err
		})
		return fd, err
	})
}

// Create implements FUSE_CREATE. A file that is already there is not opened: the guest's kernel believed that there was
// none, so it has not checked whether the caller may open it. ESTALE makes it look the name up again.
func (fs *FS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	return fs.inDir(in.NodeId, name, func(parent *node, dir int) error {
		if err := fs.room(parent.volume, in.Flags); err != nil {
			return err
		}
		fd, err := fs.create(dir, name, in, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)
		if errors.Is(err, unix.EEXIST) && in.Flags&unix.O_EXCL == 0 {
			return unix.ESTALE
		}
		if err != nil {
			return err
		}
		return fs.created(parent, name, fd, in, out)
	})
}

// Tmpfile implements FUSE_TMPFILE: a file without a name (O_TMPFILE).
func (fs *FS) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	return fs.withNode(in.NodeId, func(parent *node, dir int) error {
		if err := fs.room(parent.volume, in.Flags); err != nil {
			return err
		}
		// A directory with no permissions at all is the work directory of an overlay in the guest. Overlayfs of Linux 6.1 goes on to
		// use such a file by the name that it never had, and finds it stale; without such files it makes and renames others.
		if st, err := stat(dir); err != nil || st.Mode&0o777 == 0 {
			return unix.EOPNOTSUPP
		}
		fd, err := fs.create(dir, ".", in, unix.O_TMPFILE|int(in.Flags&unix.O_EXCL))
		if err != nil {
			return err
		}
		return fs.created(parent, "", fd, in, out)
	})
}

func (fs *FS) create(dir int, name string, in *fuse.CreateIn, how int) (int, error) {
	return fs.withRoom(func() (fd int, err error) {
		mode := fs.newMode(dir, in.Mode&0o7777, in.Umask)
		err = fs.as(&in.Caller, func() error {
			fd, err = openat(dir, name, openFlags(in.Flags)&^unix.O_TRUNC|how, mode)
			return err
		})
		return fd, err
	})
}

// created gives the guest a reference to a new file, and the file open.
func (fs *FS) created(parent *node, name string, fd int, in *fuse.CreateIn, out *fuse.CreateOut) error {
	path, err := fs.withRoom(func() (int, error) { return unix.Open(fs.path(fd), unix.O_PATH|unix.O_CLOEXEC, 0) })
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	n, st, err := fs.adopt(parent, name, path)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	fs.fillEntry(n, &st, &out.EntryOut)
	out.Fh = fs.add(n, fd, in.Flags).id
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return nil
}

// Release implements FUSE_RELEASE.
func (fs *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	f, err := fs.file(in.Fh, in.NodeId)
	if err != nil {
		return
	}
	fs.forgetFile(f)
	fs.unlockFile(f)
	f.put()
	fs.locksChanged() // a lock of flock(2) goes with its file
}

// Flush implements FUSE_FLUSH: a program has closed a descriptor, and with it all record locks that it holds on the file.
func (fs *FS) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		fs.unlockOwner(f.node, in.LockOwner)
		if !f.writable {
			return nil
		}
		// Some file systems report an error of writing no earlier than at close(2).
		dup, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil //nolint:nilerr // the data is with the host's kernel, whoever closes what
		}
		return unix.Close(dup)
	})
}

func (fs *FS) withFile(fh, nodeID uint64, do func(f *openFile) error) fuse.Status {
	f, err := fs.file(fh, nodeID)
	if err != nil {
		return status(err)
	}
	defer f.put()
	return status(do(f))
}

// Read implements FUSE_READ. The data is read when the reply is written, straight into the guest's memory.
func (fs *FS) Read(_ <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	f, err := fs.file(in.Fh, in.NodeId)
	if err != nil {
		return nil, status(err)
	}
	return &readResult{file: f, offset: int64(in.Offset), size: int(in.Size)}, fuse.OK //nolint:gosec // the kernel checks
}

// readResult implements fuse.ReadResult, and go-fuse's way to read into several buffers.
type readResult struct {
	file   *openFile
	offset int64
	size   int
	done   sync.Once
}

// Size is how many bytes Readv reads at most.
func (r *readResult) Size() int { return r.size }

// Bytes reads into one buffer.
func (r *readResult) Bytes(buf []byte) ([]byte, fuse.Status) {
	n, code := r.Readv([][]byte{buf[:min(len(buf), r.size)]})
	return buf[:n], code
}

// Readv reads into several buffers.
func (r *readResult) Readv(dst [][]byte) (n int, code fuse.Status) {
	err := retry(func() (err error) {
		n, err = unix.Preadv(r.file.fd, dst, r.offset)
		return err
	})
	return max(n, 0), status(err)
}

// Done ends the use of the file.
func (r *readResult) Done() { r.done.Do(r.file.put) }

// Writev implements FUSE_WRITE.
func (fs *FS) Writev(_ <-chan struct{}, in *fuse.WriteIn, data [][]byte) (written uint32, code fuse.Status) {
	code = fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		fd := f.fd
		if f.append && in.WriteFlags&fuse.WRITE_CACHE != 0 {
			// A page that was changed through a mapping: its place is fixed, but a descriptor with O_APPEND writes to the end.
			plain, err := fs.openNode(f.fd, unix.O_WRONLY)
			if err != nil {
				return err
			}
			defer unix.Close(plain)
			fd = plain
		}
		err := retry(func() error {
			n, err := unix.Pwritev(fd, data, int64(in.Offset)) //nolint:gosec // the kernel checks
			written = uint32(max(n, 0))                        //nolint:gosec // no more than the request has
			return err
		})
		if err != nil || in.WriteFlags&fuse.WRITE_KILL_SUIDGID == 0 {
			return err
		}
		return killPrivileges(fd)
	})
	return written, code
}

// Fsync implements FUSE_FSYNC.
func (fs *FS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		const dataOnly = 1 // FUSE_FSYNC_FDATASYNC
		if in.FsyncFlags&dataOnly != 0 {
			return retry(func() error { return unix.Fdatasync(f.fd) })
		}
		return retry(func() error { return unix.Fsync(f.fd) })
	})
}

// Fallocate implements FUSE_FALLOCATE. The request does not say whether the caller has CAP_FSETID, so it counts as one that
// has not.
func (fs *FS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		err := retry(func() error {
			return unix.Fallocate(f.fd, in.Mode, int64(in.Offset), int64(in.Length)) //nolint:gosec // the kernel checks
		})
		if err != nil {
			return err
		}
		return killPrivileges(f.fd)
	})
}

// Lseek implements FUSE_LSEEK, for holes and data.
func (fs *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return fuse.EINVAL
	}
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		at, err := unix.Seek(f.fd, int64(in.Offset), int(in.Whence)) //nolint:gosec // the kernel checks
		out.Offset = uint64(max(at, 0))                              //nolint:gosec // not negative
		return err
	})
}

// CopyFileRange implements FUSE_COPY_FILE_RANGE.
func (fs *FS) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (copied uint32, code fuse.Status) {
	code = fs.withFile(in.FhIn, in.NodeId, func(from *openFile) error {
		return asError(fs.withFile(in.FhOut, in.NodeIdOut, func(to *openFile) error {
			offIn, offOut := int64(in.OffIn), int64(in.OffOut)                                                    //nolint:gosec // the kernel checks
			n, err := unix.CopyFileRange(from.fd, &offIn, to.fd, &offOut, int(min(in.Len, 1<<30)), int(in.Flags)) //nolint:gosec // bounded
			copied = uint32(max(n, 0))                                                                            //nolint:gosec // bounded
			return err
		}))
	})
	return copied, code
}

func asError(code fuse.Status) error {
	if code == fuse.OK {
		return nil
	}
	return unix.Errno(code)
}

// The ioctls of files that the guest's kernel passes on (ioctl_iflags(2), linux/fs.h).
const (
	getFlags   = 0x80086601 // FS_IOC_GETFLAGS
	setFlags   = 0x40086602 // FS_IOC_SETFLAGS
	getXFlags  = 0x801c581f // FS_IOC_FSGETXATTR
	setXFlags  = 0x401c5820 // FS_IOC_FSSETXATTR
	flagsSize  = 4
	xflagsSize = 28
)

// Ioctl implements FUSE_IOCTL for the attributes of files that lsattr and chattr know. The guest's kernel has checked whether the
// caller may change them; the host's kernel refuses those that take CAP_LINUX_IMMUTABLE.
func (fs *FS) Ioctl(_ <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, out *fuse.IoctlOut, outbuf []byte) fuse.Status {
	*out = fuse.IoctlOut{}
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		var arg [xflagsSize]byte
		switch in.Cmd {
		case getFlags, getXFlags:
			if err := ioctl(f.fd, in.Cmd, &arg); err != nil {
				return err
			}
			size := flagsSize
			if in.Cmd == getXFlags {
				size = xflagsSize
			}
			if copy(outbuf, arg[:size]) < size {
				return unix.EINVAL
			}
			return nil
		case setFlags, setXFlags:
			size := flagsSize
			if in.Cmd == setXFlags {
				size = xflagsSize
			}
			if copy(arg[:size], inbuf) < size {
				return unix.EINVAL
			}
			return ioctl(f.fd, in.Cmd, &arg)
		}
		return unix.ENOTTY
	})
}
