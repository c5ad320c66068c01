package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"google.golang.org/protobuf/proto"

	agentv1 "runv/api/agent/v1"
	"runv/internal/hypervisor"
)

const (
	// quiet is how long nothing must have changed before a sync, which no change delays by more than patience.
	quiet    = 20 * time.Millisecond
	patience = 200 * time.Millisecond
	// After a sync that failed the next one waits, longer each time.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 10 * time.Second
	// rounds is how often interfaces may vanish under Start's hands before it gives up.
	rounds = 10
	// What the VMM and the guest may take for one card.
	plugTimeout   = 30 * time.Second
	unplugTimeout = 10 * time.Second
	// closeTimeout bounds Close.
	closeTimeout = 30 * time.Second
)

// VM is what a Mirror needs of a hypervisor.VM.
type VM interface {
	Attach(ctx context.Context, dev hypervisor.Device) error
	Detach(ctx context.Context, id string) error
}

// Guest is what a Mirror needs of the agent; agentv1.NetworksService has it.
type Guest interface {
	Apply(ctx context.Context, r *agentv1.ApplyNetworkRequest) (*agentv1.ApplyNetworkResponse, error)
	Remove(ctx context.Context, r *agentv1.RemoveNetworkRequest) (*agentv1.RemoveNetworkResponse, error)
}

// Config says what a Mirror mirrors.
type Config struct {
	// ID is the network's in the guest: [a-z0-9-], at most 32 bytes.
	ID string
	// Namespace stays the caller's, who closes it after Close.
	Namespace *Namespace
	// Queues is how many pairs of queues each network card has: the VM's vCPUs; at least 1, and more than 8
	// are 8.
	Queues int
	// HostPorts tells whether processes in the namespace on the host are clients of others, such as
	// Docker's name server, which asks them. It is called in the namespace, at each sync until it says so: from then on
	// the ports from 65024 on are the namespace's kernel's on all interfaces, which chooses among them. Packets
	// to these ports never come to the guest, whose kernel does not choose them. ICMP and later fragments
	// go to the guest. nil: never.
	HostPorts func() (bool, error)
	// Save keeps a record for Clean, before anything is done that it tells of. It is called again when there
	// are more interfaces. An error keeps them from being mirrored.
	Save func(Record) error
	Log  *slog.Logger
}

// Mirror mirrors a network namespace into a VM. New makes one that does nothing; then
//
//	m.Prepare(ctx, vm)     // optional: what can be done without the guest, while it boots
//	m.Start(ctx, vm, guest) // all is in the guest when it returns; changes are followed from then on
//	m.Sync(ctx)            // what was changed before this call is in the guest when it returns
//	m.Close(ctx)           // whatever happened before
//
// Its methods are safe for concurrent use. What goes wrong after Start is logged, and tried again: it
// ends nothing.
type Mirror struct {
	cfg Config

	closing   chan struct{} // closed when Close was called
	closeOnce sync.Once
	requests  chan chan error // of Sync to the goroutine
	followed  chan struct{}   // closed when that has ended; nil: there is none
	unplugs   sync.WaitGroup  // goroutines that unplug; one begins in somebody's turn only

	turn chan struct{} // holds a token while somebody uses what stands below
	done bool          // by Close
	vm   VM
	// guest is nil before Start.
	guest   Guest
	kernel  *kernel
	events  *events
	members *os.File // a packet socket that wants all multicasts of the interfaces
	sysctls *sysctls
	ports   map[int]*port // by index of the interface
	leaving []*port       // whose interface has gone, while their card may still be there
	record  Record
	// hostPorts is what Config.HostPorts has said.
	hostPorts bool
	applied   *agentv1.ApplyNetworkRequest // nil: who knows
	problems  map[string]bool              // that were logged
}

// New makes a Mirror.
func New(cfg Config) *Mirror {
	return &Mirror{
		cfg:      cfg,
		closing:  make(chan struct{}),
		requests: make(chan chan error),
		turn:     make(chan struct{}, 1),
		ports:    make(map[int]*port),
		record:   Record{Path: cfg.Namespace.Path(), Namespace: cfg.Namespace.ID()},
	}
}

// Prepare looks at the namespace and makes taps and redirections: from then on what arrives there is for the
// guest, and waits for it. It plugs them into vm, whose guest may still boot; nil: there is no VM yet. Errors name the
// interface and the step; the caller calls Close then. errdefs.ErrAlreadyExists when another VM mirrors the
// namespace.
func (m *Mirror) Prepare(ctx context.Context, vm VM) error {
	ctx, end, err := m.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	m.vm = vm
	return m.settle(ctx)
}

