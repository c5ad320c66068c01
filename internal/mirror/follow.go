package mirror

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// follow repeats a batch of what has happened.
func (s *Set) follow() {
	if events := s.watcher.batch(); len(events) > 0 {
		s.repeat(events)
	}
	s.giveUpFailed()
}

// catchUp repeats what has happened until now. What happens meanwhile is left for later: it may have no end.
func (s *Set) catchUp() {
	if queued := s.watcher.queued(); queued > 0 {
		for end := s.watcher.taken + queued; s.watcher.taken < end; {
			events := s.watcher.batch()
			if len(events) == 0 {
				break
			}
			s.repeat(events)
		}
	}
	s.giveUpFailed()
}

// change is a change of names that a batch of events has.
type change struct {
	at       int // index of the event at which it is repeated
	from, to string
	removed  bool // to is empty then: it has gone, or has left the tree
	left     bool // it has left the tree
	exchange bool
}

// apply returns where the path is after the change.
func (c *change) apply(p string) string {
	move := func(from, to string) (string, bool) {
		if p == from {
			return to, true
		}
		if rest, ok := strings.CutPrefix(p, from+"/"); ok {
			return to + "/" + rest, true
		}
		return p, false
	}
	if c.removed {
		return p
	}
	q, moved := move(c.from, c.to)
	if !moved && c.exchange {
		q, _ = move(c.to, c.from)
	}
	return q
}

// batch is what is known of events that were read together. When the first is repeated all have
// happened: where something is now the changes of names after it tell.
type batch struct {
	set     *Set
	events  []event
	changes map[*Mirror][]change
	skip    map[int]bool   // events that another one has covered
	froms   map[uint32]int // first halves of renames, by cookie
	planned int            // how many events are in changes
	base    int            // changes at later events are not in the models yet
}

// maxEvents bounds a batch that grows: each event is compared with the renames after it.
const maxEvents = 1024

// more adds events that have come since, and tells whether there are any. Event i is being repeated.
func (b *batch) more(i int) bool {
	if len(b.events) >= maxEvents || !b.set.watcher.wait(pairTime) {
		return false
	}
	events := b.set.watcher.batch()
	b.set.pace.spend(len(events), 0)
	b.events = append(b.events, events...)
	b.base = i
	b.plan()
	return len(events) > 0
}

// plan finds the changes of names.
func (b *batch) plan() {
	s := b.set
	for i := b.planned; i < len(b.events); i++ {
		ev := b.events[i]
		switch {
		case ev.mask&unix.IN_MOVED_FROM != 0:
			b.froms[ev.cookie] = i
			for _, n := range s.nodes[ev.wd] {
				if s.partner(b.events[i+1:], ev.cookie, n.mirror) == nil {
					b.add(n, change{at: i, from: ev.name, removed: true, left: true})
				}
			}
		case ev.mask&unix.IN_MOVED_TO != 0:
			f, ok := b.froms[ev.cookie]
			if !ok || b.exchange(f, i) {
				continue
			}
			for _, to := range s.nodes[ev.wd] {
				for _, from := range s.nodes[b.events[f].wd] {
					if from.mirror == to.mirror {
						m := to.mirror
						b.changes[m] = append(b.changes[m], change{
							at: i, from: path.Join(b.now(from), b.events[f].name), to: path.Join(b.now(to), ev.name),
						})
					}
				}
			}
		case ev.mask&unix.IN_DELETE != 0:
			for _, n := range s.nodes[ev.wd] {
				b.add(n, change{at: i, from: ev.name, removed: true})
			}
		}
	}
	b.planned = len(b.events)
}

// exchange tells whether a rename from event f to event t is the second half of an exchange: two files have
// changed places, and each replaced the other.
func (b *batch) exchange(f, t int) bool {
	if f < 2 || b.events[f-1].mask&unix.IN_MOVED_TO == 0 || f-1 <= b.base {
		return false
	}
	same := func(x, y event) bool { return x.wd == y.wd && x.name == y.name }
	first, ok := b.froms[b.events[f-1].cookie]
	if !ok || !same(b.events[first], b.events[t]) || !same(b.events[f-1], b.events[f]) || !b.existed(b.events[f], first) {
		return false
	}
	found := false
	for _, changes := range b.changes {
		for j := range changes {
			if changes[j].at == f-1 {
				changes[j].exchange, found = true, true
			}
		}
	}
	b.skip[t] = found
	return found
}

