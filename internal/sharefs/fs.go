package sharefs

import (
	"container/list"
	"errors"
	"fmt"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Limits bound what a guest can make the server hold.
type Limits struct {
	Nodes int // inodes that the guest knows of; more of them are refused with ENFILE
	Kept  int // descriptors that are kept for nodes, so that they need not be opened anew
	Files int // files and directories that the guest has open, and locks that it holds
	// Programs are those of Files that only the execution of a program may use, and half as many again that only the files of a
	// container's root file system may: a container that has opened all it may can still be entered.
	Programs int
	Waits    int // requests that wait for a lock
}

// LimitsFor divides a process's limit of open files (RLIMIT_NOFILE).
func LimitsFor(files uint64) Limits {
	const (
		maxNodes = 4 << 20 // at some 300 bytes each
		maxKept  = 8192
		reserve  = 128 // for the process itself, and for what requests open for a moment
	)
	n := int(min(max(files, 2*reserve), 1<<30))
	kept := min(n/2, maxKept)
	forGuest := n - kept - reserve
	return Limits{Nodes: maxNodes, Kept: kept, Files: forGuest, Programs: min(forGuest/16, 256), Waits: 256}
}

// Config describes a file system.
type Config struct {
	// Root is an O_PATH descriptor of the directory to serve. It stays the caller's, open until Close.
	Root int
	// Proc leads to this process's descriptors by their numbers, in calls that take a path: "/proc/self/fd/", or "" when that
	// is the working directory, as it is in a process that cannot see /proc.
	Proc   string
	Limits Limits
}

// FS serves a directory. It implements fuse.RawFileSystem; its methods may be called concurrently.
type FS struct {
	fuse.RawFileSystem // answers ENOSYS to what is not here
	proc               string
	limits             Limits

	mu       sync.Mutex
	nodes    map[uint64]*node
	keys     map[key]*node
	mounts   map[uint64]*mount
	volumes  map[string]*volume
	devices  map[uint64]uint64 // device number: in the order of appearance
	files    map[uint64]*openFile
	recent   list.List // nodes that keep a descriptor, the one used last first
	root     *node
	lastID   uint64
	lastFile uint64
	locked   int // locks that are held, for Limits.Files

	lockMu     sync.Mutex
	lockChange chan struct{} // closed and made anew when a lock may have become free
	waiting    map[uint64]*lockWait
	lockWaits  chan struct{}
}

// New makes a file system. The calling process must be root, with Capabilities and Securebits, and with the umask 0.
func New(cfg Config) (*FS, error) {
	if err := checkCredentials(); err != nil {
		return nil, err
	}
	fs := &FS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), proc: cfg.Proc, limits: cfg.Limits,
		nodes: make(map[uint64]*node), keys: make(map[key]*node), mounts: make(map[uint64]*mount),
		volumes: make(map[string]*volume), devices: make(map[uint64]uint64), files: make(map[uint64]*openFile),
		lockChange: make(chan struct{}), waiting: make(map[uint64]*lockWait), lockWaits: make(chan struct{}, 1),
	}
	fd, err := unix.FcntlInt(uintptr(cfg.Root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate root: %w", err)
	}
	st, err := stat(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("look at root: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		_ = unix.Close(fd)
		return nil, errors.New("root is not a directory")
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.root = fs.newNode(nil, "", keyOf(&st), &st, handleOf(fd)) // it gets FUSE_ROOT_ID, 1
	fs.root.mount.fd = fs.openMount(fd, &st)
	fs.root.lookups = 1
	fs.root.kept = &descriptor{fd: fd, refs: 1}
	return fs, nil
}

// Options are what go-fuse needs to know to serve an FS.
func Options() *fuse.MountOptions {
	return &fuse.MountOptions{
		Name:          "runv",
		EnableLocks:   true,
		EnableAcl:     true,
		MaxWrite:      1 << 20,
		MaxBackground: 64,
		DisableSplice: true,
		ExtraCapabilities: fuse.CAP_DONT_MASK | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_READDIRPLUS_AUTO |
			fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_SETXATTR_EXT | fuse.CAP_ASYNC_DIO,
	}
}

// Close closes all that is open. No method may be called afterwards or at the same time.
func (fs *FS) Close() {
	fs.mu.Lock()
	var closing []*descriptor
	for _, n := range fs.nodes {
		closing = fs.dropLocks(n, fs.letGo(n, closing))
	}
	for _, m := range fs.mounts {
		if m.fd >= 0 {
			closing = append(closing, &descriptor{fd: m.fd})
		}
	}
	files := fs.files
	fs.files = nil
	fs.mu.Unlock()
	closeAll(closing)
	for _, f := range files {
		f.put()
	}
}

// Usage is how much a guest makes the server hold.
type Usage struct{ Nodes, Kept, Files, Waits int }

// Usage tells how much the guest makes the server hold.
func (fs *FS) Usage() Usage {
	fs.mu.Lock()
	u := Usage{Nodes: len(fs.nodes), Kept: fs.recent.Len(), Files: len(fs.files) + fs.locked}
	fs.mu.Unlock()
	fs.lockMu.Lock()
	defer fs.lockMu.Unlock()
	u.Waits = len(fs.waiting)
	return u
}

// String names the file system in go-fuse's messages.
func (fs *FS) String() string { return "runv" }

// status is the error number for the guest.
func status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return fuse.Status(errno)
	}
	return fuse.EIO
}