// Start makes the guest have all that the namespace has, and follows changes until Close. vm must live and guest
// must answer. Errors name the interface and the step; the caller calls Close then. It is called once.
func (m *Mirror) Start(ctx context.Context, vm VM, guest Guest) error {
	work, end, err := m.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if m.guest != nil {
		return kindOf(errdefs.ErrFailedPrecondition, errors.New("network: started already"))
	}
	m.vm, m.guest = vm, guest
	if err := m.settle(work); err != nil {
		return err
	}
	m.followed = make(chan struct{})
	go m.follow(context.WithoutCancel(ctx), m.followed)
	return nil
}

// Sync makes the guest have what the namespace has now, and waits for that. errdefs.ErrFailedPrecondition before
// Start and after Close.
func (m *Mirror) Sync(ctx context.Context) error {
	_, end, err := m.begin(ctx)
	if err != nil {
		return err
	}
	started := m.followed != nil
	end()
	if !started {
		return kindOf(errdefs.ErrFailedPrecondition, errors.New("network: not started"))
	}
	result := make(chan error, 1)
	for request := m.requests; ; {
		select {
		case request <- result:
			request = nil
		case err := <-result:
			return err
		case <-m.closing:
			return errClosed()
		case <-ctx.Done():
			return fmt.Errorf("network: sync: %w", context.Cause(ctx))
		}
	}
}

func errClosed() error {
	return kindOf(errdefs.ErrFailedPrecondition, errors.New("network: closed"))
}

// begin waits for the caller's turn. ctx ends with Close, too.
func (m *Mirror) begin(ctx context.Context) (work context.Context, end func(), err error) {
	select {
	case <-m.closing:
		return nil, nil, errClosed()
	default:
	}
	select {
	case m.turn <- struct{}{}:
	case <-m.closing:
		return nil, nil, errClosed()
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("network: %w", context.Cause(ctx))
	}
	select {
	case <-m.closing: // Close waits for those only that have begun before
		<-m.turn
		return nil, nil, errClosed()
	default:
	}
	work, cancel := m.untilClosed(ctx)
	return work, func() { cancel(); <-m.turn }, nil
}

func (m *Mirror) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	work, cancel := context.WithCancelCause(ctx)
	stop := make(chan struct{})
	go func() {
		select {
		case <-m.closing:
			cancel(errClosed())
		case <-stop:
		}
	}()
	return work, func() { close(stop); cancel(nil) }
}

// settle syncs until nothing has vanished meanwhile.
func (m *Mirror) settle(ctx context.Context) error {
	for round := 1; ; round++ {
		again, err := m.sync(ctx)
		if err != nil || !again {
			return err
		}
		if round == rounds {
			return errors.New("network: interfaces come and go without end")
		}
	}
}

// listen makes what all of it needs, the events first: what changes after that is not missed.
func (m *Mirror) listen() (err error) {
	if m.events == nil {
		if m.events, err = subscribe(m.cfg.Namespace); err != nil {
			return fmt.Errorf("network: listen to netlink: %w", err)
		}
	}
	if m.kernel == nil {
		if m.kernel, err = dial(m.cfg.Namespace); err != nil {
			return fmt.Errorf("network: open netlink: %w", err)
		}
	}
	if m.members == nil {
		if m.members, err = openMembers(m.cfg.Namespace); err != nil {
			return fmt.Errorf("network: open packet socket: %w", err)
		}
	}
	if m.sysctls == nil {
		if m.sysctls, err = newSysctls(); err != nil {
			return fmt.Errorf("network: read the defaults of kernel parameters: %w", err)
		}
	}
	return nil
}

// sync makes everything what a scan of the namespace says. What fails for one interface does not keep
// the others from being mirrored. again tells that an interface has vanished in the middle, so that its failure is
// none, and that there may be more to do. The caller has the turn.
func (m *Mirror) sync(ctx context.Context) (again bool, err error) {
	if err := m.listen(); err != nil {
		return false, err
	}
	if err := m.askHostPorts(); err != nil {
		return false, fmt.Errorf("network: look for clients: %w", err)
	}
	snapshot, err := m.scan()
	if err != nil {
		return false, fmt.Errorf("network: %w", err)
	}
	if err := m.alone(snapshot); err != nil {
		return false, err
	}
	problems := make(map[string]bool)
	links := mirrored(snapshot, problems)
	m.dismiss(snapshot, links)
	if err := m.save(links); err != nil {
		return false, fmt.Errorf("network: save record: %w", err)
	}
	if m.record.PortRange != "" {
		if err := reserve(m.cfg.Namespace); err != nil {
			return false, fmt.Errorf("network: %w", err)
		}
	}
	var errs []error
	for _, l := range links {
		if err := m.connect(ctx, snapshot, l); err != nil {
			a := l.Attrs()
			if m.changed(l) {
				again = true
				continue
			}
			errs = append(errs, fmt.Errorf("network: %s: %w", a.Name, err))
			if ctx.Err() != nil {
				break
			}
		}
	}
	if m.guest != nil {
		if err := m.apply(ctx, snapshot, problems); err != nil {
			errs = append(errs, err)
		}
	}
	m.events.watch(snapshot.neighbours)
	m.dispose(ctx)
	m.report(problems)
	return again, errors.Join(errs...)
}

