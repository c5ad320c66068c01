// Package network makes the guest's copies of the host's network namespaces. internal/guest/server
// calls Apply, Remove and Resolve for the host's requests, internal/guest/container Open, Adopt and Release for
// the containers that are in a network.
//
// A network is a network namespace of the guest, held by a descriptor, and what the host said last
// of it. Devices appear in the agent's own namespace, its home, whenever the host plugs them; Apply moves
// them into the network and gives them names and all the rest. What the host takes back goes
// home, or is unplugged.
//
// It knows no containers, and what programs in the guest add to a network it leaves alone.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// maxNetworks bounds how many networks there are at a time.
const maxNetworks = 256

// Config is what a Set works with.
type Config struct {
	// Driver loads the driver of network devices; nil: it is there. It may be called often.
	Driver func(context.Context) error
	// Redirect makes the sockets of containers that speak to a port of an address speak to another.
	Redirect func(ip [4]byte, from, to uint16) error
	Log      *slog.Logger
}

// Set is all networks of the guest. It is safe for concurrent use.
type Set struct {
	Config
	home     *os.File                            // the namespace where devices appear
	identify func(netlink.Link) net.HardwareAddr // the address that a device was plugged with

	mu   sync.Mutex
	byID map[string]*network

	serving sync.Mutex         // guards ports while name servers begin to be served
	ports   map[[4]byte]uint16 // that stand for port 53 of an address, in every network
}

// network is one network. Whoever holds the token in turn may use what stands below it.
type network struct {
	id   string
	turn chan struct{} // holds a token while an Apply, Adopt or Remove is at work
	last applied

	mu    sync.Mutex // guards what follows
	netns *os.File   // nil: removed, or not made yet
	users int        // containers that are in it
	names *names     // nil: there is no name server
}

// NewSet makes an empty set. The namespace of the calling thread is where devices appear.
func NewSet(cfg Config) (*Set, error) {
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open the guest's network namespace: %w", fault.Cause(err))
	}
	return &Set{Config: cfg, home: home, identify: permanent, byID: make(map[string]*network), ports: make(map[[4]byte]uint16)}, nil
}

// permanent is the hardware address that a device came with, whatever it has now.
func permanent(l netlink.Link) net.HardwareAddr { return l.Attrs().PermHWAddr }

// Open returns the namespace of a network and counts a container in: the network cannot be removed until
// Release was called as often. The caller closes the file, which it needs no longer than to enter the
// namespace. errdefs.ErrNotFound for an unknown id.
func (s *Set) Open(id string) (*os.File, error) {
	n, err := s.get(id)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.netns == nil {
		return nil, notFound(id)
	}
	netns, err := duplicate(n.netns, id)
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	n.users++
	return netns, nil
}

// Shared tells whether more than one container is in a network: whether there are others for who has called Open.
func (s *Set) Shared(id string) bool {
	n, err := s.get(id)
	if err != nil {
		return false
	}
	_, users := n.state()
	return users > 1
}

func duplicate(netns *os.File, id string) (*os.File, error) {
	fd, err := unix.FcntlInt(netns.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate namespace: %w", err)
	}
	return os.NewFile(uintptr(fd), "network:"+id), nil
}

// Release counts a container out that Open has counted in. Its processes have ended: what they leave
// of devices of their own is nobody's. Unknown ids are ignored.
func (s *Set) Release(id string) {
	n, err := s.get(id)
	if err != nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.users = max(0, n.users-1)
}

// Adopt makes another namespace the network's: that of a container which must own its network
// namespace, as it has a user namespace. The devices move there, and the host's state is made there once more; what
// programs had added to the old namespace is lost. The caller has called Open, and nobody else may have:
// errdefs.ErrFailedPrecondition if other containers are in the network. netns stays the caller's. What
// could not be made is logged. When Adopt fails the network keeps its namespace, but has its devices
// only after the next Apply.
func (s *Set) Adopt(ctx context.Context, id string, netns *os.File) error {
	if err := s.adopt(ctx, id, netns); err != nil {
		return fmt.Errorf("network %s: adopt namespace: %w", id, err)
	}
	return nil
}