// existed tells whether the file that ev names was there before event i.
func (b *batch) existed(ev event, i int) bool {
	for i--; i > b.base; i-- {
		if e := b.events[i]; e.wd == ev.wd && e.name == ev.name {
			switch {
			case e.mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
				return true
			case e.mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
				return false
			}
		}
	}
	for _, n := range b.set.nodes[ev.wd] {
		if n.children[ev.name] != nil {
			return true
		}
	}
	return false
}

// partner finds the directory of the mirror that a rename has led to.
func (s *Set) partner(events []event, cookie uint32, m *Mirror) *node {
	for _, ev := range events {
		if ev.mask&unix.IN_MOVED_TO == 0 || ev.cookie != cookie {
			continue
		}
		for _, n := range s.nodes[ev.wd] {
			if n.mirror == m {
				return n
			}
		}
		return nil
	}
	return nil
}

func (b *batch) add(dir *node, c change) {
	c.from = path.Join(b.now(dir), c.from)
	b.changes[dir.mirror] = append(b.changes[dir.mirror], c)
}

// now is where a directory is after the changes that were found so far.
func (b *batch) now(n *node) string {
	p := n.path()
	for i := range b.changes[n.mirror] {
		if c := &b.changes[n.mirror][i]; c.at > b.base {
			p = c.apply(p)
		}
	}
	return p
}

// where tells where what had this path at event i is when all has happened, or what has become of it.
func (b *batch) where(m *Mirror, p string, i int) (now string, end *change) {
	for j := range b.changes[m] {
		c := &b.changes[m][j]
		if c.at <= i {
			continue
		}
		if c.removed && (p == c.from || strings.HasPrefix(p, c.from+"/")) {
			return p, c
		}
		p = c.apply(p)
	}
	return p, nil
}

// open opens what had this path at event i where it is now. Is it not there and nothing tells why, then that is
// about to be told: on its way are a rename, or the end.
func (b *batch) open(m *Mirror, p string, i int) (fd int, now string, st fileState, end *change, err error) {
	for {
		now, end = b.where(m, p, i)
		fd, st, err = m.open(now)
		if !errors.Is(err, errGone) || end != nil || !b.more(i) {
			return fd, now, st, end, err
		}
	}
}

// repeat repeats events in their order.
func (s *Set) repeat(events []event) {
	b := &batch{
		set: s, events: events, base: -1,
		changes: make(map[*Mirror][]change), skip: make(map[int]bool), froms: make(map[uint32]int),
	}
	b.plan()
	s.pace.spend(len(events), 0)
	for i := 0; i < len(b.events); i++ { // it may grow
		ev := b.events[i]
		if ev.mask&unix.IN_Q_OVERFLOW != 0 {
			s.log.Info("files change faster than can be followed: watches in the container see the outcome only")
			for _, m := range s.mirrors {
				m.look(true)
			}
			continue
		}
		if b.skip[i] {
			continue
		}
		for _, n := range append([]*node(nil), s.nodes[ev.wd]...) {
			if n.mirror.failed == nil && n.wd == ev.wd {
				n.mirror.try(func() error { return n.mirror.repeat(b, i, n) })
			}
		}
	}
	if s.sending != nil {
		s.sending.out.flush()
	}
}

// try notes an error of f as the reason why the mirror cannot be followed. That something has gone meanwhile is none.
func (m *Mirror) try(f func() error) {
	if err := f(); err != nil && !errors.Is(err, errGone) {
		m.fail(err)
	}
}

// repeat repeats an event of a watched directory or file.
func (m *Mirror) repeat(b *batch, i int, dir *node) error {
	ev := b.events[i]
	if ev.mask&unix.IN_IGNORED != 0 {
		m.set.unwatch(dir)
		return nil
	}
	if ev.name == "" { // of the root: others are told of with their names
		if dir.parent != nil {
			return nil
		}
		return m.changed(b, i, dir, ev.mask)
	}
	if !dir.isDir() {
		return nil
	}
	switch {
	case ev.mask&unix.IN_CREATE != 0:
		return m.created(b, i, dir, ev)
	case ev.mask&unix.IN_MOVED_TO != 0:
		if f, ok := b.froms[ev.cookie]; ok {
			for _, n := range m.set.nodes[b.events[f].wd] {
				if n.mirror == m {
					return m.renamed(b, i, n, b.events[f].name, dir, ev.name)
				}
			}
		}
		return m.movedIn(b, i, dir, ev.name)
	case ev.mask&unix.IN_MOVED_FROM != 0:
		if _, end := b.where(m, path.Join(dir.path(), ev.name), i-1); end != nil && end.left && end.at == i {
			m.drop(dir, ev.name, true)
		}
		return nil
	case ev.mask&unix.IN_DELETE != 0:
		m.drop(dir, ev.name, false)
		return nil
	}
	if n := dir.children[ev.name]; n != nil {
		return m.changed(b, i, n, ev.mask)
	}
	return nil
}