// changed tells whether an interface, or its tap, is not any more what it was in the scan.
func (m *Mirror) changed(l netlink.Link) bool {
	a := l.Attrs()
	if now, err := m.kernel.LinkByIndex(a.Index); err != nil || now.Attrs().Name != a.Name {
		return true
	}
	p := m.ports[a.Index]
	if p == nil {
		return false
	}
	_, err := m.kernel.LinkByIndex(p.tap)
	return err != nil
}

// askHostPorts asks whether the namespace needs ports, until it does.
func (m *Mirror) askHostPorts() error {
	if m.hostPorts || m.cfg.HostPorts == nil {
		return nil
	}
	return m.cfg.Namespace.Do(func() (err error) {
		m.hostPorts, err = m.cfg.HostPorts()
		return err
	})
}

func (m *Mirror) scan() (*snapshot, error) {
	s, err := m.kernel.scan()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, l := range s.links {
		if ok, _ := s.carries(l); ok {
			names = append(names, l.Attrs().Name)
		}
	}
	err = m.cfg.Namespace.Do(func() error {
		s.sysctls = m.sysctls.read(names)
		return nil
	})
	if m.hostPorts && err == nil {
		reserved(s.sysctls)
	}
	m.sysctls.forget(names)
	m.sysctls.tell(s.sysctls)
	return s, err
}

// mirrored are the interfaces that the guest gets.
func mirrored(s *snapshot, problems map[string]bool) []netlink.Link {
	var links []netlink.Link
	for _, l := range s.links {
		if ok, _ := s.carries(l); !ok {
			continue
		}
		if len(links) == maxInterfaces-1 { // lo may be one of them
			problems[fmt.Sprintf("there are more than %d interfaces", len(links))] = true
			break
		}
		links = append(links, l)
	}
	return links
}

// dismiss gives up the ports whose interface, or tap, has gone.
func (m *Mirror) dismiss(s *snapshot, links []netlink.Link) {
	for index, p := range m.ports {
		there := slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Index == index })
		if there && s.link(p.tap) != nil {
			continue
		}
		delete(m.ports, index)
		m.leaving = append(m.leaving, p)
		// At once, for the interface may be there and get another. The tap stays until the VMM has let go of it,
		// which would be told of a lost tap all the time.
		if err := p.disconnect(m.kernel); err != nil {
			m.cfg.Log.Warn("disconnect interface", "network", m.cfg.ID, "interface", p.name, "error", err)
		}
	}
}

// alone refuses a namespace in which another mirror is at work, before anything was touched.
func (m *Mirror) alone(s *snapshot) error {
	if len(m.record.Links) > 0 {
		return nil
	}
	for _, l := range s.links {
		if isTap(l) {
			return kindOf(errdefs.ErrAlreadyExists, fmt.Errorf("network: another VM mirrors this namespace: there is %s", l.Attrs().Name))
		}
	}
	return nil
}

// connect makes an interface's port, or checks it, and plugs it.
func (m *Mirror) connect(ctx context.Context, s *snapshot, l netlink.Link) error {
	a := l.Attrs()
	p := m.ports[a.Index]
	if p == nil {
		p = &port{index: a.Index, name: a.Name, mac: newMAC(), made: !slices.Contains(m.record.Shared, a.Index)}
		if err := join(m.members, a.Index); err != nil {
			return fmt.Errorf("ask for multicasts: %w", err)
		}
		if err := p.open(m.cfg.Namespace, m.kernel, a.MTU, min(max(m.cfg.Queues, 1), maxQueues), fromInterface(m.hostPorts)); err != nil {
			return err
		}
		m.ports[a.Index] = p
	} else if err := p.check(m.kernel, s.link(p.tap), a.MTU, fromInterface(m.hostPorts)); err != nil {
		return err
	}
	p.name = a.Name
	if m.vm == nil || p.attached {
		return nil
	}
	nic := p.nic()
	defer closeAll(nic.VhostNet)
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	if err := m.vm.Attach(ctx, nic); err != nil {
		return fmt.Errorf("attach NIC: %w", err)
	}
	p.attached = true
	closeAll(p.taps) // the VMM's now, whose end is theirs
	p.taps = nil
	return nil
}

