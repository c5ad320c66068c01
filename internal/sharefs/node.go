package sharefs

import (
	"bytes"
	"container/list"
	"time"

	"golang.org/x/sys/unix"
)

// A node is an inode that the guest knows of. Its fields below mu's line are under FS.mu.
type node struct {
	id     uint64
	key    key
	kind   uint32 // S_IFMT of its mode
	born   unix.StatxTimestamp
	handle *unix.FileHandle // nil: the file system has none, or does not open by it
	mount  *mount
	volume *volume
	// crosses says that it is the root of its mount: a lookup of it leads from one mount into another.
	crosses bool

	// mu's line.
	lookups uint64 // references that the guest holds
	parent  *node  // where it was seen last; nil for the share's root
	name    string // there; "" when it has been removed there
	kept    *descriptor
	place   *list.Element // in FS.recent, while kept is not nil and may be let go of
	opened  map[*openFile]struct{}
	version version
	locks   map[uint64]*lockFile // by lock owner
}

// A key tells inodes apart as long as they live. The mount is part of it because the same file can be read-only,
// or have other owners, by way of another mount.
type key struct{ mount, dev, ino uint64 }

// A mount is what a node lies in.
type mount struct {
	id     uint64
	volume *volume
	// own says that it is the mount of the share itself, in which only the directories for volumes lie.
	own bool
	// A top mount is a volume's own: a descriptor of it stays open. Others are the host's, which must be able to unmount
	// them at any time, so nothing in them is kept open.
	top bool

	// Under FS.mu.
	parent *node // the directory in which it is mounted, nil for the share's own mount
	name   string
	fd     int // of a top mount's root; else -1
}

// stat asks for all that is passed on of a file.
func stat(fd int) (st unix.Statx_t, err error) {
	const mask = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID
	err = retry(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, mask, &st) })
	return st, err
}

func keyOf(st *unix.Statx_t) key {
	return key{mount: st.Mnt_id, dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}
}

// handleOf returns the file handle of a descriptor's inode, nil if it has none.
func handleOf(fd int) *unix.FileHandle {
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil
	}
	return &h
}

func sameHandle(a, b *unix.FileHandle) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Type() == b.Type() && bytes.Equal(a.Bytes(), b.Bytes())
}

// is tells whether the node is the inode with this handle and these attributes. Its key is the same, but an
// inode number can have been given to another file since.
func (n *node) is(handle *unix.FileHandle, st *unix.Statx_t) bool {
	if n.kept != nil || len(n.opened) > 0 {
		return true // an inode that is open keeps its number
	}
	if n.handle != nil || handle != nil {
		return sameHandle(n.handle, handle)
	}
	return n.kind == uint32(st.Mode)&unix.S_IFMT && n.born == st.Btime
}

// adopt returns the node of a file that was just looked up, with one more reference for the guest. It uses fd up, an O_PATH
// descriptor of the file.
func (fs *FS) adopt(parent *node, name string, fd int) (*node, unix.Statx_t, error) {
	st, err := stat(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, st, err
	}
	k := keyOf(&st)
	fs.mu.Lock()
	n := fs.keys[k]
	pinned := n != nil && (n.kept != nil || len(n.opened) > 0)
	newTop := fs.mounts[k.mount] == nil && parent.mount.own
	fs.mu.Unlock()
	var handle *unix.FileHandle
	if !pinned {
		handle = handleOf(fd)
	}
	root := -1
	if newTop {
		root = fs.openMount(fd, &st) // outside of the lock: a dead network file system must stop nothing else
	}

	fs.mu.Lock()
	closing := []*descriptor{{fd: root}}
	defer func() {
		fs.mu.Unlock()
		closeAll(closing)
	}()
	if parent.volume != nil && parent.volume.gone {
		closing = append(closing, &descriptor{fd: fd})
		return nil, st, unix.ESTALE
	}
	n = fs.keys[k]
	if n != nil && !n.is(handle, &st) {
		if pinned { // it was let go of meanwhile
			handle = handleOf(fd)
		}
		if !n.is(handle, &st) {
			delete(fs.keys, k) // the guest keeps its node, whose file is gone
			n = nil
		}
	}
	if n == nil {
		if pinned && handle == nil {
			handle = handleOf(fd)
		}
		if len(fs.nodes) >= fs.limits.Nodes {
			closing = append(closing, &descriptor{fd: fd})
			return nil, st, unix.ENFILE
		}
		n = fs.newNode(parent, name, k, &st, handle)
	}
	if m := n.mount; m.top && m.fd < 0 {
		m.fd, closing = root, nil
	}
	n.lookups++
	n.parent, n.name = parent, name
	if n.crosses {
		n.mount.parent, n.mount.name = parent, name
	}
	closing = fs.keep(n, &descriptor{fd: fd}, closing)
	return n, st, nil
}

