package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/network"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

// Mirror makes a network of the guest like a network namespace of the host; network.Mirror is one.
type Mirror interface {
	Prepare(ctx context.Context, vm network.VM) error
	Start(ctx context.Context, vm network.VM, guest network.Guest) error
	Close(ctx context.Context) error
}

// podNetwork is a network namespace of the host that containers of the pod live in, and what
// mirrors it in the guest. It belongs to the pod's goroutine, but for what is told otherwise.
type podNetwork struct {
	id     string             // in the guest; immutable
	ns     *network.Namespace // immutable
	mirror Mirror             // immutable
	users  int                // containers
	record network.Record     // what is to be cleaned if this process is killed

	turn  chan struct{} // holds a token while somebody starts it, who may use what follows
	tried bool
	err   error // of the start

	user    io.Closer   // connects it to the host's network; nil: nothing does. Of who has made the network
	created atomic.Bool // a container is in it, so that its namespace in the guest stays the same
	names   names
}

// joinNetwork finds or makes the network of the network namespace that a container's stand-in lives
// in. nil: the container has none of the host's. leaveNetwork undoes it.
func (p *Pod) joinNetwork(ctx context.Context, c *container, b *bundle.Bundle, standIn int) (n *podNetwork, first bool, err error) {
	path, ok := b.NetNS()
	if !ok {
		return nil, false, nil
	}
	ns, err := openNetNS(path, standIn)
	if err != nil {
		return nil, false, fmt.Errorf("network: %w", err)
	}
	if path == "" {
		if err := setLoopbackUp(ns); err != nil {
			return nil, false, fmt.Errorf("network: %w", errors.Join(err, ns.Close()))
		}
	}
	err = p.do(ctx, func() error {
		if p.state == Stopping || p.state == Stopped {
			return errStopping
		}
		for _, known := range p.networks {
			if known.ns.ID() == ns.ID() {
				n = known
			}
		}
		if first = n == nil; first {
			p.lastNet++
			n = &podNetwork{id: fmt.Sprintf("net%d", p.lastNet), ns: ns, turn: make(chan struct{}, 1), names: names{turn: make(chan struct{}, 1)}}
			n.mirror = p.cfg.Mirror(n.id, ns, p.record.VCPUs, func(r network.Record) error { return p.saveNetwork(n, r) })
			p.networks = append(p.networks, n)
		}
		n.users++
		c.network = n
		c.record.NetNS = state.NetNS{Path: path, Dev: ns.ID().Dev, Ino: ns.ID().Ino}
		return nil
	})
	if err != nil || !first {
		err = errors.Join(err, ns.Close())
	}
	return n, first, err
}

// setLoopbackUp sets lo up in a new network namespace, as runc does: hooks and what they start count on it.
func setLoopbackUp(ns *network.Namespace) error {
	h, err := ns.Handle()
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// openNetNS opens the network namespace of a stand-in, by the specification's path if that leads to it:
// whoever cleans up after this process finds it there even when the stand-in has gone.
func openNetNS(path string, standIn int) (*network.Namespace, error) {
	ns, err := network.Open(fmt.Sprintf("/proc/%d/ns/net", standIn))
	if err != nil || path == "" {
		return ns, err
	}
	named, err := network.Open(path)
	if err != nil {
		return ns, nil //nolint:nilerr // the path is only for later
	}
	if named.ID() != ns.ID() {
		return ns, named.Close()
	}
	return named, ns.Close()
}

// saveNetwork records what a mirror is about to do.
func (p *Pod) saveNetwork(n *podNetwork, r network.Record) error {
	return p.do(context.Background(), func() error {
		n.record = r
		p.record.Networks = nil
		p.leaving = slices.DeleteFunc(p.leaving, func(l *podNetwork) bool { return len(l.record.Links) == 0 })
		for _, known := range slices.Concat(p.networks, p.leaving) {
			if len(known.record.Links) > 0 {
				p.record.Networks = append(p.record.Networks, known.record)
			}
		}
		return p.cfg.Recorder.SavePod(p.record)
	})
}

// A container asks with this annotation for a network like the host's, when its network namespace is new and no hook has
// put an interface into it. It must ask, for an engine's container without a network looks the same.
const (
	networkAnnotation = "dev.runv.network"
	userNetwork       = "user"
)

// connectUser connects a container's new network namespace if the container asks for that.
func (p *Pod) connectUser(ctx context.Context, n *podNetwork, b *bundle.Bundle) error {
	asked, ok := b.Spec.Annotations[networkAnnotation]
	invalid := func(why string) error {
		return rpcerror.New(errdefs.ErrInvalidArgument, fmt.Sprintf("annotations[%s]: %s", networkAnnotation, why))
	}
	switch path, _ := b.NetNS(); {
	case !ok:
		return nil
	case asked != userNetwork:
		return invalid(fmt.Sprintf("%.64q is not %q", asked, userNetwork))
	case path != "":
		return invalid("the container has a network namespace of somebody else's")
	case p.cfg.UserNetwork == nil:
		return invalid("no pasta is configured")
	}
	alone, err := n.ns.Alone()
	if err != nil {
		return err
	}
	if !alone {
		return invalid("a hook has given the container a network")
	}
	user, err := p.cfg.UserNetwork(ctx, n.ns)
	if err != nil {
		return err
	}
	// Whoever closes the network must see it: on the pod's goroutine, unless it was closed meanwhile.
	err = p.do(context.WithoutCancel(ctx), func() error {
		if !slices.Contains(p.networks, n) {
			return errStopping
		}
		n.user = user
		return nil
	})
	if err != nil {
		return errors.Join(err, user.Close())
	}
	return nil
}

// startNetwork makes the guest have a network, once; who comes later waits for that.
func (p *Pod) startNetwork(ctx context.Context, n *podNetwork, vm *factory.VM) error {
	select {
	case n.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-n.turn }()
	if !n.tried {
		n.tried = true
		n.err = n.mirror.Start(ctx, vm, tellingGuest{vm.Agent.Networks, func() {
			if n.created.Load() { // a name server may have come with an interface
				go p.serveNamesLater(n, vm)
			}
		}})
	}
	return n.err
}

// leaveNetwork ends a container's use of its network, and with the last one the network.
func (p *Pod) leaveNetwork(c *container) {
	var last *podNetwork
	err := p.do(context.Background(), func() error {
		n := c.network
		if c.network = nil; n == nil {
			return nil
		}
		if n.users--; n.users == 0 && p.dropNetwork(n) {
			last = n
		}
		return nil
	})
	if err == nil && last != nil {
		p.closeNetwork(last)
	}
}

// dropNetwork takes a network out of the pod, and tells whether it was there: the pod's end takes all. On
// the pod's goroutine.
func (p *Pod) dropNetwork(n *podNetwork) bool {
	p.dropPhases(n.id)
	i := slices.Index(p.networks, n)
	if i >= 0 {
		p.networks = slices.Delete(p.networks, i, i+1)
		p.leaving = append(p.leaving, n)
	}
	return i >= 0
}

// closeNetwork takes down what mirrors a network that was dropped.
func (p *Pod) closeNetwork(n *podNetwork) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := n.mirror.Close(ctx)
	n.endNames()
	if n.user != nil {
		err = errors.Join(err, n.user.Close())
	}
	err = errors.Join(err, n.ns.Close())
	if err != nil {
		p.log.Error("close network", "network", n.id, "err", err) // its record is on disk
		return
	}
	_ = p.saveNetwork(n, network.Record{})
}

// closeNetworks takes all down when the VM has ended.
func (p *Pod) closeNetworks() {
	var all []*podNetwork
	_ = p.do(context.Background(), func() error {
		all, p.networks = p.networks, nil
		p.leaving = append(p.leaving, all...)
		return nil
	})
	for _, n := range all {
		p.closeNetwork(n)
	}
}