// apply tells the guest, if it does not know yet.
func (m *Mirror) apply(ctx context.Context, s *snapshot, problems map[string]bool) error {
	devices := make(map[int]net.HardwareAddr)
	for index, p := range m.ports {
		if p.attached {
			devices[index] = p.mac
		}
	}
	request, unmirrored := s.request(m.cfg.ID, devices)
	maps.Copy(problems, unmirrored)
	if m.applied != nil && proto.Equal(m.applied, request) {
		for p := range m.problems { // what the guest said is still so
			if strings.HasPrefix(p, guestSays) {
				problems[p] = true
			}
		}
		return nil
	}
	m.applied = nil
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	answer, err := m.guest.Apply(ctx, request)
	if err != nil {
		return fmt.Errorf("network: tell the guest: %w", err)
	}
	for i, p := range answer.GetProblems() {
		if i == maxProblems {
			break
		}
		problems[guestSays+printable(p)] = true
	}
	var errs []error
	for _, i := range request.Interfaces {
		if slices.Contains(answer.GetMissing(), i.Name) {
			errs = append(errs, fmt.Errorf("network: %s: the guest has no such device", i.Name))
		}
	}
	if len(errs) == 0 {
		m.applied = request
	}
	return errors.Join(errs...)
}

const (
	guestSays   = "guest: "
	maxProblems = 32  // of the guest's in one answer
	maxText     = 256 // bytes of one of them
)

// printable makes a text of the guest's fit for a log.
func printable(s string) string {
	s = strings.ToValidUTF8(s[:min(len(s), maxText)], "?")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}

// dispose has the cards unplugged whose interface has gone. What that takes is up to the guest, which does not keep
// others from being mirrored.
func (m *Mirror) dispose(ctx context.Context) {
	for _, p := range slices.Clone(m.leaving) {
		switch {
		case !p.attached:
			m.discard(p)
		case !p.unplugging:
			p.unplugging = true
			m.unplugs.Add(1)
			go m.unplugLater(context.WithoutCancel(ctx), p)
		}
	}
}

// discard forgets a port that has no card any more.
func (m *Mirror) discard(p *port) {
	if err := p.close(m.kernel); err != nil {
		m.cfg.Log.Warn("remove tap", "network", m.cfg.ID, "interface", p.name, "error", err)
		return // the next sync tries again
	}
	m.leaving = slices.DeleteFunc(m.leaving, func(other *port) bool { return other == p })
}

// unplugLater unplugs a card, however often that must be tried.
func (m *Mirror) unplugLater(ctx context.Context, p *port) {
	defer m.unplugs.Done()
	ctx, cancel := m.untilClosed(ctx)
	defer cancel()
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := m.unplug(ctx, p)
		if err == nil {
			break
		}
		if ctx.Err() == nil && wait == firstRetry {
			m.cfg.Log.Warn("mirror network", "network", m.cfg.ID, "error", err)
		}
		select {
		case <-m.closing:
			return
		case <-time.After(wait):
		}
	}
	_, end, err := m.begin(ctx)
	if err != nil {
		return // Close does the rest
	}
	defer end()
	p.attached = false
	m.discard(p)
}

// unplug takes a port's card from the VM. A VM that has ended has none.
func (m *Mirror) unplug(ctx context.Context, p *port) error {
	ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
	defer cancel()
	err := m.vm.Detach(ctx, p.card())
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("network: %s: detach NIC: %w", p.name, err)
	}
	return nil
}

// report logs the problems that are new.
func (m *Mirror) report(problems map[string]bool) {
	for _, p := range slices.Sorted(maps.Keys(problems)) {
		if !m.problems[p] {
			m.cfg.Log.Warn("mirror network", "network", m.cfg.ID, "problem", p)
		}
	}
	m.problems = problems
}

