package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

const (
	deviceTimeout = 10 * time.Second // for devices on their way
	socketTimeout = 10 * time.Second // for the kernel to answer
	maxProblems   = 64
	maxProblem    = 256 // bytes

	// tempName is what devices are called between two names.
	tempName = "_runv%d"
)

// applied is what the host said last of a network and what that has made.
type applied struct {
	request *agentv1.ApplyNetworkRequest
	devices map[string]int    // index in the network's namespace by the address that it was plugged with
	entries []entry           // in the order in which they were made
	sysctls map[string]string // what the parameters were before
}

// Apply makes a network what the request says, as the API tells. Errors: errdefs.ErrInvalidArgument, and what
// keeps the guest from having the network at all.
func (s *Set) Apply(ctx context.Context, r *agentv1.ApplyNetworkRequest) (*agentv1.ApplyNetworkResponse, error) {
	if err := validate(r); err != nil {
		return nil, err
	}
	resp, err := s.applyTo(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", r.Id, err)
	}
	return resp, nil
}

func (s *Set) applyTo(ctx context.Context, r *agentv1.ApplyNetworkRequest) (*agentv1.ApplyNetworkResponse, error) {
	for {
		n, err := s.obtain(r.Id)
		if err != nil {
			return nil, err
		}
		if err := n.take(ctx); err != nil {
			return nil, err
		}
		netns, _ := n.state()
		if netns == nil { // removed while we waited
			n.yield()
			continue
		}
		defer n.yield()
		next, resp, err := s.apply(ctx, netns, n.last, r)
		if err != nil {
			return nil, err
		}
		n.last = next
		return resp, nil
	}
}

// work is one application of a request.
type work struct {
	set    *Set
	log    problems
	want   *agentv1.ApplyNetworkRequest
	netns  *os.File
	home   *conn
	inside *conn

	devices map[string]int  // as in applied
	indexes map[string]int  // by the name that the request has for it
	gone    map[int]bool    // devices that have vanished meanwhile
	absent  map[string]bool // interfaces that have no device
}

// problems collects what could not be applied.
type problems struct {
	texts []string
	more  int
}

func (p *problems) add(format string, args ...any) {
	if len(p.texts) == maxProblems {
		p.more++
		return
	}
	t := strings.ToValidUTF8(strings.Join(strings.Fields(fmt.Sprintf(format, args...)), " "), "?")
	p.texts = append(p.texts, t[:min(len(t), maxProblem)])
}

func (p *problems) all() []string {
	if p.more > 0 {
		return append(p.texts, fmt.Sprintf("and %d more", p.more))
	}
	return p.texts
}

// apply makes a namespace, in which last was applied, what a request says; nil stands for nothing at all.
func (s *Set) apply(ctx context.Context, netns *os.File, last applied, r *agentv1.ApplyNetworkRequest) (applied, *agentv1.ApplyNetworkResponse, error) {
	w := &work{
		set: s, want: r, netns: netns, devices: map[string]int{}, indexes: map[string]int{"lo": loIndex},
		gone: map[int]bool{}, absent: map[string]bool{},
	}
	var err error
	if w.home, err = dial(s.home); err != nil {
		return last, nil, err
	}
	defer w.home.close()
	if w.inside, err = dial(netns); err != nil {
		return last, nil, err
	}
	defer w.inside.close()
	if err := w.find(ctx); err != nil {
		return last, nil, err
	}
	for mac, index := range last.devices {
		if _, ok := w.devices[mac]; !ok {
			w.sendHome(index)
		}
	}
	next := applied{request: r, devices: w.devices}
	entries := w.plan()
	kept := w.clear(last.entries, entries)
	w.name()
	for _, f := range r.GetInterfaces() {
		w.prepare(f)
	}
	next.sysctls = w.setSysctls(last.sysctls)
	for _, f := range r.GetInterfaces() {
		w.setUp(f)
	}
	next.entries = w.make(kept, entries)
	return next, &agentv1.ApplyNetworkResponse{Problems: w.log.all(), Missing: w.missing()}, nil
}

// missing names the interfaces that have no device.
func (w *work) missing() (names []string) {
	for _, f := range w.want.GetInterfaces() {
		if w.absent[f.Name] || w.gone[w.indexes[f.Name]] {
			names = append(names, f.Name)
		}
	}
	return names
}

