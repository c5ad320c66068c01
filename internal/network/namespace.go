package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// netlinkTimeout bounds each question to the kernel.
const netlinkTimeout = 10 * time.Second

// Namespace is a network namespace of the host, held by an open file: it lives at least as long. Its methods
// are safe for concurrent use.
type Namespace struct {
	file *os.File
	path string
	id   ID
}

// ID tells one network namespace from all others that there are at the time.
type ID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

// Open opens a network namespace by a path such as /proc/PID/ns/net or /run/netns/NAME; the caller closes it.
// errdefs.ErrNotFound when there is no such file, errdefs.ErrInvalidArgument when it is anything else than a
// network namespace.
func Open(path string) (*Namespace, error) {
	n, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return n, nil
}

func open(path string) (*Namespace, error) {
	// What the path names is looked at before it is opened: a pipe or a device might not like that.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, kindOf(errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var kind unix.Statfs_t
	if err := unix.Fstatfs(fd, &kind); err != nil {
		return nil, err
	}
	if kind.Type != unix.NSFS_MAGIC {
		return nil, errdefs.ErrInvalidArgument.WithMessage("not a namespace")
	}
	file, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	n := &Namespace{file: file, path: path}
	if err := n.identify(); err != nil {
		file.Close()
		return nil, err
	}
	return n, nil
}

func (n *Namespace) identify() error {
	return n.with(func(fd int) error {
		kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
		if err != nil {
			return err
		}
		if kind != unix.CLONE_NEWNET {
			return errdefs.ErrInvalidArgument.WithMessage("a namespace of another kind")
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		n.id = ID{Dev: st.Dev, Ino: st.Ino}
		return nil
	})
}

// Path is what Open was called with.
func (n *Namespace) Path() string { return n.path }

// ID is the namespace's identity.
func (n *Namespace) ID() ID { return n.id }

// Do calls f on a thread that is in the namespace and ends with f, and that is never the process's first, which is
// what others see of a process. What f opens of sockets and devices is the namespace's; f must not
// start goroutines that should be there, too.
func (n *Namespace) Do(f func() error) error {
	return mountns.OnThread(func() error {
		err := n.with(func(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNET) })
		if err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.path, err)
		}
		return f()
	})
}

// Handle returns a netlink handle for the routing family that works in the namespace from any
// goroutine. The caller closes it.
func (n *Namespace) Handle() (*netlink.Handle, error) {
	var h *netlink.Handle
	err := n.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := h.SetSocketTimeout(netlinkTimeout); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Close closes the file. Handles and what Do has opened stay usable.
func (n *Namespace) Close() error { return n.file.Close() }

// with calls f with the file's descriptor, which stays open meanwhile.
func (n *Namespace) with(f func(fd int) error) error {
	raw, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) { callErr = f(int(fd)) })
	return errors.Join(err, callErr)
}

// kindOf gives an error a kind of errdefs, without that one's words in its text.
func kindOf(kind, err error) error { return &kindError{kind: kind, err: err} }

type kindError struct{ kind, err error }

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }
