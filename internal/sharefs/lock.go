package sharefs

import (
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Locks of the guest's programs are locks of the host, so that they exclude programs in other VMs and on the host.
//
// A lock of flock(2) belongs to an open file of the guest, and here to the descriptor that was opened for it. A record lock of
// fcntl(2) belongs to a process of the guest (FUSE calls it the lock's owner), which has no process here: each
// owner gets an open file description of its own with each file, whose lock (F_OFD_SETLK) is the owner's.
//
// A program that waits for a lock can be interrupted by a signal, but virtio-fs has no message for that
// (linux/fs/fuse/virtio_fs.c), and until the server has answered, not even SIGKILL ends the wait. So the server lists those
// that wait by the thread ids that the requests name (Waiting), and whoever knows which of these threads have a signal
// calls Interrupt.

// lockPoll bounds how long a waiting request takes to see that a lock of another VM or of the host has been released.
const (
	lockPollMin = time.Millisecond
	lockPollMax = 20 * time.Millisecond
)

// A lockFile is the open file description of a lock owner.
type lockFile struct {
	*descriptor
	writable bool
	by       *openFile // that the owner used last; under FS.mu
}

// A lockWait is a request that waits for a lock.
type lockWait struct {
	thread      int
	began       time.Time
	interrupted chan struct{} // closed by Interrupt
	once        bool
}

// Waiting lists the threads of the guest (by their numbers in the agent's pid namespace) that have been waiting for a lock for
// at least that long.
func (fs *FS) Waiting(atLeast time.Duration) []int {
	fs.lockMu.Lock()
	defer fs.lockMu.Unlock()
	threads := map[int]struct{}{}
	for _, w := range fs.waiting {
		if time.Since(w.began) >= atLeast {
			threads[w.thread] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(threads))
}

// LockWaits tells that there are requests that wait for locks, so that Waiting is worth a call.
func (fs *FS) LockWaits() <-chan struct{} { return fs.lockWaits }

// Interrupt ends the waits of threads with EINTR, at which the guest's kernel delivers their signals.
func (fs *FS) Interrupt(threads []int) {
	fs.lockMu.Lock()
	defer fs.lockMu.Unlock()
	for _, w := range fs.waiting {
		if slices.Contains(threads, w.thread) && !w.once {
			w.once = true
			close(w.interrupted)
		}
	}
}

// locksChanged wakes the requests that wait, for they may get their lock now.
func (fs *FS) locksChanged() {
	fs.lockMu.Lock()
	defer fs.lockMu.Unlock()
	if len(fs.waiting) > 0 {
		close(fs.lockChange)
		fs.lockChange = make(chan struct{})
	}
}

// GetLk implements FUSE_GETLK.
func (fs *FS) GetLk(_ <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		lk, err := recordLock(&in.Lk)
		if err != nil {
			return err
		}
		l, done, err := fs.lockFileOf(f, in.Owner, false)
		if err != nil {
			return err
		}
		defer done()
		if err := retry(func() error { return unix.FcntlFlock(uintptr(l.fd), unix.F_OFD_GETLK, lk) }); err != nil {
			return err
		}
		out.Lk = fuse.FileLock{Typ: uint32(lk.Type)} //nolint:gosec // a small constant
		if lk.Type != unix.F_UNLCK {
			out.Lk.Start, out.Lk.End = uint64(lk.Start), 1<<63-1 //nolint:gosec // not negative
			if lk.Len > 0 {
				out.Lk.End = uint64(lk.Start + lk.Len - 1) //nolint:gosec // not negative
			}
		}
		return nil // Pid stays 0: the holder is no process of the guest, or is not known by that number there
	})
}

// recordLock translates a lock, whose end is the last byte, or 2⁶³-1 for all to come.
func recordLock(lk *fuse.FileLock) (*unix.Flock_t, error) {
	const toEnd = 1<<63 - 1
	if lk.Start > lk.End || lk.End > toEnd || lk.Typ > unix.F_UNLCK {
		return nil, unix.EINVAL
	}
	l := &unix.Flock_t{Type: int16(lk.Typ), Start: int64(lk.Start)} //nolint:gosec // checked
	if lk.End != toEnd {
		l.Len = int64(lk.End - lk.Start + 1) //nolint:gosec // checked
	}
	return l, nil
}

// SetLk implements FUSE_SETLK: it takes or releases a lock, and does not wait.
func (fs *FS) SetLk(_ <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error { return fs.setLock(f, in) })
}

// SetLkw implements FUSE_SETLKW: it waits for the lock, so it must not run on a thread that other requests need.
func (fs *FS) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return fs.withFile(in.Fh, in.NodeId, func(f *openFile) error {
		err := fs.setLock(f, in)
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
		return fs.awaitLock(cancel, f, in)
	})
}