// changed repeats an event of a file that keeps its name.
func (m *Mirror) changed(b *batch, i int, n *node, mask uint32) error {
	fd, _, st, end, err := b.open(m, n.path(), i)
	same := err == nil && st.id() == n.st.id()
	if err == nil {
		defer unix.Close(fd)
	} else if !errors.Is(err, errGone) {
		return err
	}
	if !same || end != nil { // what it had last nobody can tell any more
		switch {
		case n.kind() != unix.S_IFREG:
		case mask&unix.IN_MODIFY != 0:
			m.out.touch(n)
		case mask&unix.IN_CLOSE_WRITE != 0:
			m.out.closeWritten(n.path())
		}
		return nil
	}
	switch {
	case mask&unix.IN_MODIFY != 0:
		return m.modified(n, fd, st, true)
	case mask&unix.IN_CLOSE_WRITE != 0:
		if err := m.modified(n, fd, st, false); err != nil {
			return err
		}
		m.out.closeWritten(n.path())
	case mask&unix.IN_ATTRIB != 0:
		return m.attributed(n, fd, st)
	}
	return nil
}

// racyTime is within what file systems may give two changes the same time.
const racyTime = 50 * time.Millisecond

// modified brings a file's content to the guest.
func (m *Mirror) modified(n *node, fd int, st fileState, always bool) error {
	if n.kind() != unix.S_IFREG {
		return nil
	}
	known := st.mtime == n.st.mtime && st.ctime == n.st.ctime && st.size == n.size &&
		n.read.Sub(time.Unix(st.ctime.Unix())) > racyTime
	if known {
		if always {
			m.out.touch(n)
		}
		return nil
	}
	n.st.mtime, n.st.ctime, n.st.size = st.mtime, st.ctime, st.size
	if _, err := m.content(n, fd, n.path(), false, always); err != nil {
		return err
	}
	if st.nlink > 1 {
		m.root.each(func(o *node) { // its other names
			if o.st.id() == st.id() {
				o.size, o.blocks, o.read = n.size, n.blocks, n.read
				o.st.mtime, o.st.ctime, o.st.size = st.mtime, st.ctime, st.size
			}
		})
	}
	return nil
}

// attributed brings a file's attributes to the guest.
func (m *Mirror) attributed(n *node, fd int, st fileState) error {
	if n.parent == nil && !n.isDir() && st.nlink == 0 && n.st.nlink > 0 {
		n.st.nlink = 0
		m.out.remove("", false) // its name; it stays where it is mounted
		return nil
	}
	a, sum, err := attributes(fd, st)
	if err != nil {
		return err
	}
	size, mtime := n.st.size, n.st.mtime
	n.st, n.xattrs = st, sum
	if n.kind() == unix.S_IFREG && mtime != st.mtime && size != st.size {
		n.st.size, n.st.mtime = size, mtime // the content comes with an event of its own
	}
	m.out.setAttributes(n.path(), false, a)
	return nil
}

