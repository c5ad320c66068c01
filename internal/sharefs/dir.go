package sharefs

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// directory is the state of an open directory: entries that were read from the host and not yet given to the guest.
type directory struct {
	mu   sync.Mutex
	buf  []byte // as getdents64(2) writes them
	at   uint64 // the position of the first of them
	read bool   // at and buf are valid
}

const direntsSize = 32 << 10

// OpenDir implements FUSE_OPENDIR.
func (fs *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return fs.withNode(in.NodeId, func(n *node, fd int) error {
		if n.kind != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		if err := fs.room(n.volume, in.Flags); err != nil {
			return err
		}
		opened, err := fs.withRoom(func() (int, error) { return openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0) })
		if err != nil {
			return err
		}
		settled := fs.settled(n, opened)
		out.Fh = fs.add(n, opened, unix.O_RDONLY).id
		if n.keepsAbsence() && settled {
			// The guest keeps the list of names as long as the directory's modification time stays the same.
			out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
		}
		return nil
	})
}

// ReleaseDir implements FUSE_RELEASEDIR.
func (fs *FS) ReleaseDir(in *fuse.ReleaseIn) {
	if f, err := fs.file(in.Fh, in.NodeId); err == nil {
		fs.forgetFile(f)
		f.put()
	}
}

// FsyncDir implements FUSE_FSYNCDIR.
func (fs *FS) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return fs.Fsync(cancel, in)
}

// ReadDir implements FUSE_READDIR.
func (fs *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return fs.readDir(in, func(f *openFile, e *fuse.DirEntry) bool { return out.AddDirEntry(*e) })
}

// ReadDirPlus implements FUSE_READDIRPLUS: READDIR and a LOOKUP of each name.
func (fs *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return fs.readDir(in, func(f *openFile, e *fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(*e)
		if entry == nil {
			return false
		}
		if e.Name == "." || e.Name == ".." {
			return true
		}
		if err := fs.lookup(f.node, f.fd, e.Name, entry); err != nil {
			*entry = fuse.EntryOut{} // without a node: the guest's kernel looks it up when it needs it
			return true
		}
		out.FixMode(entry.Mode)
		return true
	})
}

// readDir calls add for each entry from the position that the guest wants on, until add has no room left.
func (fs *FS) readDir(in *fuse.ReadIn, add func(f *openFile, e *fuse.DirEntry) bool) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		if f.node.kind != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		d := &f.dir
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.read || d.at != in.Offset {
			if _, err := unix.Seek(f.fd, int64(in.Offset), 0); err != nil { //nolint:gosec // the kernel checks
				return err
			}
			d.buf, d.at, d.read = nil, in.Offset, true
		}
		added := false
		for {
			if len(d.buf) == 0 {
				buf := make([]byte, direntsSize)
				n, err := unix.Getdents(f.fd, buf)
				if err != nil {
					d.read = false
					if added {
						return nil // the error comes with the next request
					}
					return err
				}
				if n == 0 {
					return nil
				}
				d.buf = buf[:n]
			}
			for len(d.buf) > 0 {
				var e fuse.DirEntry
				size := e.Parse(d.buf)
				e.Ino = fs.inode(f.node.key.dev, e.Ino)
				if !add(f, &e) {
					return nil
				}
				added = true
				d.buf, d.at = d.buf[size:], e.Off
			}
		}
	})
}
