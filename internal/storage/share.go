package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/mountns"
	"runv/internal/sharefs"
)

const (
	// Tag is the name under which the guest mounts the share.
	Tag = "runv"
	// GuestDir is where the guest's agent mounts it.
	GuestDir = "/run/runv/share"

	socketName = "share.sock"

	// dirMode lets the root of a container's user namespace, who is somebody else to the guest's
	// kernel, reach what it is to mount. On the host all is below a directory of root's own.
	dirMode = 0o711
)

// ShareConfig describes a share.
type ShareConfig struct {
	// Dir is the directory to serve. It is made by Start and removed by Close;
	// the server's socket is made beside it.
	Dir string
	// LogFile gets what the server says, at most 4 MiB; empty: nothing does.
	LogFile string
	// HostMounts is where the paths given to Add are looked up; nil: this process's own
	// namespace. It stays the caller's, open until Close.
	HostMounts *mountns.Host
	// Launch starts the server as the command's own Start does, in a cgroup for example; nil: that is
	// enough.
	Launch func(cmd *exec.Cmd) error
	Log    *slog.Logger
}

// Root is a container's root file system.
type Root struct {
	Path string // absolute, a directory
	// ReadOnly denies the guest to write to it. What is mounted below it is not
	// affected, as under runc.
	ReadOnly bool
	// MountPoints are made in a read-only root where they are missing, as runc
	// does; in one that can be written to the guest makes them.
	MountPoints []MountPoint
}

// MountPoint is a place in a root file system to mount on.
type MountPoint struct {
	Path string // absolute, in the root file system
	File bool   // for a file
}

// Bind is a directory or file of the host for a container.
type Bind struct {
	Source    string // absolute
	Recursive bool   // with what is mounted below it
	ReadOnly  bool
	// ReadOnlyBelow makes what is mounted below it read-only, too.
	ReadOnlyBelow bool
	IDMap         *IDMap // nil: the files' owners are those on the host
	// Exclusive says that nobody but this VM changes the files while it runs, so that the guest may cache what it reads of
	// them for a second without asking. Otherwise the guest asks the host each time, if the bind can be written to.
	Exclusive bool
}

// Mapping tells where the guest finds what Add added.
type Mapping struct {
	Root  string
	Binds map[int]string
	// HostReadOnly are the read-only binds below which something is mounted that can be written to. The guest must not make its
	// mounts of them read-only, for they are one file system there; the host refuses what is refused.
	HostReadOnly map[int]bool
	// Made are those of Root.MountPoints, by path, that were missing and are there now.
	Made []string
}

// Share is a directory that a VM sees. Methods may be called concurrently,
// Start once and first.
type Share struct {
	cfg    ShareConfig
	server *server

	// dir is the served mount: mounts go here. below is the directory under it,
	// which alone can be written to: mount points are made here.
	dir, below *os.File

	mu         sync.Mutex
	closed     bool
	containers map[string]*container

	volumesMu  sync.Mutex // held while mounts of volumes come and go
	volumes    map[*volume]struct{}
	lastVolume int
}

// container is what there is of one container.
type container struct {
	// mu is held while mounts come and go. Share.mu and volumesMu may be taken while holding it, not
	// the other way round.
	mu sync.Mutex
	added
	volumes []*volume
}

// added are mount points and their directories, relative to the share, in the order of their making.
type added struct{ points []string }

// NewShare makes a share that is not served yet.
func NewShare(cfg ShareConfig) *Share {
	return &Share{cfg: cfg, server: newServer(), containers: make(map[string]*container), volumes: make(map[*volume]struct{})}
}

// Start makes the directory and starts the server. It returns when the server waits for the
// VMM. ctx bounds Start only. After an error nothing is left.
func (s *Share) Start(ctx context.Context) error {
	if err := s.start(ctx); err != nil {
		s.server.never()
		return errors.Join(fmt.Errorf("start share: %w", err), s.removeDir())
	}
	return nil
}

func (s *Share) start(ctx context.Context) error {
	if !filepath.IsAbs(s.cfg.Dir) {
		return fmt.Errorf("relative directory %q: %w", s.cfg.Dir, errdefs.ErrInvalidArgument)
	}
	if err := s.makeDir(); err != nil {
		return err
	}
	return s.server.start(ctx, s.cfg)
}

