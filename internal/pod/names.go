package pod

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	agentv1 "runv/api/agent/v1"
	"runv/internal/agentclient"
	"runv/internal/factory"
	"runv/internal/resolver"
)

// nameServer is where engines let a name server listen in a container's network namespace: Docker does for
// networks that users define, on a port of its own that rules of netfilter turn 53 into.
var nameServer = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 11}), 53)

// HasNameServer tells whether an engine's name server listens in the calling thread's network namespace, from
// where it asks others, too.
func HasNameServer() (bool, error) { return listens(nameServer.Addr()) }

// namesTimeout bounds what it takes to let the guest reach a name server.
const namesTimeout = 10 * time.Second

// names is how the guest reaches the name server of a network. Whoever holds the token in turn may use it.
type names struct {
	turn   chan struct{}
	ended  bool
	served bool
	cancel context.CancelFunc // of the relay, when served
	done   chan struct{}      // closed at its end
}

// serveNames lets the guest reach the name server that listens in the network's namespace, if there is one
// and the guest does not already.
func (p *Pod) serveNames(ctx context.Context, n *podNetwork, vm *factory.VM) error {
	ctx, cancel := context.WithTimeout(ctx, namesTimeout)
	defer cancel()
	select {
	case n.names.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-n.names.turn }()
	if n.names.ended || n.names.served {
		return nil
	}
	there := false
	if err := n.ns.Do(func() (err error) { there, err = HasNameServer(); return err }); err != nil || !there {
		return err
	}
	stream, err := vm.Agent.OpenStream()
	if err != nil {
		return fmt.Errorf("network: serve DNS: %w", err)
	}
	ip := nameServer.Addr().As4()
	if _, err := vm.Agent.Networks.Resolve(ctx, &agentv1.ResolveRequest{Id: n.id, Ip: ip[:], Stream: stream.StreamID()}); err != nil {
		return errors.Join(fmt.Errorf("network: serve DNS: %w", agentclient.Error(err)), stream.Close())
	}
	relayCtx, cancelRelay := context.WithCancel(context.WithoutCancel(ctx))
	n.names.served, n.names.cancel, n.names.done = true, cancelRelay, make(chan struct{})
	go func() {
		defer close(n.names.done)
		resolver.Relay(relayCtx, stream, n.dialNames)
	}()
	return nil
}

// serveNamesLater is serveNames for a network that containers are in already.
func (p *Pod) serveNamesLater(n *podNetwork, vm *factory.VM) {
	if err := p.serveNames(context.Background(), n, vm); err != nil {
		p.log.Error("network has changed", "network", n.id, "err", err)
	}
}

// dialNames connects to the name server.
func (n *podNetwork) dialNames(ctx context.Context, over string) (conn net.Conn, err error) {
	err = n.ns.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, over, nameServer.String())
		return err
	})
	return conn, err
}

// endNames ends what serves the guest's queries.
func (n *podNetwork) endNames() {
	n.names.turn <- struct{}{} // serveNames gives it back within namesTimeout
	defer func() { <-n.names.turn }()
	n.names.ended = true
	if n.names.served {
		n.names.cancel()
		<-n.names.done
	}
}

// listens tells whether a socket for UDP is bound to an address in the calling thread's network namespace.
func listens(ip netip.Addr) (bool, error) {
	f, err := os.Open("/proc/thread-self/net/udp") // proc_pid_net(5)
	if err != nil {
		return false, err
	}
	defer f.Close()
	as4 := ip.As4()
	want := fmt.Sprintf("%08X:", binary.NativeEndian.Uint32(as4[:]))
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 1 && strings.HasPrefix(fields[1], want) {
			return true, nil
		}
	}
	return false, lines.Err()
}

// tellingGuest is the networks of the guest, and tells when one was changed.
type tellingGuest struct {
	agentv1.NetworksService
	changed func()
}

// Apply implements network.Guest.
func (g tellingGuest) Apply(ctx context.Context, r *agentv1.ApplyNetworkRequest) (*agentv1.ApplyNetworkResponse, error) {
	resp, err := g.NetworksService.Apply(ctx, r)
	if err == nil {
		g.changed()
	}
	return resp, err
}