// loIndex is the index that lo has in every namespace.
const loIndex = 1

// find waits for the devices that are wanted, and moves those into the network that are not there. Those
// that do not come are problems.
func (w *work) find(ctx context.Context) error {
	wanted := map[string]*agentv1.Interface{}
	for _, f := range w.want.GetInterfaces() {
		if len(f.DeviceMac) > 0 {
			wanted[string(f.DeviceMac)] = f
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	if w.set.Driver != nil {
		if err := w.set.Driver(ctx); err != nil {
			w.log.add("load the driver of network devices: %v", err)
		}
	}
	if err := w.note(wanted); err != nil {
		return err
	}
	came, err := w.fetch(wanted)
	if err != nil {
		return err
	}
	if len(w.devices)+came < len(wanted) {
		if came, err = w.await(ctx, wanted, came); err != nil {
			return err
		}
	}
	if came > 0 { // a move may have changed their indexes
		if err := w.note(wanted); err != nil {
			return err
		}
	}
	for mac, f := range wanted {
		if _, ok := w.devices[mac]; !ok {
			w.absent[f.Name] = true
			w.log.add("%s: wait for device %s: it has not appeared", f.Name, net.HardwareAddr(f.DeviceMac))
		}
	}
	return nil
}

// note notes the wanted devices that the network has.
func (w *work) note(wanted map[string]*agentv1.Interface) error {
	links, err := w.inside.links()
	if err != nil {
		return err
	}
	for _, l := range links {
		mac := string(w.set.identify(l))
		if f, ok := wanted[mac]; ok {
			w.devices[mac] = l.Attrs().Index
			w.indexes[f.Name] = l.Attrs().Index
		}
	}
	return nil
}

// fetch moves wanted devices from home into the network, and returns how many came.
func (w *work) fetch(wanted map[string]*agentv1.Interface) (came int, err error) {
	links, err := w.home.links()
	if err != nil {
		return 0, err
	}
	for _, l := range links {
		f, ok := wanted[string(w.set.identify(l))]
		if !ok {
			continue
		}
		index := l.Attrs().Index
		err := w.home.move(index, w.netns, f.Name)
		if errors.Is(err, unix.EEXIST) {
			err = w.home.move(index, w.netns, tempName)
			if errors.Is(err, unix.ENODEV) {
				err = nil // it had moved already, and kept its name
			}
		}
		if err != nil {
			w.log.add("%s: move device into the network: %v", f.Name, err)
			continue
		}
		came++
	}
	return came, nil
}

// await fetches wanted devices as they appear at home.
func (w *work) await(ctx context.Context, wanted map[string]*agentv1.Interface, came int) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, deviceTimeout)
	defer cancel()
	news, err := watchLinks(w.set.home)
	if err != nil {
		return came, err
	}
	defer news.Close()
	for {
		more, err := w.fetch(wanted) // what came before we watched counts, too
		if err != nil {
			return came, err
		}
		came += more
		if len(w.devices)+came >= len(wanted) || !news.wait(ctx) {
			return came, nil
		}
	}
}

// sendHome gives a device back.
func (w *work) sendHome(index int) {
	if err := w.inside.sendHome(index, w.set.home); err != nil {
		w.log.add("device %d: move out of the network: %v", index, err)
	}
}

func (c *conn) sendHome(index int, home *os.File) error {
	err := c.move(index, home, tempName)
	if errors.Is(err, unix.ENODEV) {
		return nil // unplugged
	}
	return err
}

// evict sends devices of a namespace home.
func (s *Set) evict(netns *os.File, devices map[string]int) error {
	if len(devices) == 0 {
		return nil
	}
	c, err := dial(netns)
	if err != nil {
		return err
	}
	defer c.close()
	var errs []error
	for _, index := range devices {
		if err := c.sendHome(index, s.home); err != nil {
			errs = append(errs, fmt.Errorf("move device %d out: %w", index, err))
		}
	}
	return errors.Join(errs...)
}

