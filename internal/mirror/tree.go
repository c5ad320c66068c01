package mirror

import (
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// node is what the guest has of one file of a tree.
type node struct {
	mirror   *Mirror
	parent   *node // nil: it is the root
	name     string
	children map[string]*node // of a directory
	wd       int32            // the watch; -1: none. Directories have one, and a root

	st     fileState // of the original, when it was looked at last
	xattrs uint64    // sum of the extended attributes
	target string    // of a symlink
	size   int64     // of a regular file in the guest
	blocks []uint64  // sums of its blocks
	read   time.Time // when it was read last
	staged string    // path in the guest's staging place, while it is there
}

// fileState is what stat tells.
type fileState struct {
	mode, uid, gid        uint32
	dev, ino, rdev, nlink uint64
	size                  int64
	mtime, ctime          unix.Timespec
}

func (s fileState) id() FileID { return FileID{s.dev, s.ino} }

func (n *node) kind() uint32 { return n.st.mode & unix.S_IFMT }
func (n *node) isDir() bool  { return n.kind() == unix.S_IFDIR }

// path is relative to the tree's root, which is the empty one.
func (n *node) path() string {
	if n.parent == nil {
		return ""
	}
	return path.Join(n.parent.path(), n.name)
}

// each calls f for a node, which may be nil, and all below it.
func (n *node) each(f func(*node)) {
	if n == nil {
		return
	}
	f(n)
	for _, c := range n.children {
		c.each(f)
	}
}

// open opens what is at a path of the tree, O_PATH, through no link and no mount.
func (m *Mirror) open(p string) (fd int, st fileState, err error) {
	if p == "" {
		fd, err = unix.FcntlInt(uintptr(m.fd), unix.F_DUPFD_CLOEXEC, 0)
	} else {
		fd, err = unix.Openat2(m.fd, p, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return -1, st, errGone // or something else is on the way now
	case errors.Is(err, unix.EXDEV):
		return -1, st, unfit("%s: something is mounted there", p)
	case err != nil:
		return -1, st, fmt.Errorf("open %s: %w", p, err)
	}
	if st, err = stat(fd); err != nil {
		_ = unix.Close(fd)
		return -1, st, fmt.Errorf("stat %s: %w", p, err)
	}
	return fd, st, nil
}

func stat(fd int) (fileState, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileState{}, err
	}
	return fileState{
		mode: st.Mode, uid: st.Uid, gid: st.Gid, dev: st.Dev, ino: st.Ino, rdev: st.Rdev, nlink: st.Nlink,
		size: st.Size, mtime: st.Mtim, ctime: st.Ctim,
	}, nil
}

func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// localFS are the file systems on which all changes are made by this host's kernel, which tells of them.
var localFS = map[int64]bool{
	unix.EXT4_SUPER_MAGIC: true, unix.XFS_SUPER_MAGIC: true, unix.BTRFS_SUPER_MAGIC: true, unix.TMPFS_MAGIC: true,
	unix.RAMFS_MAGIC: true, unix.OVERLAYFS_SUPER_MAGIC: true, unix.F2FS_SUPER_MAGIC: true, unix.SQUASHFS_MAGIC: true,
	unix.EROFS_SUPER_MAGIC_V1: true, unix.ISOFS_SUPER_MAGIC: true, unix.MSDOS_SUPER_MAGIC: true,
	0x2fc12fc1: true, // ZFS
	0xca451a4e: true, // bcachefs
}

// inspect looks whether the tree can be mirrored, and makes a model of it.
func (m *Mirror) inspect() error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(m.fd, &fs); err != nil {
		return fmt.Errorf("stat file system: %w", err)
	}
	if !localFS[fs.Type] {
		return unfit("file system of type %#x: not all its changes are made here", fs.Type)
	}
	root := &node{mirror: m, wd: -1}
	if err := m.survey(root, "", 0); err != nil {
		return err
	}
	m.root = root
	if total := m.set.used() + m.bytes; total > m.set.limits.TotalBytes {
		m.bytes = 0
		return unfit("with the other mirrors of the pod it has %d bytes, which are more than %d", total, m.set.limits.TotalBytes)
	}
	return nil
}

// survey fills in a node and all below it, without reading files.
func (m *Mirror) survey(n *node, p string, depth int) error {
	fd, st, err := m.open(p)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	n.st = st
	l := m.set.limits
	if m.entries++; m.entries > l.Entries {
		return unfit("it has more than %d files", l.Entries)
	}
	switch n.kind() {
	case unix.S_IFREG, unix.S_IFLNK:
		if m.bytes += st.size; m.bytes > l.Bytes {
			return unfit("it has more than %d bytes", l.Bytes)
		}
		return nil
	case unix.S_IFDIR:
	default:
		return unfit("%q is neither a directory nor a file nor a symlink", p)
	}
	if depth > l.Depth {
		return unfit("it is deeper than %d", l.Depth)
	}
	names, err := list(fd, l.Entries-m.entries)
	if err != nil {
		return err
	}
	n.children = make(map[string]*node, len(names))
	for _, name := range names {
		c := &node{mirror: m, parent: n, name: name, wd: -1}
		err := m.survey(c, path.Join(p, name), depth+1)
		if errors.Is(err, errGone) {
			m.entries--
			continue
		}
		if err != nil {
			return err
		}
		n.children[name] = c
	}
	return nil
}

