package sharefs

import (
	"errors"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// A descriptor is an O_PATH descriptor of a node's inode, shared by the requests that use it.
type descriptor struct {
	fd   int
	refs int // under FS.mu; what is in closing lists has none
}

// unref takes a reference back, and adds the descriptor to what is to be closed if it was the last one. FS.mu is held.
func (d *descriptor) unref(closing []*descriptor) []*descriptor {
	if d.refs--; d.refs == 0 {
		closing = append(closing, d)
	}
	return closing
}

// closeAll closes descriptors; -1 is none.
func closeAll(list []*descriptor) {
	for _, d := range list {
		if d.fd >= 0 {
			_ = unix.Close(d.fd)
		}
	}
}

// acquire returns a descriptor of a node's inode, to be given back by release. unix.ESTALE when the file is gone.
func (fs *FS) acquire(n *node) (*descriptor, error) {
	fs.mu.Lock()
	if d := n.kept; d != nil {
		d.refs++
		if n.place != nil {
			fs.recent.MoveToFront(n.place)
		}
		fs.mu.Unlock()
		return d, nil
	}
	fs.mu.Unlock()
	fd, err := fs.reopen(n)
	if err != nil {
		return nil, err
	}
	d := &descriptor{fd: fd, refs: 1}
	fs.mu.Lock()
	var closing []*descriptor
	if n.mount.top && n.kept == nil {
		closing = fs.keep(n, d, nil)
	}
	fs.mu.Unlock()
	closeAll(closing)
	return d, nil
}

func (fs *FS) release(d *descriptor) {
	if d == nil {
		return
	}
	fs.mu.Lock()
	d.refs--
	last := d.refs == 0
	fs.mu.Unlock()
	if last {
		_ = unix.Close(d.fd)
	}
}

// keep makes a descriptor the one that its node keeps, or adds it to what is to be closed when the node keeps one already or
// must not keep any. It takes a reference of its own. fs.mu is held.
func (fs *FS) keep(n *node, d *descriptor, closing []*descriptor) []*descriptor {
	if !n.mount.top || n.kept != nil || fs.nodes[n.id] != n || n.volume != nil && n.volume.gone {
		if d.refs == 0 {
			closing = append(closing, d)
		}
		return closing
	}
	d.refs++
	n.kept = d
	n.place = fs.recent.PushFront(n)
	return fs.evict(fs.limits.Kept, closing)
}

// evict lets go of the descriptors that were used least recently until no more than limit are left. fs.mu is held.
func (fs *FS) evict(limit int, closing []*descriptor) []*descriptor {
	for fs.recent.Len() > limit {
		n := fs.recent.Back().Value.(*node) //nolint:forcetypeassert // the list holds nothing else
		if n.handle == nil && n.name == "" {
			// Nothing else leads to this file: it has been removed, and its file system has no handles.
			fs.recent.Remove(n.place)
			n.place = nil
			continue
		}
		closing = fs.letGo(n, closing)
	}
	return closing
}

// letGo makes a node keep no descriptor. fs.mu is held.
func (fs *FS) letGo(n *node, closing []*descriptor) []*descriptor {
	if n.kept == nil {
		return closing
	}
	if n.place != nil {
		fs.recent.Remove(n.place)
		n.place = nil
	}
	d := n.kept
	n.kept = nil
	return d.unref(closing)
}

// makeRoom is called when the process has no descriptor left: it lets go of half of those that are kept.
func (fs *FS) makeRoom() {
	fs.mu.Lock()
	closing := fs.evict(fs.recent.Len()/2, nil)
	fs.mu.Unlock()
	closeAll(closing)
}

// withRoom calls f, which opens something, and calls it once more after making room when there was none.
func (fs *FS) withRoom(f func() (int, error)) (int, error) {
	fd, err := f()
	if errors.Is(err, unix.EMFILE) {
		fs.makeRoom()
		fd, err = f()
	}
	if errors.Is(err, unix.EMFILE) {
		err = unix.ENFILE // the guest's process has not reached its own limit
	}
	return fd, err
}

// reopen finds a node's inode again and returns an O_PATH descriptor of it.
func (fs *FS) reopen(n *node) (int, error) {
	fd, err := fs.withRoom(func() (int, error) {
		if n.handle != nil {
			fd, err := fs.reopenByHandle(n)
			if err == nil || errors.Is(err, unix.ESTALE) {
				return fd, err
			}
		}
		return fs.reopenByPlace(n)
	})
	if err == nil || errors.Is(err, unix.ENFILE) {
		return fd, err
	}
	// A file that is open leads to its inode, wherever that is now.
	f := fs.anyFile(n)
	if f == nil {
		return -1, unix.ESTALE
	}
	defer f.put()
	return unix.Open(fs.path(f.fd), unix.O_PATH|unix.O_CLOEXEC, 0)
}

func (fs *FS) reopenByHandle(n *node) (int, error) {
	m, done, err := fs.mountDescriptor(n.mount)
	if err != nil {
		return -1, err
	}
	defer done()
	return unix.OpenByHandleAt(m, *n.handle, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
}

// mountDescriptor returns a descriptor of a mount's root.
func (fs *FS) mountDescriptor(m *mount) (fd int, done func(), err error) {
	fs.mu.Lock()
	parent, name, fd := m.parent, m.name, m.fd
	fs.mu.Unlock()
	if fd >= 0 {
		return fd, func() {}, nil
	}
	if parent == nil {
		return -1, nil, unix.ESTALE
	}
	dir, err := fs.acquire(parent)
	if err != nil {
		return -1, nil, err
	}
	defer fs.release(dir)
	path, err := openat(dir.fd, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, nil, err
	}
	defer unix.Close(path)
	st, err := stat(path)
	if err != nil || st.Mnt_id != m.id {
		return -1, nil, unix.ESTALE // it has been unmounted
	}
	if fd = fs.openMount(path, &st); fd < 0 {
		return -1, nil, unix.EOPNOTSUPP
	}
	return fd, func() { _ = unix.Close(fd) }, nil
}

// openMount opens the root of a mount so that handles can be opened by it; O_PATH is not enough for that
// (open_by_handle_at(2)). -1: what is mounted there cannot be opened, and its files are found by their place.
func (fs *FS) openMount(root int, st *unix.Statx_t) int {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG:
		if fd, err := unix.Open(fs.path(root), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOATIME, 0); err == nil {
			return fd
		}
	}
	return -1
}

func (fs *FS) reopenByPlace(n *node) (int, error) {
	fs.mu.Lock()
	parent, name := n.parent, n.name
	fs.mu.Unlock()
	if parent == nil || name == "" {
		return -1, unix.ESTALE
	}
	dir, err := fs.acquire(parent)
	if err != nil {
		return -1, err
	}
	defer fs.release(dir)
	fd, err := openat(dir.fd, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, err
	}
	st, err := stat(fd)
	if err == nil && (keyOf(&st) != n.key || n.born != st.Btime) {
		err = unix.ESTALE // another file has the name now
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// anyFile returns an open file of a node, with a reference, or nil.
func (fs *FS) anyFile(n *node) *openFile {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f := range n.opened {
		if f.get() {
			return f
		}
	}
	return nil
}

// path leads to the inode of a descriptor, whatever kind of descriptor and of inode that is, in calls that take a path.
func (fs *FS) path(fd int) string { return fs.proc + strconv.Itoa(fd) }

// openat opens a name in a directory, never more than a name.
func openat(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// retry repeats a call that a signal has interrupted: Go's runtime sends itself signals.
func retry(call func() error) error {
	for {
		err := call()
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// validName tells whether a name that the guest gave is that of an entry of a directory.
func validName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return unix.EINVAL
	case len(name) > 255:
		return unix.ENAMETOOLONG
	case slices.Contains([]byte(name), '/') || slices.Contains([]byte(name), 0):
		return unix.EINVAL
	}
	return nil
}
