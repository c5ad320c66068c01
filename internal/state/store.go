package state

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"
)

const (
	// lockTimeout bounds the wait for the root's lock. Holders keep it for
	// milliseconds and never while they wait for anything.
	lockTimeout = 10 * time.Second
	lockRetry   = 2 * time.Millisecond

	containersDir = "containers"
	podsDir       = "pods"
	tmpDir        = "tmp"
	containerFile = "state.json"
	podFile       = "pod.json"
	podLink       = "pod"
)

// Store is one state directory. It holds nothing open and is safe for
// concurrent use by any number of processes.
type Store struct {
	root string
}

// EntryError tells of an entry that exists but cannot be read. It wraps the cause.
type EntryError struct {
	Kind string // "container" or "pod"
	ID   string
	Err  error
}

func (e *EntryError) Error() string { return fmt.Sprintf("read %s %s: %v", e.Kind, e.ID, e.Err) }

// Unwrap returns the cause.
func (e *EntryError) Unwrap() error { return e.Err }

// Open returns the store at root, which need not exist: reading then finds it
// empty, and the first reservation creates it. One that exists must be a
// directory that belongs to the caller and that nobody else may write to:
// otherwise errdefs.ErrPermissionDenied.
func Open(root string) (*Store, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open state directory %s: %w", root, err)
	}
	s := &Store{root: abs}
	if err := s.check(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return s, nil
}

// check looks whether the root is one whose content can be trusted.
func (s *Store) check() error {
	fi, err := os.Stat(s.root)
	if err != nil {
		return fmt.Errorf("open state directory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.root, &st); err != nil {
		return fmt.Errorf("open state directory %s: %w", s.root, err)
	}
	switch {
	case !fi.IsDir():
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("open state directory %s: not a directory", s.root))
	case int(st.Uid) != os.Geteuid():
		return errdefs.ErrPermissionDenied.WithMessage(
			fmt.Sprintf("open state directory %s: it belongs to uid %d, not to %d", s.root, st.Uid, os.Geteuid()))
	case fi.Mode().Perm()&0o022 != 0:
		return errdefs.ErrPermissionDenied.WithMessage(
			fmt.Sprintf("open state directory %s: others may write to it (mode %04o)", s.root, fi.Mode().Perm()))
	}
	return nil
}

// Root is the absolute path of the state directory.
func (s *Store) Root() string { return s.root }

// ContainerDir is the path of a container's directory, whether it exists or not.
func (s *Store) ContainerDir(id string) string { return filepath.Join(s.root, containersDir, id) }

// PodDir is the path of a pod's directory, whether it exists or not.
func (s *Store) PodDir(pod string) string { return filepath.Join(s.root, podsDir, pod) }

// ReserveContainer adds a container and thereby reserves its id. Creator is set
// to the calling process if it is zero. Errors: errdefs.ErrAlreadyExists, and
// errdefs.ErrInvalidArgument for a Container that could not be read back.
// The undo is RemoveContainer.
func (s *Store) ReserveContainer(c Container) error {
	if err := s.setCreator(&c.Creator); err != nil {
		return fmt.Errorf("reserve container %s: %w", c.ID, err)
	}
	c.Version = Version
	if err := c.validate(); err != nil {
		return invalid("reserve container", err)
	}
	err := s.add(s.ContainerDir(c.ID), func(dir string) error {
		if err := writeFile(dir, containerFile, &c); err != nil {
			return err
		}
		// Tells the pod even when state.json gets damaged.
		return os.Symlink(filepath.Join("..", "..", podsDir, c.PodID), filepath.Join(dir, podLink))
	})
	if errors.Is(err, fs.ErrExist) {
		return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("container with id %s exists already", c.ID))
	}
	if err != nil {
		return fmt.Errorf("reserve container %s: %w", c.ID, err)
	}
	return nil
}

// SaveContainer replaces the state of a reserved container. Errors:
// errdefs.ErrNotFound when it was removed, errdefs.ErrFailedPrecondition when
// the id now belongs to another container.
func (s *Store) SaveContainer(c Container) error {
	c.Version = Version
	if err := c.validate(); err != nil {
		return invalid("save container", err)
	}
	return s.replace("container", c.ID, s.ContainerDir(c.ID), containerFile, &c, func() error {
		old, err := s.LoadContainer(c.ID)
		if err == nil && (old.PodID != c.PodID || !old.Created.Equal(c.Created)) {
			return errdefs.ErrFailedPrecondition.WithMessage(
				fmt.Sprintf("save container %s: the id belongs to another container now", c.ID))
		}
		return nil // what cannot be read is replaced
	})
}

// LoadContainer reads a container. Errors: errdefs.ErrNotFound, or an
// *EntryError that wraps errdefs.ErrDataLoss or errdefs.ErrFailedPrecondition.
func (s *Store) LoadContainer(id string) (Container, error) {
	c, err := load(s.ContainerDir(id), "container", id, containerFile, DecodeContainer)
	if err == nil && c.ID != id {
		return Container{}, &EntryError{"container", id, damaged("it is of container %q", shorten(c.ID))}
	}
	return c, err
}