// plan makes the list of what the network shall have, in the order in which it can be made.
func (w *work) plan() []entry {
	var all []entry
	for _, f := range w.want.GetInterfaces() {
		if index, ok := w.indexes[f.Name]; ok {
			for _, a := range f.Addresses {
				all = append(all, addressEntry(f.Name, index, a))
			}
		}
	}
	missing := func(what, name string) {
		if !w.absent[name] { // that has been told
			w.log.add("%s: there is no interface %s", what, name)
		}
	}
	for _, n := range w.want.GetNeighbours() {
		if index, ok := w.indexes[n.Interface]; ok {
			all = append(all, neighbourEntry(n, index))
		} else {
			missing("neighbour "+text(n.Ip), n.Interface)
		}
	}
	for _, r := range w.want.GetRoutes() {
		if e, name := routeEntry(r, w.indexes); name == "" {
			all = append(all, e)
		} else {
			missing(e.what, name)
		}
	}
	for _, r := range w.want.GetRules() {
		all = append(all, ruleEntry(r))
	}
	return all
}

// clear takes away what was made and is not wanted any more, the last first, and returns the rest.
func (w *work) clear(made, wanted []entry) (kept []entry) {
	bySlot := map[string]*entry{}
	for i := range wanted {
		bySlot[wanted[i].slot] = &wanted[i]
	}
	for _, e := range slices.Backward(made) {
		next := bySlot[e.slot]
		if next != nil && (!e.fixed || string(next.body) == string(e.body)) {
			kept = append(kept, e)
			continue
		}
		err := w.inside.request(e.kind+1, 0, e.body)
		if err != nil && !isGone(err) {
			w.log.add("%s: remove: %v", e.what, err)
		}
	}
	slices.Reverse(kept)
	return kept
}

