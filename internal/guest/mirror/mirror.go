// Package mirror keeps copies of small trees of the host in the guest's memory, and repeats in them what
// happens to the originals, so that watches (inotify) of programs fire as on the host. internal/guest/server calls it
// for the host's requests.
//
// A mirror is a tmpfs that is mounted read-only below Set's directory, with the tree and a staging place
// in it. Containers get the tree as the source of a bind mount. The agent alone can write to it, by a second
// mount that is attached nowhere.
//
// The package decides nothing: what to do is the host's to say. What it is told it does below the mirror's own root
// and through no symlink, whatever a container that has the rights to remount the tree has made there.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/fault"
)

const (
	// maxMirrors bounds how many there are at a time.
	maxMirrors = 1024
	// maxOperations bounds a request.
	maxOperations = 1024
	maxName       = 255

	treeDir  = "tree"  // has the tree's root as its one entry
	stageDir = "stage" // what is on its way into the tree, or out of it
)

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

// Set is all mirrors of the guest. It is safe for concurrent use.
type Set struct {
	dir string // where they are mounted

	mu   sync.Mutex
	byID map[string]*mirror
}

// NewSet makes an empty set, whose mirrors are mounted below dir.
func NewSet(dir string) *Set { return &Set{dir: dir, byID: make(map[string]*mirror)} }

// mirror is one mirror. mu is held while somebody works on it.
type mirror struct {
	at   string // where it is mounted
	name string // of the tree's root
	dev  uint64 // of its file system

	mu    sync.Mutex
	gone  bool
	tree  int // treeDir, on the mount that can be written to
	stage int // stageDir
	root  int // the tree's root; -1: it is not made yet
	open  []openFile
}

// openFile is a file that was written and not closed yet, as on the host.
type openFile struct {
	ino uint64
	fd  int
}

// maxOpen bounds the files that are open at a time; the oldest are closed early.
const maxOpen = 64