// makeDir makes the directory and mounts it on itself, so that it is read-only for the server.
// Shared, because the server lives in a mount namespace of its own, which mounts that come later
// must reach.
func (s *Share) makeDir() (err error) {
	if err = os.Mkdir(s.cfg.Dir, dirMode); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if s.below, err = os.OpenFile(s.cfg.Dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
		return err
	}
	if err := s.below.Chmod(dirMode); err != nil {
		return err
	}
	fd, err := unix.OpenTree(int(s.below.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("copy mount of %s: %w", s.cfg.Dir, err)
	}
	defer unix.Close(fd)
	const attributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC
	// Private first: or else the mounts would also appear where the directory's
	// file system is mounted for others.
	for _, attr := range []unix.MountAttr{
		{Attr_set: attributes, Propagation: unix.MS_PRIVATE},
		{Propagation: unix.MS_SHARED},
	} {
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("set mount attributes of %s: %w", s.cfg.Dir, err)
		}
	}
	if err := unix.MoveMount(fd, "", int(s.below.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s: %w", s.cfg.Dir, err)
	}
	// A path leads to the topmost mount.
	s.dir, err = os.OpenFile(s.cfg.Dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	return err
}

// removeDir undoes makeDir and removes the socket, as far as they were made.
func (s *Share) removeDir() error {
	if s.below == nil {
		return nil
	}
	if s.dir != nil {
		_ = s.dir.Close() // or else the mount is busy
	}
	errs := []error{unmount(s.cfg.Dir)}
	for _, path := range []string{s.cfg.Dir, s.Socket()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_ = s.below.Close()
	s.below = nil
	return nil
}

// Socket is the path of the server's listening socket.
func (s *Share) Socket() string { return filepath.Join(filepath.Dir(s.cfg.Dir), socketName) }

// Done is closed when the server has ended.
func (s *Share) Done() <-chan struct{} { return s.server.done }

// Err tells after Done why the server ended: nil when Close did that or when the server
// itself stopped in order, as it does when the VMM leaves; else an error with its last words.
func (s *Share) Err() error { return s.server.ended() }

// Processes are the server's processes on the host, none before Start.
func (s *Share) Processes() []int {
	if pid := s.server.process(); pid != 0 {
		return []int{pid}
	}
	return nil
}

// LockWaits tells which threads of the guest, by their numbers in the agent's pid namespace, wait for a lock on a file of
// the share: again and again as long as they do. The guest names the numbers. nil before Start.
func (s *Share) LockWaits() <-chan []int {
	if c := s.server.client(); c != nil {
		return c.Waiting()
	}
	return nil
}

// InterruptWaits ends the waits of threads for locks: they have a signal to handle.
func (s *Share) InterruptWaits(threads []int) error { return s.server.client().Interrupt(threads) }

// Add makes a container's root and binds (by number) visible to the VM. Errors
// name the path: errdefs.ErrNotFound when it does not exist. errdefs.ErrAlreadyExists when the
// container was added before. After an error nothing of it is left.
func (s *Share) Add(ctx context.Context, containerID string, root Root, binds map[int]Bind) (Mapping, error) {
	m, err := s.add(ctx, containerID, root, binds)
	if err != nil {
		return Mapping{}, fmt.Errorf("share container %s: %w", containerID, err)
	}
	return m, nil
}

func (s *Share) add(ctx context.Context, id string, root Root, binds map[int]Bind) (_ Mapping, err error) {
	if !validName(id) {
		return Mapping{}, fmt.Errorf("invalid name: %w", errdefs.ErrInvalidArgument)
	}
	c := &container{}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.mu.Lock()
	switch {
	case s.closed || s.dir == nil:
		err = fmt.Errorf("the share is not served: %w", errdefs.ErrFailedPrecondition)
	case s.containers[id] != nil:
		err = errdefs.ErrAlreadyExists
	default:
		s.containers[id] = c
	}
	s.mu.Unlock()
	if err != nil {
		return Mapping{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.remove(id, c))
		}
	}()

	if err := s.makePoint(&c.added, id, true); err != nil {
		return Mapping{}, err
	}
	m := Mapping{Root: path.Join(GuestDir, id, "rootfs"), Binds: make(map[int]string, len(binds))}
	opts := treeOptions{recursive: true, readOnly: root.ReadOnly, mustBeDir: true}
	if root.ReadOnly {
		opts.points = root.MountPoints
	}
	t, err := s.open(ctx, root.Path, opts)
	if err == nil {
		m.Made = t.made
		err = s.attach(&c.added, path.Join(id, "rootfs"), root.Path, t)
	}
	if err != nil {
		return Mapping{}, err
	}
	for _, n := range inOrder(binds) {
		v, err := s.use(ctx, binds[n])
		if err != nil {
			return Mapping{}, fmt.Errorf("mounts[%d]: %w", n, err)
		}
		c.volumes = append(c.volumes, v)
		m.Binds[n] = path.Join(GuestDir, v.at)
		if v.writableBelow {
			if m.HostReadOnly == nil {
				m.HostReadOnly = make(map[int]bool)
			}
			m.HostReadOnly[n] = true
		}
	}
	return m, nil
}

// inOrder lists binds by number, those first that can be written to: they serve the others, too.
func inOrder(binds map[int]Bind) []int {
	return slices.SortedFunc(maps.Keys(binds), func(a, b int) int {
		if binds[a].ReadOnly != binds[b].ReadOnly {
			if binds[a].ReadOnly {
				return 1
			}
			return -1
		}
		return cmp.Compare(a, b)
	})
}

// nameOf is the last part of a source's path: /proc/self/mountinfo shows it in the guest, as it does
// under runc.
func nameOf(source string) string {
	if base := path.Base(source); base != "/" && base != "." && base != ".." {
		return base
	}
	return "root"
}

// open copies what is mounted at a source.
func (s *Share) open(ctx context.Context, source string, opts treeOptions) (tree, error) {
	if !filepath.IsAbs(source) {
		return tree{}, fmt.Errorf("bind %q: not an absolute path: %w", source, errdefs.ErrInvalidArgument)
	}
	return openTree(ctx, s.cfg.HostMounts, source, opts)
}

// attach makes the copy of a source visible at a path below the share, and uses it up. Whoever owns a
// is alone with it.
func (s *Share) attach(a *added, at, source string, t tree) error {
	if err := s.makePoint(a, at, t.dir); err != nil {
		t.close()
		return err
	}
	if err := t.attach(s.dir, at); err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	return nil
}

// makePoint makes an empty directory or file to mount on.
func (s *Share) makePoint(a *added, at string, dir bool) (err error) {
	if dir {
		err = unix.Mkdirat(int(s.below.Fd()), at, dirMode)
		if err == nil { // in spite of the umask
			err = unix.Fchmodat(int(s.below.Fd()), at, dirMode, 0)
		}
	} else {
		err = unix.Mknodat(int(s.below.Fd()), at, unix.S_IFREG|0o600, 0)
	}
	if err != nil {
		return fmt.Errorf("make mount point %s: %w", at, err)
	}
	a.points = append(a.points, at)
	return nil
}

// Remove takes from the VM what Add gave it. Idempotent: an unknown container
// is success. After an error it can be called again.
func (s *Share) Remove(containerID string) error {
	s.mu.Lock()
	c := s.containers[containerID]
	s.mu.Unlock()
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.remove(containerID, c); err != nil {
		return fmt.Errorf("unshare container %s: %w", containerID, err)
	}
	return nil
}

// remove undoes add, as far as it went. c.mu is held.
func (s *Share) remove(id string, c *container) error {
	for len(c.volumes) > 0 {
		last := len(c.volumes) - 1
		if err := s.leave(c.volumes[last]); err != nil {
			return err
		}
		c.volumes = c.volumes[:last]
	}
	if err := s.withdraw(id, &c.added); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[id] == c { // not another one that was added meanwhile
		delete(s.containers, id)
	}
	return nil
}

// withdraw removes mounts below a directory at the top of the share. The server closes first what it has open there, so that a
// plain unmount succeeds, and once more afterwards what the guest has made it open meanwhile.
func (s *Share) withdraw(top string, a *added) error {
	if len(a.points) == 0 {
		return nil
	}
	forget := func() {
		if err := s.server.forget(top); err != nil {
			s.cfg.Log.Warn("share", "directory", top, "err", err) // the mount lives on until the server ends
		}
	}
	forget()
	if err := s.removePoints(a); err != nil {
		return err
	}
	forget()
	return nil
}

// removePoints unmounts and removes what makePoint made. After an error it can be called again.
func (s *Share) removePoints(a *added) error {
	for len(a.points) > 0 {
		last := len(a.points) - 1
		at := a.points[last]
		if err := unmount(filepath.Join(s.cfg.Dir, at)); err != nil {
			return err
		}
		// By way of the directory below, where nothing is mounted: the user's
		// files are out of reach whatever happens.
		err := unix.Unlinkat(int(s.below.Fd()), at, 0)
		if errors.Is(err, unix.EISDIR) {
			err = unix.Unlinkat(int(s.below.Fd()), at, unix.AT_REMOVEDIR)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove mount point %s: %w", at, err)
		}
		a.points = a.points[:last]
	}
	return nil
}

// Close stops the server, removes all containers, and then the directory and the socket. ctx
// bounds the wait for the server's end. Idempotent; after an error it can be called again.
func (s *Share) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	ids := slices.Sorted(maps.Keys(s.containers))
	s.mu.Unlock()
	errs := []error{s.server.stop(ctx)}
	for _, id := range ids {
		errs = append(errs, s.Remove(id))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close share: %w", err)
	}
	if err := s.removeDir(); err != nil {
		return fmt.Errorf("close share: %w", err)
	}
	return nil
}

// validName tells whether a container's id can be the name of a directory, and not that of a volume's.
func validName(id string) bool {
	return !strings.HasPrefix(id, sharefs.BindPrefix) && id != "" && id != "." && id != ".." && len(id) <= 255 && !strings.ContainsAny(id, "/\x00")
}