// isGone tells that what was to be removed is not there, for example as its device is not.
func isGone(err error) bool {
	for _, errno := range []unix.Errno{unix.ESRCH, unix.ENOENT, unix.ENODEV, unix.EADDRNOTAVAIL, unix.ENETDOWN} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// make makes all entries, also those that should be there: a program may have removed them, or
// a device that was down. It returns those that are there now.
func (w *work) make(kept, wanted []entry) (made []entry) {
	before := map[string]entry{}
	for _, e := range kept {
		before[e.slot] = e
	}
	for _, e := range wanted {
		if w.gone[e.index] {
			continue
		}
		err := w.inside.request(e.kind, e.flags, e.body)
		if errors.Is(err, unix.EEXIST) && e.flags == create {
			err = nil
		}
		if err == nil {
			made = append(made, e)
			continue
		}
		if e.second != nil && w.inside.request(e.kind, e.flags, e.second) == nil {
			w.log.add("%s: it is without its %s: %v", e.what, e.without, err)
			e.body = e.second
			made = append(made, e)
			continue
		}
		w.failed(e.index, "%s: %v", e.what, err)
		if old, ok := before[e.slot]; ok {
			made = append(made, old)
		}
	}
	return made
}

// failed notes a problem, only the first of a device that has vanished. The last argument is the error.
func (w *work) failed(index int, format string, args ...any) {
	err, _ := args[len(args)-1].(error)
	if w.gone[index] {
		return
	}
	if index != 0 && errors.Is(err, unix.ENODEV) {
		w.gone[index] = true
	}
	w.log.add(format, args...)
}

// name gives the devices their names. Those that stand in the way of others of ours step aside first.
func (w *work) name() {
	links, err := w.inside.links()
	if err != nil {
		w.log.add("%v", err)
		return
	}
	now := map[string]int{}
	ours := map[int]bool{}
	for _, l := range links {
		now[l.Attrs().Name] = l.Attrs().Index
	}
	for _, index := range w.devices {
		ours[index] = true
	}
	for _, f := range w.want.GetInterfaces() {
		index, ok := w.indexes[f.Name]
		holder := now[f.Name]
		if !ok || holder == index || !ours[holder] {
			continue
		}
		if err := w.inside.rename(holder, tempName); err != nil {
			w.failed(holder, "%s: make the name free: %v", f.Name, err)
		}
	}
	for _, f := range w.want.GetInterfaces() {
		index, ok := w.indexes[f.Name]
		if !ok || now[f.Name] == index {
			continue
		}
		if err := w.inside.rename(index, f.Name); err != nil {
			w.failed(index, "%s: rename: %v", f.Name, err)
		}
	}
}

// look returns the device of an interface, or nil if there is nothing to do with it.
func (w *work) look(f *agentv1.Interface) *netlink.LinkAttrs {
	index, ok := w.indexes[f.Name]
	if !ok || w.gone[index] || index == loIndex {
		return nil
	}
	link, err := w.inside.handle.LinkByIndex(index)
	if err != nil {
		if _, ok := errors.AsType[netlink.LinkNotFoundError](err); ok {
			err = unix.ENODEV
		}
		w.failed(index, "%s: look at device: %v", f.Name, err)
		return nil
	}
	return link.Attrs()
}

// prepare gives a device its properties, all but that it is up.
func (w *work) prepare(f *agentv1.Interface) {
	now := w.look(f)
	if now == nil {
		return
	}
	try := func(needed bool, what string, do func() error) {
		if needed && !w.gone[now.Index] {
			if err := do(); err != nil {
				w.failed(now.Index, "%s: set %s: %v", f.Name, what, err)
			}
		}
	}
	number := func(attr int, value uint32) func() error {
		return func() error { return w.inside.setLink(now.Index, 0, 0, nl.NewRtAttr(attr, nl.Uint32Attr(value))) }
	}
	try(len(f.Mac) > 0 && string(f.Mac) != string(now.HardwareAddr), fmt.Sprintf("address %s", net.HardwareAddr(f.Mac)),
		func() error { return w.inside.setMAC(now.Index, f.Mac) })
	try(f.Mtu > 0 && int(f.Mtu) != now.MTU, fmt.Sprintf("mtu %d", f.Mtu), number(unix.IFLA_MTU, f.Mtu))
	try(f.TxQueueLength > 0 && int(f.TxQueueLength) != now.TxQLen, fmt.Sprintf("tx_queue_length %d", f.TxQueueLength),
		number(unix.IFLA_TXQLEN, f.TxQueueLength))
	flags := linkFlags(f)
	try(now.RawFlags&flagMask != flags, "arp, allmulti and promisc",
		func() error { return w.inside.setLink(now.Index, flags, flagMask) })
}

// setUp sets a device up or down.
func (w *work) setUp(f *agentv1.Interface) {
	now := w.look(f)
	if now == nil {
		return
	}
	var flags uint32
	if f.Up {
		flags = unix.IFF_UP
	}
	if now.RawFlags&unix.IFF_UP == flags {
		return
	}
	if err := w.inside.setLink(now.Index, flags, unix.IFF_UP); err != nil {
		w.failed(now.Index, "%s: set up to %t: %v", f.Name, f.Up, err)
	}
}

const flagMask = unix.IFF_NOARP | unix.IFF_ALLMULTI | unix.IFF_PROMISC

func linkFlags(f *agentv1.Interface) (flags uint32) {
	if !f.Arp {
		flags |= unix.IFF_NOARP
	}
	if f.Allmulti {
		flags |= unix.IFF_ALLMULTI
	}
	if f.Promisc {
		flags |= unix.IFF_PROMISC
	}
	return flags
}

// setSysctls sets the parameters, and those back that are not wanted any more. It returns what those that
// are set were before.
func (w *work) setSysctls(before map[string]string) map[string]string {
	values := maps.Clone(w.want.GetSysctls())
	if values == nil {
		values = map[string]string{}
	}
	ours := map[string]bool{}
	for _, f := range w.want.GetInterfaces() {
		if index, ok := w.indexes[f.Name]; ok && index != loIndex && !w.gone[index] {
			for key, value := range mirrored(f.Name) {
				values[key], ours[key] = value, true
			}
		}
	}
	now := map[string]string{}
	err := inside(w.netns, func() error {
		for _, key := range slices.Backward(sortKeys(before)) {
			if _, ok := values[key]; ok {
				if !ours[key] {
					now[key] = before[key]
				}
			} else if _, _, err := writeSysctl(key, before[key]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				w.log.add("sysctl %s: set back: %v", key, err)
			}
		}
		for _, key := range sortKeys(values) {
			old, known, err := writeSysctl(key, values[key])
			if err != nil {
				// Where IPv6 is not there is no address to look after.
				if !ours[key] || !errors.Is(err, fs.ErrNotExist) {
					w.log.add("sysctl %s: %v", key, err)
				}
				continue
			}
			if _, ok := now[key]; !ok && known && !ours[key] {
				now[key] = old
			}
		}
		return nil
	})
	if err != nil {
		w.log.add("sysctls: %v", err)
		return before
	}
	return now
}