func (s *Set) adopt(ctx context.Context, id string, netns *os.File) error {
	n, err := s.get(id)
	if err != nil {
		return err
	}
	if err := n.take(ctx); err != nil {
		return err
	}
	defer n.yield()
	adopted, err := duplicate(netns, id)
	if err != nil {
		return err
	}
	old, users := n.state()
	switch {
	case old == nil:
		err = notFound(id)
	case users > 1:
		err = fault.New(errdefs.ErrFailedPrecondition, "%d other containers are in it", users-1)
	default:
		err = s.refill(ctx, n, old, adopted)
	}
	if err != nil {
		adopted.Close()
		return err
	}
	n.mu.Lock()
	n.netns = adopted
	names := n.names
	n.mu.Unlock()
	if names != nil {
		err = names.move(adopted)
	}
	return errors.Join(err, old.Close())
}

// refill makes what is in one namespace in another.
func (s *Set) refill(ctx context.Context, n *network, from, to *os.File) error {
	if kind, err := unix.IoctlRetInt(int(to.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return fault.New(errdefs.ErrInvalidArgument, "not a network namespace")
	}
	limits := firstLimits()
	if err := inside(to, func() error { return errors.Join(setUp("lo"), setLimits(limits)) }); err != nil {
		return fmt.Errorf("prepare network namespace: %w", err)
	}
	if err := s.evict(from, n.last.devices); err != nil {
		return err
	}
	next, resp, err := s.apply(ctx, to, applied{}, n.last.request)
	if err != nil {
		return err
	}
	n.last = next
	for _, p := range resp.Problems {
		s.Log.Warn("adopt network", "network", n.id, "problem", p)
	}
	return nil
}

// Remove gives a network up; its devices go home. An unknown one is success.
// errdefs.ErrFailedPrecondition while a container is in it.
func (s *Set) Remove(ctx context.Context, id string) error {
	n, err := s.get(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err := n.take(ctx); err != nil {
		return fmt.Errorf("remove network %s: %w", id, err)
	}
	defer n.yield()
	n.mu.Lock()
	netns, users := n.netns, n.users
	if users == 0 {
		n.netns = nil // nobody can come in any more
	}
	n.mu.Unlock()
	if users > 0 {
		return fault.New(errdefs.ErrFailedPrecondition, "remove network %s: %d containers are in it", id, users)
	}
	if netns == nil {
		return nil
	}
	defer netns.Close()
	n.setNames(nil)
	s.mu.Lock()
	delete(s.byID, id)
	s.mu.Unlock()
	// Without that the kernel sends them home as well, but when it gets round to it.
	if err := s.evict(netns, n.last.devices); err != nil {
		s.Log.Warn("remove network", "network", id, "error", err)
	}
	return nil
}

func (s *Set) get(id string) (*network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.byID[id]
	if !ok {
		return nil, notFound(id)
	}
	return n, nil
}

func notFound(id string) error {
	return fault.New(errdefs.ErrNotFound, "network %q does not exist", id)
}

// obtain returns the network with this id, and makes one where there is none.
func (s *Set) obtain(id string) (*network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.byID[id]; ok {
		return n, nil
	}
	if len(s.byID) >= maxNetworks {
		return nil, fault.New(errdefs.ErrResourceExhausted, "there are %d networks already", maxNetworks)
	}
	netns, err := newNamespace()
	if err != nil {
		return nil, fmt.Errorf("network %s: make namespace: %w", id, err)
	}
	n := &network{id: id, turn: make(chan struct{}, 1), netns: netns}
	s.byID[id] = n
	return n, nil
}

// take waits for the caller's turn.
func (n *network) take(ctx context.Context) error {
	select {
	case n.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (n *network) yield() { <-n.turn }

// state returns the namespace, nil if the network was removed, and how many containers are in it.
func (n *network) state() (*os.File, int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.netns, n.users
}

// newNamespace makes a network namespace, whose lo is up.
func newNamespace() (*os.File, error) {
	var file *os.File
	limits := firstLimits()
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return fault.Cause(err)
		}
		if err := errors.Join(setUp("lo"), setLimits(limits)); err != nil {
			file.Close()
			return fmt.Errorf("prepare network namespace: %w", err)
		}
		return nil
	})
	return file, err
}

// inside calls f on a thread that is in a network namespace.
func inside(netns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// onThread calls f on a thread of its own, which ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: nobody else may get the thread
		done <- f()
	}()
	return <-done
}