// Create makes an empty mirror and returns the path at which the root of its tree will be.
func (s *Set) Create(r *agentv1.CreateMirrorRequest) (string, error) {
	if !validID(r.Id) {
		return "", invalid("mirror id %q is not valid", r.Id)
	}
	if !validName(r.Name) {
		return "", invalid("mirror %s: %q is not a name", r.Id, r.Name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.byID[r.Id] != nil:
		return "", fault.New(errdefs.ErrAlreadyExists, "mirror %s exists", r.Id)
	case len(s.byID) >= maxMirrors:
		return "", fault.New(errdefs.ErrResourceExhausted, "mirror %s: there are %d already", r.Id, maxMirrors)
	}
	m := &mirror{at: filepath.Join(s.dir, r.Id), name: r.Name, tree: -1, stage: -1, root: -1}
	if err := m.mount(); err != nil {
		return "", errors.Join(fmt.Errorf("mount mirror %s: %w", r.Id, err), m.close())
	}
	s.byID[r.Id] = m
	return filepath.Join(m.at, treeDir, m.name), nil
}

// mount makes the file system with its two places.
func (m *mirror) mount() error {
	// The root of a container's user namespace, who is somebody else to this kernel, must reach the tree.
	if err := os.MkdirAll(m.at, 0o711); err != nil {
		return err
	}
	// No options: /proc/mounts of the container would show them. The host bounds what comes here.
	if err := unix.Mount("tmpfs", m.at, "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := os.Chmod(m.at, 0o711); err != nil {
		return err
	}
	for _, place := range []struct {
		name string
		mode uint32
	}{{treeDir, 0o711}, {stageDir, 0o700}} {
		if err := unix.Mkdir(filepath.Join(m.at, place.name), place.mode); err != nil {
			return fmt.Errorf("make %s: %w", place.name, err)
		}
	}
	writable, err := unix.OpenTree(unix.AT_FDCWD, m.at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("copy mount: %w", err)
	}
	defer unix.Close(writable)
	// Locked in a user namespace: there even the root cannot take it back.
	if err := unix.MountSetattr(unix.AT_FDCWD, m.at, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make it read-only: %w", err)
	}
	for name, fd := range map[string]*int{treeDir: &m.tree, stageDir: &m.stage} {
		if *fd, err = unix.Openat(writable, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open %s: %w", name, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(m.tree, &st); err != nil {
		return err
	}
	m.dev = st.Dev
	return nil
}

// close lets go of all, as far as mount went.
func (m *mirror) close() error {
	for len(m.open) > 0 {
		m.closeFile(0)
	}
	for _, fd := range []*int{&m.root, &m.tree, &m.stage} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
	err := unix.Unmount(m.at, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", m.at, err)
	}
	if err := os.Remove(m.at); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// use returns the mirror, locked.
func (s *Set) use(id string) (*mirror, error) {
	s.mu.Lock()
	m := s.byID[id]
	s.mu.Unlock()
	if m != nil {
		m.mu.Lock()
		if !m.gone {
			return m, nil
		}
		m.mu.Unlock()
	}
	return nil, fault.New(errdefs.ErrNotFound, "mirror %q does not exist", id)
}

// Remove lets go of a mirror; an unknown one is success.
func (s *Set) Remove(id string) error {
	m, err := s.use(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer m.mu.Unlock()
	if err := m.close(); err != nil {
		return fmt.Errorf("remove mirror %s: %w", id, err)
	}
	m.gone = true
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID, id)
	return nil
}

// Apply does the operations in their order, up to the first that fails.
func (s *Set) Apply(ctx context.Context, r *agentv1.ApplyMirrorRequest) error {
	if len(r.Operations) > maxOperations {
		return invalid("mirror %q: %d operations are more than %d", r.Id, len(r.Operations), maxOperations)
	}
	m, err := s.use(r.Id)
	if err != nil {
		return err
	}
	defer m.mu.Unlock()
	return onThread(func() error {
		if err := becomeMaker(); err != nil {
			return fmt.Errorf("mirror %s: %w", r.Id, err)
		}
		for i, op := range r.Operations {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := m.apply(op); err != nil {
				return fmt.Errorf("mirror %s: operation %d: %w", r.Id, i, err)
			}
		}
		return nil
	})
}

func (m *mirror) apply(op *agentv1.MirrorOperation) error {
	switch k := op.Kind.(type) {
	case *agentv1.MirrorOperation_Make:
		return named("make", k.Make.Path, m.make(k.Make))
	case *agentv1.MirrorOperation_Write:
		return named("write", k.Write.Path, m.write(k.Write))
	case *agentv1.MirrorOperation_Publish:
		return named("publish", k.Publish.Path, m.publish(k.Publish))
	case *agentv1.MirrorOperation_Link:
		return named("link", k.Link.Link, m.link(k.Link))
	case *agentv1.MirrorOperation_Close:
		return named("close", k.Close.Path, m.closeWritten(k.Close.Path))
	case *agentv1.MirrorOperation_SetAttributes:
		return named("set attributes of", k.SetAttributes.Path, m.setAttributes(k.SetAttributes))
	case *agentv1.MirrorOperation_Rename:
		return named("rename", k.Rename.Path, m.rename(k.Rename))
	case *agentv1.MirrorOperation_Remove:
		return named("remove", k.Remove.Path, m.remove(k.Remove))
	}
	return invalid("its kind is not known")
}

func named(verb, path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %q: %w", verb, path, err)
}

// validID tells whether a mirror's id is one.
func validID(id string) bool {
	if id == "" || len(id) > 32 {
		return false
	}
	return strings.IndexFunc(id, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' }) < 0
}

// validName tells whether a file can have the name.
func validName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxName && !strings.ContainsAny(name, "/\x00")
}

// validPath tells whether a path is one as the API wants it, and not empty.
func validPath(path string) bool {
	if len(path) >= unix.PathMax {
		return false
	}
	for name := range strings.SplitSeq(path, "/") {
		if !validName(name) {
			return false
		}
	}
	return true
}