// newNode makes a node that the guest does not refer to yet. fs.mu is held.
func (fs *FS) newNode(parent *node, name string, k key, st *unix.Statx_t, handle *unix.FileHandle) *node {
	fs.lastID++
	n := &node{
		id: fs.lastID, key: k, kind: uint32(st.Mode) & unix.S_IFMT, born: st.Btime, handle: handle,
		crosses: parent != nil && parent.key.mount != k.mount,
	}
	switch {
	case parent == nil: // the share's root
	case parent.volume != nil:
		n.volume = parent.volume
	default:
		v := fs.volumes[name]
		if v == nil || v.gone {
			v = newVolume(name)
			fs.volumes[name] = v
		}
		n.volume = v
	}
	m := fs.mounts[k.mount]
	if m == nil || n.crosses && (m.volume != n.volume || m.parent != parent || m.name != name) {
		// A mount that was not known, or another one that got the number of one that is gone.
		m = &mount{
			id: k.mount, volume: n.volume, own: parent == nil, top: parent == nil || parent.mount.own,
			parent: parent, name: name, fd: -1,
		}
		fs.mounts[k.mount] = m
	}
	n.mount = m
	fs.nodes[n.id], fs.keys[k] = n, n
	return n
}

// find returns the node with a number that the guest gave.
func (fs *FS) find(id uint64) (*node, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := fs.nodes[id]
	if n == nil || n.volume != nil && n.volume.gone {
		return nil, unix.ESTALE
	}
	return n, nil
}

// Forget takes back references that the guest held to a node.
func (fs *FS) Forget(id, lookups uint64) {
	fs.mu.Lock()
	n := fs.nodes[id]
	if n == nil || n == fs.root {
		fs.mu.Unlock()
		return
	}
	n.lookups -= min(lookups, n.lookups)
	var closing []*descriptor
	if n.lookups == 0 {
		closing = fs.drop(n)
	}
	fs.mu.Unlock()
	closeAll(closing)
}

// drop removes a node that the guest does not know of any more. fs.mu is held.
func (fs *FS) drop(n *node) (closing []*descriptor) {
	delete(fs.nodes, n.id)
	if fs.keys[n.key] == n {
		delete(fs.keys, n.key)
	}
	return fs.dropLocks(n, fs.letGo(n, nil))
}

// dropLocks releases all record locks on a node. fs.mu is held.
func (fs *FS) dropLocks(n *node, closing []*descriptor) []*descriptor {
	for owner, l := range n.locks {
		delete(n.locks, owner)
		fs.locked--
		closing = l.unref(closing)
	}
	return closing
}

// ForgetVolume closes all that is open in a directory at the top of the share, and refuses what the guest asks
// of it from then on. What is mounted there can be unmounted when it returns, unless requests are being served.
func (fs *FS) ForgetVolume(name string) {
	fs.mu.Lock()
	v := fs.volumes[name]
	if v == nil {
		fs.mu.Unlock()
		return
	}
	v.gone = true
	delete(fs.volumes, name)
	var closing []*descriptor
	var files []*openFile
	for _, n := range fs.nodes {
		if n.volume != v {
			continue
		}
		closing = fs.letGo(n, closing)
		for f := range n.opened {
			files = append(files, f)
		}
		closing = fs.dropLocks(n, closing)
		if fs.keys[n.key] == n {
			delete(fs.keys, n.key)
		}
	}
	for id, m := range fs.mounts {
		if m.volume == v {
			if m.fd >= 0 {
				closing = append(closing, &descriptor{fd: m.fd})
				m.fd = -1
			}
			delete(fs.mounts, id)
		}
	}
	fs.mu.Unlock()
	closeAll(closing)
	for _, f := range files {
		fs.forgetFile(f)
	}
	fs.locksChanged()
}

// at returns the node that a name leads to, if the guest knows it, with a descriptor of it.
func (fs *FS) at(dir int, name string) (*node, *descriptor) {
	fd, err := openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil
	}
	d := &descriptor{fd: fd}
	st, err := stat(fd)
	if err != nil {
		closeAll([]*descriptor{d})
		return nil, nil
	}
	fs.mu.Lock()
	n := fs.keys[keyOf(&st)]
	fs.mu.Unlock()
	if n == nil {
		closeAll([]*descriptor{d})
		return nil, nil
	}
	return n, d
}

// since is the time that has passed since a time stamp of a file.
func since(t unix.StatxTimestamp, now time.Time) time.Duration {
	return now.Sub(time.Unix(t.Sec, int64(t.Nsec)))
}