// created repeats that something was made in a directory.
func (m *Mirror) created(b *batch, i int, dir *node, ev event) error {
	p := path.Join(dir.path(), ev.name)
	fd, now, st, end, err := b.open(m, p, i)
	if errors.Is(err, errGone) {
		if end != nil && !end.left && end.from == p && dir.children[ev.name] == nil {
			return m.shortLived(dir, ev)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if n := dir.children[ev.name]; n != nil {
		if n.st.id() == st.id() {
			return nil // it was seen when its directory was
		}
		return m.appear(dir, ev.name, now, fd, st, true)
	}
	return m.appear(dir, ev.name, now, fd, st, false)
}

// shortLived makes something of which is only known that it was there: its end will be repeated, too.
func (m *Mirror) shortLived(dir *node, ev event) error {
	n := &node{mirror: m, parent: dir, name: ev.name, wd: -1}
	n.st = fileState{mode: unix.S_IFREG | 0o600}
	if ev.mask&unix.IN_ISDIR != 0 {
		n.st.mode = unix.S_IFDIR | 0o700
		n.children = make(map[string]*node)
	}
	if err := m.count(n); err != nil {
		return err
	}
	dir.children[ev.name] = n
	a := &agentv1.MirrorAttributes{Mode: n.st.mode}
	if n.isDir() {
		m.out.make(n.path(), false, a, "", 0)
		return nil
	}
	staged := m.stage()
	m.out.make(staged, true, a, "", 0)
	m.out.publish(staged, n.path(), false)
	return nil
}

// movedIn repeats that something has come from outside.
func (m *Mirror) movedIn(b *batch, i int, dir *node, name string) error {
	fd, now, st, _, err := b.open(m, path.Join(dir.path(), name), i)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if n := dir.children[name]; n != nil && n.st.id() == st.id() {
		return nil
	}
	return m.appear(dir, name, now, fd, st, true)
}

// renamed repeats a rename within the tree.
func (m *Mirror) renamed(b *batch, i int, from *node, name string, to *node, newName string) error {
	n := from.children[name]
	if n == nil { // not seen before it was renamed, or seen in its new place already
		return m.movedIn(b, i, to, newName)
	}
	target := to.children[newName]
	exchange := false
	for _, c := range b.changes[m] {
		exchange = exchange || c.at == i && c.exchange
	}
	for dir := to; dir != nil; dir = dir.parent {
		if dir == n { // events were misunderstood: the next look finds what is right
			m.drop(from, name, true)
			return nil
		}
	}
	if target == nil {
		exchange = false
	}
	if target != nil && !exchange && (target.isDir() != n.isDir() || len(target.children) > 0) {
		m.drop(to, newName, false) // so it must have gone
		target = nil
	}
	m.out.rename(n.path(), path.Join(to.path(), newName), exchange)
	delete(from.children, name)
	if target != nil && !exchange {
		m.forget(target)
	}
	n.parent, n.name = to, newName
	to.children[newName] = n
	if exchange {
		target.parent, target.name = from, name
		from.children[name] = target
	}
	// A rename changes the time of the last change on most file systems.
	for _, o := range []*node{n, target} {
		if o == nil || o == target && !exchange {
			continue
		}
		now, _ := b.where(m, o.path(), i)
		if fd, st, err := m.open(now); err == nil {
			_ = unix.Close(fd)
			if st.id() == o.st.id() && st.mtime == o.st.mtime {
				o.st.ctime = st.ctime
			}
		}
	}
	return nil
}

// drop repeats that something has gone from a directory.
func (m *Mirror) drop(dir *node, name string, moved bool) {
	n := dir.children[name]
	if n == nil {
		return
	}
	m.out.remove(n.path(), moved)
	delete(dir.children, name)
	m.forget(n)
}

// forget lets go of what is known of something, and of all below it.
func (m *Mirror) forget(n *node) {
	n.each(func(o *node) {
		m.set.unwatch(o)
		m.entries--
		m.bytes -= o.size + int64(len(o.target))
	})
}

// count admits another node.
func (m *Mirror) count(n *node) error {
	if m.entries++; m.entries > m.set.limits.GrownEntries {
		return unfit("it has grown to more than %d files", m.set.limits.GrownEntries)
	}
	depth := 0
	for d := n; d.parent != nil; d = d.parent {
		depth++
	}
	if depth > m.set.limits.Depth+1 {
		return unfit("it has become deeper than %d", m.set.limits.Depth)
	}
	return nil
}

// appear brings something new to the guest. moved says that it comes as a whole, and in the place of what is there;
// else it appears like something that was made: a directory first, and then what is in it.
func (m *Mirror) appear(dir *node, name, host string, fd int, st fileState, moved bool) error {
	if old := dir.children[name]; old != nil {
		delete(dir.children, name)
		m.forget(old)
	}
	n := &node{mirror: m, parent: dir, name: name, wd: -1, st: st}
	dir.children[name] = n
	p := n.path()
	if err := m.count(n); err != nil {
		return err
	}
	if n.isDir() && !moved {
		return m.build(n, host, p, fd, false, m.appearBelow)
	}
	if first := m.linked(n); first != nil && !moved {
		m.link(n, first, p, false)
		return nil
	}
	staged := m.stage()
	if first := m.linked(n); first != nil {
		m.link(n, first, staged, true)
	} else if err := m.build(n, host, staged, fd, true, m.buildBelow); err != nil {
		return err
	}
	m.out.publish(staged, p, moved)
	n.each(func(o *node) { o.staged = "" })
	return nil
}

// stage chooses a name in the guest's staging place.
func (m *Mirror) stage() string {
	m.staged++
	return fmt.Sprintf("s%d", m.staged)
}

// link makes n another name of a file that the guest has.
func (m *Mirror) link(n, first *node, dst string, staged bool) {
	m.out.link(first, dst, staged)
	if staged {
		n.staged = dst
	}
	n.xattrs, n.size, n.blocks, n.read = first.xattrs, first.size, first.blocks, first.read
	m.bytes += n.size
	first.st.ctime, first.st.nlink = n.st.ctime, n.st.nlink
}

// linked finds another name of a file.
func (m *Mirror) linked(n *node) (first *node) {
	if n.kind() != unix.S_IFREG || n.st.nlink < 2 {
		return nil
	}
	m.root.each(func(o *node) {
		if o != n && o.kind() == unix.S_IFREG && o.st.id() == n.st.id() {
			first = o
		}
	})
	return first
}

// below makes what is in a directory, which is at dst in the guest.
type below func(n *node, host, dst string, fd int, staged bool) error

// build makes n, which is at host there and comes to dst here, and calls content for what is in it.
func (m *Mirror) build(n *node, host, dst string, fd int, staged bool, content below) error {
	a, sum, err := attributes(fd, n.st)
	if err != nil {
		return err
	}
	n.xattrs = sum
	if staged {
		n.staged = dst
	}
	switch n.kind() {
	case unix.S_IFDIR:
		n.children = make(map[string]*node)
		m.out.make(dst, staged, a, "", 0)
		// Watched before it is read, so that nothing is missed.
		if err := m.set.watch(n, fd); err != nil {
			return err
		}
		return content(n, host, dst, fd, staged)
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		size, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return fmt.Errorf("read link %s: %w", n.path(), err)
		}
		n.target = string(buf[:size])
		m.bytes += int64(size)
		m.out.make(dst, staged, a, n.target, 0)
	case unix.S_IFREG:
		if n.parent == nil {
			if err := m.set.watch(n, fd); err != nil {
				return err
			}
		}
		m.out.make(dst, staged, a, "", 0)
		if _, err := m.content(n, fd, dst, staged, true); err != nil {
			return err
		}
		if !staged {
			m.out.closeWritten(dst)
		}
	default:
		m.out.make(dst, staged, a, "", n.st.rdev)
	}
	return nil
}

// children opens what is in a directory, one after the other.
func (m *Mirror) children(host string, fd int, f func(name, host string, fd int, st fileState) error) error {
	names, err := list(fd, m.set.limits.GrownEntries-m.entries)
	if err != nil {
		return err
	}
	for _, name := range names {
		p := path.Join(host, name)
		c, st, err := m.open(p)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return err
		}
		err = f(name, p, c, st)
		_ = unix.Close(c)
		if err != nil {
			return err
		}
	}
	return nil
}

