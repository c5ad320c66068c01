package sharefs

import (
	"time"

	"golang.org/x/sys/unix"
)

// unsettled is how long after a file's last change another change may leave the same time stamps: the kernel's clock
// for them ticks every 1 to 10 ms (CONFIG_HZ), and a bit more for the time between two looks at a clock.
const unsettled = 50 * time.Millisecond

// version is what the guest was told of a file's content, in the only words that FUSE has for it: the guest's
// kernel drops the pages that it has cached of a file when the file's size or modification time is not what it was told before
// (FUSE_AUTO_INVAL_DATA). In a coherent volume it asks before each read(2).
//
// Two changes within a tick of the kernel's clock leave the same time, though, and a program can set the time back. So
// the answer to the question that precedes a read (FUSE_GETATTR_FH) has a time that differs from all told before
// as long as a change could hide, and once more afterwards. The guest's kernel uses that answer for its cache only; stat(2) asks
// without FUSE_GETATTR_FH, and is told the true time.
type version struct {
	changed unix.StatxTimestamp // status change time when it was told last
	told    unix.StatxTimestamp // modification time, as it was told last
	doubt   bool                // since then the content may have changed without another time
	salt    uint32              // makes up times
}

// reported records that the guest is told a file's attributes as they are.
func (fs *FS) reported(n *node, st *unix.Statx_t) {
	if n.volume == nil || !n.volume.coherent || n.kind != unix.S_IFREG {
		return
	}
	now := time.Now()
	fs.mu.Lock()
	defer fs.mu.Unlock()
	v := &n.version
	if since(st.Ctime, now) < unsettled || v.changed != st.Ctime && v.told == st.Mtime {
		v.doubt = true
	}
	v.changed, v.told = st.Ctime, st.Mtime
}

// cacheVersion returns the modification time to tell the guest before it reads, in nanoseconds within its second.
func (fs *FS) cacheVersion(n *node, st *unix.Statx_t) uint32 {
	if n.volume == nil || !n.volume.coherent || n.kind != unix.S_IFREG {
		return st.Mtime.Nsec
	}
	now := time.Now()
	fs.mu.Lock()
	defer fs.mu.Unlock()
	v := &n.version
	young := since(st.Ctime, now) < unsettled
	told := st.Mtime
	if young || v.doubt || v.changed != st.Ctime && v.told == st.Mtime {
		v.salt = v.salt%100_000 + 1
		told.Nsec = (st.Mtime.Nsec + v.salt) % 1_000_000_000
	}
	v.doubt = young
	v.changed, v.told = st.Ctime, told
	return told.Nsec
}

// settled tells whether the guest may go on with what it has cached of a file or directory that it opens: its
// modification time tells every change from now on.
func (fs *FS) settled(n *node, fd int) bool {
	st, err := stat(fd)
	if err != nil || since(st.Ctime, time.Now()) < unsettled {
		return false
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return !n.version.doubt
}