func (fs *FS) awaitLock(cancel <-chan struct{}, f *openFile, in *fuse.LkIn) error {
	w := &lockWait{thread: int(in.Pid), began: time.Now(), interrupted: make(chan struct{})}
	fs.lockMu.Lock()
	if len(fs.waiting) >= fs.limits.Waits {
		fs.lockMu.Unlock()
		return unix.ENOLCK
	}
	id := in.Unique
	for fs.waiting[id] != nil { // a number that a hostile guest uses twice
		id++
	}
	fs.waiting[id] = w
	fs.lockMu.Unlock()
	select {
	case fs.lockWaits <- struct{}{}:
	default: // it was told already
	}
	defer func() {
		fs.lockMu.Lock()
		delete(fs.waiting, id)
		fs.lockMu.Unlock()
	}()
	pause := lockPollMin
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		fs.lockMu.Lock()
		change := fs.lockChange
		fs.lockMu.Unlock()
		if err := fs.setLock(f, in); !errors.Is(err, unix.EAGAIN) {
			return err
		}
		timer.Reset(pause)
		select {
		case <-change:
		case <-timer.C:
			pause = min(2*pause, lockPollMax)
		case <-w.interrupted:
			return unix.EINTR
		case <-cancel:
			return unix.EINTR
		}
		if _, err := fs.find(f.node.id); err != nil {
			return err // the volume has been taken away
		}
	}
}

// setLock takes or releases a lock. unix.EAGAIN when another one is in the way.
func (fs *FS) setLock(f *openFile, in *fuse.LkIn) error {
	if in.LkFlags&fuse.LK_FLOCK != 0 {
		return fs.setFileLock(f, in.Lk.Typ)
	}
	lk, err := recordLock(&in.Lk)
	if err != nil {
		return err
	}
	if lk.Type == unix.F_UNLCK && !fs.hasLocks(f.node, in.Owner) {
		return nil
	}
	l, done, err := fs.lockFileOf(f, in.Owner, lk.Type != unix.F_UNLCK)
	if err != nil {
		return err
	}
	defer done()
	err = retry(func() error { return unix.FcntlFlock(uintptr(l.fd), unix.F_OFD_SETLK, lk) })
	if errors.Is(err, unix.EACCES) {
		err = unix.EAGAIN
	}
	if err == nil && lk.Type != unix.F_WRLCK {
		fs.locksChanged()
	}
	return err
}

func (fs *FS) hasLocks(n *node, owner uint64) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return n.locks[owner] != nil
}

func (fs *FS) setFileLock(f *openFile, kind uint32) error {
	var how int
	switch kind {
	case unix.F_RDLCK:
		how = unix.LOCK_SH
	case unix.F_WRLCK:
		how = unix.LOCK_EX
	case unix.F_UNLCK:
		how = unix.LOCK_UN
	default:
		return unix.EINVAL
	}
	err := retry(func() error { return unix.Flock(f.fd, how|unix.LOCK_NB) })
	if err == nil && kind != unix.F_WRLCK {
		fs.locksChanged()
	}
	return err
}

// lockFileOf returns the open file description that holds an owner's locks on a file. If there is none, it makes one, which
// the owner keeps if keep is set, and which is for a question only if not. done ends its use.
func (fs *FS) lockFileOf(f *openFile, owner uint64, keep bool) (_ *lockFile, done func(), err error) {
	fs.mu.Lock()
	l := f.node.locks[owner]
	if l != nil && (l.writable || !f.writable || !keep) {
		l.refs++
		if keep {
			l.by = f
		}
		fs.mu.Unlock()
		return l, func() { fs.release(l.descriptor) }, nil
	}
	fs.mu.Unlock()
	// A description that can be locked for writing, if the program's own can. When the owner has one for reading only, its
	// locks are given up with it: the kernel cannot move them.
	flags := uint32(unix.O_RDONLY)
	if f.writable {
		flags = unix.O_RDWR
	}
	if keep {
		if err := fs.room(f.node.volume, 0); err != nil {
			return nil, nil, unix.ENOLCK
		}
	}
	fd, err := fs.openNode(f.fd, flags)
	if err != nil {
		return nil, nil, err
	}
	made := &lockFile{descriptor: &descriptor{fd: fd, refs: 1}, writable: f.writable, by: f}
	if !keep {
		return made, func() { fs.release(made.descriptor) }, nil
	}
	made.refs++
	fs.mu.Lock()
	if f.node.locks == nil {
		f.node.locks = make(map[uint64]*lockFile)
	}
	before := f.node.locks[owner]
	f.node.locks[owner] = made
	var closing []*descriptor
	if before == nil {
		fs.locked++
	} else {
		closing = before.unref(nil)
	}
	fs.mu.Unlock()
	closeAll(closing)
	return made, func() { fs.release(made.descriptor) }, nil
}

// unlockFile releases the record locks that were taken by way of a file that is closed for good. Those of a process are gone by
// then (Flush). Those of an open file description (F_OFD_SETLK) are not: the guest's kernel does not release them.
func (fs *FS) unlockFile(f *openFile) {
	fs.mu.Lock()
	var closing []*descriptor
	for owner, l := range f.node.locks {
		if l.by == f {
			delete(f.node.locks, owner)
			fs.locked--
			closing = l.unref(closing)
		}
	}
	fs.mu.Unlock()
	closeAll(closing)
}

// unlockOwner releases all record locks that an owner holds on a file.
func (fs *FS) unlockOwner(n *node, owner uint64) {
	fs.mu.Lock()
	l := n.locks[owner]
	if l != nil {
		delete(n.locks, owner)
		fs.locked--
	}
	fs.mu.Unlock()
	if l != nil {
		fs.release(l.descriptor)
		fs.locksChanged()
	}
}