// Containers reads all containers, sorted by id. Entries that cannot be read
// are left out and told as *EntryError in the (joined) error; the others are
// returned nevertheless.
func (s *Store) Containers() ([]Container, error) {
	return loadAll(filepath.Join(s.root, containersDir), s.LoadContainer)
}

// RemoveContainer removes a container's directory and kills nothing; see Purge for more. Success
// when there is none. taken is the record that this call has removed, as far as it could be read,
// nil when it has removed none: among all who try, one gets it, and what is to be done once after a
// container's end is his.
func (s *Store) RemoveContainer(id string) (taken *Container, err error) {
	if !validName(id) {
		return nil, invalidID("container", id)
	}
	err = s.remove("container", id, s.ContainerDir(id), func() error { return nil }, func(dir string) {
		taken = recordIn(dir, id)
	})
	return taken, err
}

// recordIn reads a container's record from a directory that was discarded.
func recordIn(dir, id string) *Container {
	c, _ := loose[Container](filepath.Join(dir, containerFile))
	c.ID = id
	return &c
}

// CreatePod adds a pod with a directory of its own. Creator is set to the
// calling process if it is zero; SweepPods spares the pod while the creator or
// the supervisor lives. Errors as ReserveContainer. The undo is RemovePod.
func (s *Store) CreatePod(p Pod) error {
	if err := s.setCreator(&p.Creator); err != nil {
		return fmt.Errorf("create pod %s: %w", p.ID, err)
	}
	p.Version = Version
	if err := p.validate(); err != nil {
		return invalid("create pod", err)
	}
	err := s.add(s.PodDir(p.ID), func(dir string) error { return writeFile(dir, podFile, &p) })
	if errors.Is(err, fs.ErrExist) {
		return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("pod with id %s exists already", p.ID))
	}
	if err != nil {
		return fmt.Errorf("create pod %s: %w", p.ID, err)
	}
	return nil
}

// SavePod replaces the state of a pod. Errors as SaveContainer: a supervisor
// whose first SavePod fails must end, because nobody knows of it.
func (s *Store) SavePod(p Pod) error {
	p.Version = Version
	if err := p.validate(); err != nil {
		return invalid("save pod", err)
	}
	return s.replace("pod", p.ID, s.PodDir(p.ID), podFile, &p, func() error {
		old, err := s.LoadPod(p.ID)
		if err == nil && !old.Created.Equal(p.Created) {
			return errdefs.ErrFailedPrecondition.WithMessage(
				fmt.Sprintf("save pod %s: the id belongs to another pod now", p.ID))
		}
		return nil
	})
}

// LoadPod reads a pod. Errors as LoadContainer.
func (s *Store) LoadPod(id string) (Pod, error) {
	p, err := load(s.PodDir(id), "pod", id, podFile, DecodePod)
	if err == nil && p.ID != id {
		return Pod{}, &EntryError{"pod", id, damaged("it is of pod %q", shorten(p.ID))}
	}
	return p, err
}

// Pods reads all pods, as Containers does.
func (s *Store) Pods() ([]Pod, error) {
	return loadAll(filepath.Join(s.root, podsDir), s.LoadPod)
}

// RemovePod removes a pod's directory and its cgroup, and unmounts what is mounted in it; it
// kills nothing. It is how a supervisor ends. Success when there is none;
// errdefs.ErrFailedPrecondition while a container names the pod. It waits up to two seconds for
// processes in the cgroup that are ending; SweepPods removes a pod that has others there.
func (s *Store) RemovePod(id string) error {
	if !validName(id) {
		return invalidID("pod", id)
	}
	unused := func() error {
		if names := s.containersOf(id); len(names) > 0 {
			return errdefs.ErrFailedPrecondition.WithMessage(
				fmt.Sprintf("container %s is in it", names[0]))
		}
		return nil
	}
	if unused() == nil {
		ctx, cancel := bounded(cgroupTimeout)
		defer cancel()
		pod, _ := loose[Pod](filepath.Join(s.PodDir(id), podFile))
		if err := errors.Join(removeCgroup(ctx, pod.Cgroup), cleanNetworks(pod)); err != nil {
			return fmt.Errorf("remove pod %s: %w", id, err)
		}
	}
	return s.remove("pod", id, s.PodDir(id), unused, func(string) {})
}

// Live is the container's status with the death of its supervisor taken into
// account: without a living one it is stopped, whatever was written last. A
// container whose pod does not exist yet is being created while its creator
// lives.
func (s *Store) Live(c Container) Status {
	if c.Status == Stopped {
		return Stopped
	}
	pod, err := s.LoadPod(c.PodID)
	switch {
	case err == nil && pod.Supervisor.Alive():
		return c.Status
	case err == nil || errdefs.IsNotFound(err):
		if c.Status == Creating && c.Creator.Alive() && pod.Supervisor.IsZero() {
			return Creating
		}
		return Stopped
	}
	// pod.json is damaged. Whoever listens on the supervisor's socket tells.
	if _, ok := servedBy(s.PodDir(c.PodID)); ok {
		return c.Status
	}
	return Stopped
}

