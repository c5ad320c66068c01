package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// Networks are the guest's networks by their ids; network.Set has them, and says what the methods do.
type Networks interface {
	Open(id string) (*os.File, error)
	Shared(id string) bool
	Adopt(ctx context.Context, id string, netns *os.File) error
	Release(id string)
}

// What the path of a namespace begins with, as the API has it.
const (
	containerPath = "container:"
	networkPath   = "network:"
)

// ref is a namespace of another's that a container asks for.
type ref struct {
	kind specs.LinuxNamespaceType
	flag int
	path string
}

// joined is what a container joins.
type joined struct {
	id    string   // of the container whose namespaces they are; empty: a network
	file  *os.File // pidfd of its init, or the namespace
	flags int      // CLONE_NEW*
}

// find fills in whose namespaces those are that ns asks for. Also after an error, what it has opened is
// to be closed with ns.close, and what it has entered to be left with release.
func (s *Set) find(ns *namespaces) error {
	for _, r := range ns.refs {
		var err error
		if id, ok := strings.CutPrefix(r.path, containerPath); ok {
			err = s.findContainer(ns, r, id)
		} else {
			err = s.findNetwork(ns, strings.TrimPrefix(r.path, networkPath))
		}
		if err != nil {
			return fmt.Errorf("linux.namespaces: %s: %w", r.kind, err)
		}
	}
	if err := s.ownNetwork(ns); err != nil {
		return fmt.Errorf("linux.namespaces: %s: %w", specs.NetworkNamespace, err)
	}
	if kind := ns.joins() & enteredAlone; ns.own&unix.CLONE_NEWUSER != 0 && kind != 0 {
		// It would have to enter the one with the rights that it loses in the other.
		name := specs.TimeNamespace
		if kind&unix.CLONE_NEWTIME == 0 {
			name = specs.CgroupNamespace
		}
		return fault.New(errdefs.ErrNotImplemented, "linux.namespaces: a %s namespace cannot be joined with a new user namespace", name)
	}
	return nil
}

func (s *Set) findContainer(ns *namespaces, r ref, id string) error {
	c, err := s.Get(id)
	if err != nil {
		return err
	}
	if r.flag == unix.CLONE_NEWNET && c.namespaces.network != "" {
		return s.findNetwork(ns, c.namespaces.network)
	}
	if r.flag == unix.CLONE_NEWUSER {
		same := slices.Equal(ns.uid, c.namespaces.uid) && slices.Equal(ns.gid, c.namespaces.gid)
		if len(ns.uid) > 0 && !same {
			return invalid("linux.uidMappings, linux.gidMappings: are not those of container %q", id)
		}
		ns.uid, ns.gid = c.namespaces.uid, c.namespaces.gid
		if len(ns.uid) == 0 { // the guest's own: there is nothing to enter
			ns.flags &^= r.flag
			return nil
		}
	}
	for i := range ns.from {
		if ns.from[i].id == id {
			ns.from[i].flags |= r.flag
			return nil
		}
	}
	file, err := c.initPidfd()
	if err != nil {
		return err
	}
	ns.from = append(ns.from, joined{id: id, file: file, flags: r.flag})
	return nil
}

func (s *Set) findNetwork(ns *namespaces, id string) error {
	if s.Networks == nil {
		return fault.New(errdefs.ErrNotImplemented, "network %q: there are no networks", id)
	}
	file, err := s.Networks.Open(id)
	if err != nil {
		return err
	}
	ns.network = id
	if ns.own&unix.CLONE_NEWUSER != 0 {
		// It has rights over a network namespace of its own only, which becomes the network's.
		ns.own |= unix.CLONE_NEWNET
		return file.Close()
	}
	ns.from = append(ns.from, joined{file: file, flags: unix.CLONE_NEWNET})
	return nil
}

// ownNetwork makes the network of a container that joins a user namespace belong to that, unless it does so already:
// over that of another the container would have no rights, not even that to mount sysfs. A network that
// others are in stays what it is.
func (s *Set) ownNetwork(ns *namespaces) error {
	i := slices.IndexFunc(ns.from, func(j joined) bool { return j.id == "" && j.flags == unix.CLONE_NEWNET })
	u := slices.IndexFunc(ns.from, func(j joined) bool { return j.flags&unix.CLONE_NEWUSER != 0 })
	if i < 0 || u < 0 || s.Networks.Shared(ns.network) {
		return nil
	}
	same, err := s.owns(ns.from[u].id, ns.from[i].file)
	if err != nil || same {
		return err
	}
	file := ns.from[i].file
	ns.from = slices.Delete(ns.from, i, i+1)
	ns.own |= unix.CLONE_NEWNET
	return file.Close()
}

// owns tells whether the user namespace of a container owns a namespace.
func (s *Set) owns(id string, owned *os.File) (bool, error) {
	c, err := s.Get(id)
	if err != nil {
		return false, err
	}
	c.mu.Lock()
	pid := c.init.pid
	c.mu.Unlock()
	var theirs, owner unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/user", pid), &theirs); err != nil {
		return false, fmt.Errorf("find user namespace of container %q: %w", id, err)
	}
	fd, err := unix.IoctlRetInt(int(owned.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return false, fmt.Errorf("find owner of namespace: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &owner); err != nil {
		return false, fmt.Errorf("find owner of namespace: %w", err)
	}
	return theirs.Dev == owner.Dev && theirs.Ino == owner.Ino, nil
}

// initPidfd returns a copy of the pidfd of init, which may have ended.
func (c *Container) initPidfd() (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status != created && c.status != running || c.deleting {
		return nil, c.wrongState("join namespaces of")
	}
	fd, err := unix.FcntlInt(c.init.pidfd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("copy pidfd of container %q: %w", c.id, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// close closes what find has opened.
func (ns *namespaces) close() {
	for _, j := range ns.from {
		j.file.Close()
	}
	ns.from = nil
}

// release leaves the network, once, when no process of the container is in it any more.
func (s *Set) release(ns *namespaces) {
	if ns.network != "" {
		s.Networks.Release(ns.network)
	}
}

// joins are the namespaces of others, CLONE_NEW*.
func (ns *namespaces) joins() (flags int) {
	for _, j := range ns.from {
		flags |= j.flags
	}
	return flags
}

// joinsUser tells whether the container is to be in the user namespace of another.
func (ns *namespaces) joinsUser() bool { return ns.joins()&unix.CLONE_NEWUSER != 0 }

// enter takes the calling thread into those namespaces of others that a thread can enter; its
// children are born there. The thread must not be used for anything else.
func (ns *namespaces) enter() error {
	for _, j := range ns.from {
		flags := j.flags &^ enteredAlone
		if flags == 0 {
			continue
		}
		err := unix.Setns(int(j.file.Fd()), flags)
		if errors.Is(err, unix.ESRCH) {
			return fault.New(errdefs.ErrFailedPrecondition, "join namespaces of container %q: it has stopped", j.id)
		}
		if err != nil {
			return fmt.Errorf("join namespaces: %w", err)
		}
	}
	return nil
}

// inJoined calls f on a thread that is where init is to be born.
func (ns *namespaces) inJoined(f func() error) error {
	if ns.joins()&^enteredAlone == 0 {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked, as in inTimeNS
		err := ns.enter()
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}