// list reads the names in a directory, sorted. More than limit are an error.
func list(fd, limit int) ([]string, error) {
	dir, err := unix.Open(procPath(fd), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // it was removed just now, so it is empty
	}
	if err != nil {
		return nil, fmt.Errorf("open directory: %w", err)
	}
	f := os.NewFile(uintptr(dir), "directory")
	defer f.Close()
	names, err := f.Readdirnames(max(limit, 0) + 1)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("read directory: %w", err)
	}
	if len(names) > limit {
		return nil, unfit("it has too many files")
	}
	slices.Sort(names)
	return names, nil
}

// maxXattrs bounds the extended attributes of a file, in bytes.
const maxXattrs = 4 << 10

// carried tells whether an extended attribute means the same in the guest. Others are of the host's
// kernel and its policies.
func carried(name string) bool {
	return strings.HasPrefix(name, "user.") || name == "security.capability" ||
		name == "system.posix_acl_access" || name == "system.posix_acl_default"
}

// attributes are those of what fd is, and the sum of the extended ones.
func attributes(fd int, st fileState) (*agentv1.MirrorAttributes, uint64, error) {
	a := &agentv1.MirrorAttributes{
		Mode: st.mode, Uid: st.uid, Gid: st.gid, MtimeSec: st.mtime.Sec, MtimeNsec: uint32(st.mtime.Nsec),
	}
	if st.mode&unix.S_IFMT == unix.S_IFLNK {
		return a, 0, nil
	}
	file := procPath(fd)
	buf := make([]byte, maxXattrs)
	n, err := unix.Listxattr(file, buf)
	switch {
	case errors.Is(err, unix.ERANGE):
		return nil, 0, unfit("a file has more than %d bytes of extended attributes", maxXattrs)
	case errors.Is(err, unix.EOPNOTSUPP) || err == nil && n == 0:
		return a, 0, nil
	case err != nil:
		return nil, 0, fmt.Errorf("list extended attributes: %w", err)
	}
	a.Xattrs = make(map[string][]byte)
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	left := maxXattrs
	var sum maphash.Hash
	sum.SetSeed(seed)
	for _, name := range names {
		if !carried(name) {
			continue
		}
		n, err := unix.Getxattr(file, name, buf)
		if errors.Is(err, unix.ENODATA) {
			continue // taken away just now
		}
		if err != nil && !errors.Is(err, unix.ERANGE) {
			return nil, 0, fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		if left -= len(name) + n; err != nil || left < 0 {
			return nil, 0, unfit("a file has more than %d bytes of extended attributes", maxXattrs)
		}
		a.Xattrs[name] = slices.Clone(buf[:n])
		_, _ = fmt.Fprintf(&sum, "%q=%q", name, buf[:n])
	}
	if len(a.Xattrs) == 0 {
		return a, 0, nil
	}
	return a, sum.Sum64(), nil
}

// seed is of all sums: they are compared with each other and mean nothing to others.
var seed = maphash.MakeSeed()

// blockSize is how much of a file is compared, and sent, at a time.
const blockSize = 64 << 10

// content reads a regular file and has written to dst in the guest what is different there. It tells whether
// anything was; with always something is written even if not, for watches to see.
func (m *Mirror) content(n *node, fd int, dst string, staged, always bool) (changed bool, err error) {
	left := m.set.limits.GrownBytes - m.bytes + n.size
	left = min(left, m.set.limits.GrownTotalBytes-m.set.used()+n.size)
	outgrown := unfit("it has grown to more than %d bytes, or all mirrors of the pod to more than %d",
		m.set.limits.GrownBytes, m.set.limits.GrownTotalBytes)
	if n.st.size > left { // not after most of it was sent
		return false, outgrown
	}
	file, err := unix.Open(procPath(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", n.path(), err)
	}
	f := os.NewFile(uintptr(file), n.name)
	defer f.Close()
	n.read = time.Now()
	var total int64
	var blocks []uint64
	var last *agentv1.MirrorWrite // not sent yet, for the size is not known
	write := func(size int64, extents ...*agentv1.MirrorExtent) {
		if last != nil {
			m.out.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Write{Write: last}})
		}
		last = &agentv1.MirrorWrite{
			Path: dst, Staged: staged, Extents: extents, Size: uint64(size),
			MtimeSec: n.st.mtime.Sec, MtimeNsec: uint32(n.st.mtime.Nsec),
		}
	}
	buf := m.set.buffer
	for {
		size, err := io.ReadFull(f, buf)
		if total += int64(size); total > left {
			return false, outgrown
		}
		if size > 0 {
			i := len(blocks)
			sum := maphash.Bytes(seed, buf[:size])
			if i >= len(n.blocks) || n.blocks[i] != sum {
				write(max(n.size, total), &agentv1.MirrorExtent{Offset: uint64(total) - uint64(size), Data: slices.Clone(buf[:size])})
			}
			blocks = append(blocks, sum)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return false, fmt.Errorf("read %s: %w", n.path(), err)
		}
	}
	if last == nil && (always || total != n.size) {
		write(total)
	}
	changed = last != nil
	if changed {
		last.Size = uint64(total)
		m.out.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Write{Write: last}})
	}
	m.bytes += total - n.size
	n.size, n.blocks = total, blocks
	return changed, nil
}