// follow syncs after changes and when Sync asks for it, until Close.
func (m *Mirror) follow(ctx context.Context, followed chan<- struct{}) {
	defer close(followed)
	ctx, cancel := m.untilClosed(ctx)
	defer cancel()
	var (
		changed <-chan struct{}  // something in the namespace
		broken  <-chan struct{}  // nobody tells of changes any more
		settled <-chan time.Time // nothing has changed for a while
		latest  <-chan time.Time // however much changes
		retry   <-chan time.Time
		wait    = firstRetry
		last    string // error that was logged
	)
	listen := func(e *events) {
		changed, broken = nil, nil
		if e != nil {
			changed, broken = e.C, e.failed
		}
	}
	listen(m.events) // nobody else uses it before Close
	for {
		var asked chan error
		select {
		case <-m.closing:
			return
		case <-changed:
			settled = time.After(quiet)
			if latest == nil {
				latest = time.After(patience)
			}
			continue
		case <-broken:
		case <-settled:
		case <-latest:
		case <-retry:
		case asked = <-m.requests:
		}
		settled, latest, retry = nil, nil, nil
		e, err := m.resync(ctx)
		listen(e)
		if asked != nil {
			asked <- err
		}
		if err == nil {
			if last != "" {
				m.cfg.Log.Info("mirror network: all is well again", "network", m.cfg.ID)
			}
			wait, last = firstRetry, ""
			continue
		}
		if text := err.Error(); text != last && ctx.Err() == nil {
			level := slog.LevelError
			if errdefs.IsFailedPrecondition(err) {
				level = slog.LevelDebug // the VM has ended, of which others tell
			}
			m.cfg.Log.Log(ctx, level, "mirror network", "network", m.cfg.ID, "error", err)
			last = text
		}
		retry = time.After(wait)
		wait = min(2*wait, lastRetry)
	}
}

// resync is settle in the following goroutine's turn. It listens anew where that has failed, and returns where
// changes are told from now on.
func (m *Mirror) resync(ctx context.Context) (*events, error) {
	work, end, err := m.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if m.events != nil {
		select {
		case <-m.events.failed:
			m.events.close()
			m.events = nil
		default:
		}
	}
	err = m.settle(work)
	return m.events, err
}

// Close ends the mirroring: the guest gives the network up, its cards are unplugged, and nothing of ours is left in the
// namespace. It works on whatever Prepare and Start have left, and without a VM, too; it waits for 30 seconds at most,
// for the guest to let go. What is left after an error may be tried again; after success Close does nothing.
func (m *Mirror) Close(ctx context.Context) error {
	m.closeOnce.Do(func() { close(m.closing) })
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	// Those that are at work have been told to stop, and netlink is bounded.
	m.turn <- struct{}{}
	followed := m.followed
	<-m.turn
	if followed != nil {
		<-followed
	}
	m.unplugs.Wait()
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	if m.done {
		return nil
	}
	return m.close(ctx)
}

func (m *Mirror) close(ctx context.Context) error {
	var errs []error
	if m.events != nil {
		m.events.close()
		m.events = nil
	}
	if m.members != nil {
		m.members.Close()
		m.members = nil
	}
	for index, p := range m.ports {
		m.leaving = append(m.leaving, p)
		delete(m.ports, index)
	}
	for _, p := range m.leaving {
		// First of all, whatever the VM does about it.
		if err := p.disconnect(m.kernel); err != nil {
			errs = append(errs, fmt.Errorf("network: %s: %w", p.name, err))
		}
	}
	if m.guest != nil {
		work, cancel := context.WithTimeout(ctx, unplugTimeout)
		_, err := m.guest.Remove(work, &agentv1.RemoveNetworkRequest{Id: m.cfg.ID})
		cancel()
		if err != nil {
			// The guest may be gone; its cards are unplugged, or gone with it.
			m.cfg.Log.Debug("remove network", "network", m.cfg.ID, "error", err)
		}
	}
	if m.record.PortRange != "" {
		if err := unreserve(m.cfg.Namespace, m.record.PortRange); err != nil {
			errs = append(errs, fmt.Errorf("network: %w", err))
		}
	}
	errs = append(errs, m.unplugAll(ctx))
	for _, p := range slices.Clone(m.leaving) {
		// A guest that does not let go may keep its card, but nothing is at the other end.
		if err := p.close(m.kernel); err != nil {
			errs = append(errs, fmt.Errorf("network: %s: %w", p.name, err))
		} else if !p.attached {
			m.discard(p)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if m.kernel != nil {
		m.kernel.close()
		m.kernel = nil
	}
	m.done = true
	return nil
}

// unplugAll unplugs all cards at the same time.
func (m *Mirror) unplugAll(ctx context.Context) error {
	errs := make([]error, len(m.leaving))
	var all sync.WaitGroup
	for i, p := range m.leaving {
		if p.attached {
			all.Go(func() { errs[i] = m.unplug(ctx, p) })
		}
	}
	all.Wait()
	for i, p := range m.leaving {
		p.attached = p.attached && errs[i] != nil
	}
	return errors.Join(errs...)
}