// appearBelow lets what is in a new directory appear.
func (m *Mirror) appearBelow(n *node, host, _ string, fd int, _ bool) error {
	return m.children(host, fd, func(name, host string, fd int, st fileState) error {
		return m.appear(n, name, host, fd, st, false)
	})
}

// buildBelow makes what is in a directory that nobody can see yet, and then sets its time.
func (m *Mirror) buildBelow(n *node, host, dst string, fd int, staged bool) error {
	err := m.children(host, fd, func(name, host string, fd int, st fileState) error {
		c := &node{mirror: m, parent: n, name: name, wd: -1, st: st}
		if err := m.count(c); err != nil {
			return err
		}
		n.children[name] = c
		at := path.Join(dst, name)
		if first := m.linked(c); first != nil {
			m.link(c, first, at, staged)
			return nil
		}
		return m.build(c, host, at, fd, staged, m.buildBelow)
	})
	if err != nil {
		return err
	}
	a, _, err := attributes(fd, n.st)
	if err != nil {
		return err
	}
	m.out.setAttributes(dst, staged, a)
	return nil
}

// fill makes the tree in the guest, where nobody sees it yet.
func (m *Mirror) fill() {
	m.entries, m.bytes = 0, 0
	m.try(func() error {
		fd, st, err := m.open("")
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		m.root = &node{mirror: m, wd: -1, st: st}
		if err := m.count(m.root); err != nil {
			return err
		}
		return m.build(m.root, "", "", fd, false, m.buildBelow)
	})
	m.out.flush()
	m.filled = m.failed == nil
}
