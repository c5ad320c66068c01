package mirror

import (
	"errors"
	"path"

	"golang.org/x/sys/unix"
)

// errBusy ends a look that has found what events are about to tell.
var errBusy = errors.New("events have come")

// look compares the tree with what the guest has, and brings there what is different. What is new comes first and
// what has gone last, so that links that change lead somewhere at any time. Unless events were lost it ends when
// some come: they tell in which order things have happened. It tells whether it has come to the end.
func (m *Mirror) look(lost bool) (done bool) {
	if m.guest == nil || m.failed != nil || m.root == nil {
		return true
	}
	l := &looking{Mirror: m, lost: lost}
	err := l.all()
	if !errors.Is(err, errBusy) {
		done = true
		m.try(func() error { return err })
	}
	m.out.flush()
	return done
}

// looking is a look at a tree.
type looking struct {
	*Mirror
	lost bool
}

// found is called when something is different.
func (l *looking) found() error {
	if !l.lost && l.set.watcher.wait(pairTime) {
		return errBusy
	}
	return nil
}

func (l *looking) all() error {
	for _, pass := range []func(*node, string, int, fileState) error{l.lookForNew, l.lookForChanges} {
		fd, st, err := l.open("")
		if err != nil {
			return err
		}
		err = pass(l.root, "", fd, st)
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return l.lookForGone(l.root)
}

// lookForNew brings what was made, in n and below.
func (l *looking) lookForNew(n *node, _ string, fd int, _ fileState) error {
	if !n.isDir() {
		return nil
	}
	return l.children(n.path(), fd, func(name, host string, fd int, st fileState) error {
		c := n.children[name]
		if c == nil {
			if err := l.found(); err != nil {
				return err
			}
			return l.appear(n, name, host, fd, st, false)
		}
		if c.isDir() && c.st.id() == st.id() {
			return l.lookForNew(c, host, fd, st)
		}
		return nil
	})
}

// lookForChanges brings what was changed or replaced, n and below.
func (l *looking) lookForChanges(n *node, host string, fd int, st fileState) error {
	if err := l.compare(n, fd, st); err != nil {
		return err
	}
	for _, name := range sortedNames(n.children) {
		c := n.children[name]
		p := path.Join(host, name)
		fd, st, err := l.open(p)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return err
		}
		if c.st.id() != st.id() || c.kind() != st.mode&unix.S_IFMT {
			if err = l.found(); err == nil {
				err = l.appear(n, name, p, fd, st, true)
			}
		} else {
			err = l.lookForChanges(c, p, fd, st)
		}
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
}

// compare brings what was changed of n itself.
func (l *looking) compare(n *node, fd int, st fileState) error {
	regular := n.kind() == unix.S_IFREG
	if st.ctime == n.st.ctime && st.mtime == n.st.mtime && (!regular || st.size == n.size) {
		return nil
	}
	if err := l.found(); err != nil {
		return err
	}
	before := n.st
	if regular {
		n.st.mtime, n.st.size = st.mtime, st.size
		changed, err := l.content(n, fd, n.path(), false, false)
		if err != nil {
			return err
		}
		if changed {
			l.out.closeWritten(n.path())
			before.mtime = st.mtime
		}
	}
	a, sum, err := attributes(fd, st)
	if err != nil {
		return err
	}
	same := before.mode == st.mode && before.uid == st.uid && before.gid == st.gid && n.xattrs == sum &&
		(n.isDir() || before.mtime == st.mtime)
	gone := n.parent == nil && regular && st.nlink == 0 && before.nlink > 0
	n.st, n.xattrs = st, sum
	switch {
	case gone:
		l.out.remove("", false)
	case !same:
		l.out.setAttributes(n.path(), false, a)
	}
	return nil
}

// lookForGone takes away what is not there any more, in n and below.
func (l *looking) lookForGone(n *node) error {
	for _, name := range sortedNames(n.children) {
		c := n.children[name]
		fd, _, err := l.open(c.path())
		if errors.Is(err, errGone) {
			if err := l.found(); err != nil {
				return err
			}
			l.drop(n, name, false)
			continue
		}
		if err != nil {
			return err
		}
		_ = unix.Close(fd)
		if err := l.lookForGone(c); err != nil {
			return err
		}
	}
	return nil
}