// setCreator fills in the calling process.
func (s *Store) setCreator(p *Process) (err error) {
	if p.IsZero() {
		*p, err = ProcessOf(os.Getpid())
	}
	return err
}

// podOf tells to which pod a container's directory belongs, as far as anything
// in it does: its state, then the link, then its own id.
func (s *Store) podOf(id string) string {
	if c, err := s.LoadContainer(id); err == nil {
		return c.PodID
	}
	if target, err := os.Readlink(filepath.Join(s.ContainerDir(id), podLink)); err == nil {
		if pod := filepath.Base(target); validName(pod) {
			return pod
		}
	}
	return id
}

// containersOf lists the containers that name the pod, readable or not.
func (s *Store) containersOf(pod string) []string {
	ids, err := entries(filepath.Join(s.root, containersDir))
	if err != nil {
		return nil
	}
	var found []string
	for _, id := range ids {
		if s.podOf(id) == pod {
			found = append(found, id)
		}
	}
	return found
}

// add makes a new directory whose content fill writes. The error is
// fs.ErrExist when it exists. Nothing is left of a directory that fails.
func (s *Store) add(dir string, fill func(dir string) error) error {
	for _, d := range []string{s.root, filepath.Dir(dir), filepath.Join(s.root, tmpDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	if err := s.check(); err != nil {
		return err
	}
	return s.locked(func() error {
		if _, err := os.Lstat(dir); err == nil {
			return fs.ErrExist
		}
		tmp, err := os.MkdirTemp(filepath.Join(s.root, tmpDir), "")
		if err != nil {
			return err
		}
		if err := fill(tmp); err != nil {
			return errors.Join(err, os.RemoveAll(tmp))
		}
		if err := os.Rename(tmp, dir); err != nil {
			return errors.Join(err, os.RemoveAll(tmp))
		}
		return nil
	})
}

// replace writes a file anew in an existing directory, if guard does not mind.
func (s *Store) replace(kind, id, dir, name string, v any, guard func() error) error {
	missing := errdefs.ErrNotFound.WithMessage(fmt.Sprintf("%s %s does not exist", kind, id))
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return missing // and do not make a lock file in a missing root
	}
	return s.locked(func() error {
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			return missing
		}
		if err := guard(); err != nil {
			return err
		}
		if err := writeFile(dir, name, v); err != nil {
			return fmt.Errorf("save %s %s: %w", kind, id, err)
		}
		return nil
	})
}

// locked runs f while it holds the root's lock. The root must exist.
func (s *Store) locked(f func() error) error {
	ctx, cancel := bounded(lockTimeout)
	defer cancel()
	// A new open file each time: the lock then excludes goroutines, too.
	lock := flock.New(filepath.Join(s.root, "lock"), flock.SetPermissions(0o600))
	ok, err := lock.TryLockContext(ctx, lockRetry)
	if err != nil || !ok {
		return fmt.Errorf("lock state directory %s: %w", s.root, err)
	}
	defer lock.Close()
	return f()
}

// bounded is for the short waits of functions that take no context.
func bounded(d time.Duration) (context.Context, context.CancelFunc) {
	//nolint:forbidigo // nobody's context is at hand, and the deadline is near
	return context.WithTimeout(context.Background(), d)
}

// load reads one entry; see LoadContainer for its errors.
func load[T any](dir, kind, id, file string, decode func([]byte) (T, error)) (T, error) {
	var zero T
	if !validName(id) {
		return zero, invalidID(kind, id)
	}
	data, err := readFile(filepath.Join(dir, file))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(dir); err == nil {
			return zero, &EntryError{kind, id, damaged("%s is missing", file)}
		}
		return zero, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("%s %s does not exist", kind, id))
	}
	if err != nil {
		return zero, &EntryError{kind, id, err}
	}
	v, err := decode(data)
	if err != nil {
		return zero, &EntryError{kind, id, err}
	}
	return v, nil
}

func loadAll[T any](dir string, load func(string) (T, error)) ([]T, error) {
	ids, err := entries(dir)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	var all []T
	var errs []error
	for _, id := range ids {
		v, err := load(id)
		switch {
		case err == nil:
			all = append(all, v)
		case !errdefs.IsNotFound(err): // removed meanwhile
			errs = append(errs, err)
		}
	}
	return all, errors.Join(errs...)
}

// entries lists the names in a directory, sorted; none if it does not exist.
func entries(dir string) ([]string, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	sort.Strings(names)
	return names, err
}

func invalid(verb string, err error) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s: %v", verb, err))
}

func invalidID(kind, id string) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s id %q is not valid", kind, shorten(id)))
}
