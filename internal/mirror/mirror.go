// Package mirror follows small trees of the host and repeats what happens in them in copies that the guest's
// agent keeps, so that watches (inotify) of programs in containers fire as under a runtime without a VM. A
// share cannot do that: what the host changes the guest's kernel learns when somebody looks.
//
// The pod owns a Set, and decides which bind mounts are mirrored. The package reads the trees, and never
// writes to them; it follows no symlink, leaves no source for another file system, and reads nothing but directories, regular
// files and links. A tree is hostile: it may grow, change without end, and be deep. Whatever cannot be
// followed, for whatever reason, is given up: then the share's mount takes the copy's place in the containers. Their files
// are right then as before, but watches do not fire any more, which is told once.
//
//	m, err := set.Add(ctx, source)   // an error tells why the share must do
//	path, err := m.Start(ctx, guest) // all is in the guest when it returns
//	set.Sync(ctx)                    // what was changed before this call is in the guest when it returns
//	m.Release()
package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	agentv1 "runv/api/agent/v1"
)

// Limits bound what is mirrored.
type Limits struct {
	// Entries and Bytes are what a tree may have when it is added; it is given up when it outgrows the others.
	Entries, GrownEntries int
	Bytes, GrownBytes     int64
	// TotalBytes is for all trees of a Set together, GrownTotalBytes when they grow.
	TotalBytes, GrownTotalBytes int64
	// Depth is how many directories may be above a file, in the tree.
	Depth int
}

// DefaultLimits are what a VM of the smallest size can bear.
func DefaultLimits() Limits {
	const mib = 1 << 20
	return Limits{
		Entries: 1024, GrownEntries: 4096,
		Bytes: 4 * mib, GrownBytes: 8 * mib,
		TotalBytes: 8 * mib, GrownTotalBytes: 16 * mib,
		Depth: 64,
	}
}

// Guest is what a Set needs of the agent; agentv1.MirrorsService has it.
type Guest interface {
	Create(ctx context.Context, r *agentv1.CreateMirrorRequest) (*agentv1.CreateMirrorResponse, error)
	Apply(ctx context.Context, r *agentv1.ApplyMirrorRequest) (*agentv1.ApplyMirrorResponse, error)
	Replace(ctx context.Context, r *agentv1.ReplaceMirrorRequest) (*agentv1.ReplaceMirrorResponse, error)
	Remove(ctx context.Context, r *agentv1.RemoveMirrorRequest) (*agentv1.RemoveMirrorResponse, error)
}

// FileID tells files of the host apart.
type FileID struct{ Dev, Ino uint64 }

// Source is a bind mount's.
type Source struct {
	// Tree is the directory or file, with no mounts below it but those that the bind has, too. Add takes it over.
	Tree *os.File
	// Above are the directories above it, as far as they are known.
	Above []FileID
	// Name is the last part of its path.
	Name string
	// Fallback is the guest's path of the same on the share; binds with the same one have one mirror.
	Fallback string
	// Lost is told when watches do not fire any more, and why. It must not block.
	Lost func(reason string)
}

// Set is all mirrors of a pod. It is safe for concurrent use.
type Set struct {
	limits Limits
	log    *slog.Logger

	requests chan func()
	closing  chan struct{}
	closed   chan struct{} // when the goroutine has ended
	once     sync.Once

	// What follows belongs to the goroutine of run.
	mirrors  []*Mirror
	last     int                 // number of the newest mirror
	writable map[string][]FileID // what containers may write to, by container
	watcher  *watcher            // nil: nothing was watched yet
	nodes    map[int32][]*node   // by watch
	sending  *Mirror             // whose operations are collected; nil: nobody's
	pace     pace                // of following
	buffer   []byte              // to read files with
	dirty    bool                // something has happened since the last look at all trees
	dirtied  time.Time           // when that began
}

// New makes an empty set. Close ends it.
func New(limits Limits, log *slog.Logger) *Set {
	s := &Set{
		limits: limits, log: log,
		requests: make(chan func()), closing: make(chan struct{}), closed: make(chan struct{}),
		writable: make(map[string][]FileID), nodes: make(map[int32][]*node),
		buffer: make([]byte, blockSize),
	}
	go s.run()
	return s
}

const (
	// callTimeout bounds a call of the agent.
	callTimeout = 30 * time.Second
	// settleTime is how long nothing must have happened before a look at all trees, which changes
	// that go on do not delay for longer than lookInterval. Changes of mapped memory fire no watches: they are found by
	// the look that comes every idleInterval.
	settleTime   = 200 * time.Millisecond
	lookInterval = 2 * time.Second
	idleInterval = 30 * time.Second
)

// run owns the set until Close.
func (s *Set) run() {
	defer close(s.closed)
	defer s.shut()
	look := time.NewTimer(idleInterval)
	defer look.Stop()
	for {
		readable, resume := s.watcher.readable(), (<-chan time.Time)(nil)
		if wait := s.pace.wait(time.Now()); wait > 0 {
			readable, resume = nil, time.After(wait)
		}
		select {
		case f := <-s.requests:
			f()
		case <-readable:
			s.follow()
			s.watcher.rearm()
			if !s.dirty {
				s.dirty, s.dirtied = true, time.Now()
			}
			if time.Since(s.dirtied) < lookInterval {
				look.Reset(settleTime)
			}
		case <-resume:
		case <-look.C:
			s.dirty = false
			s.catchUp()
			look.Reset(idleInterval)
			for _, m := range s.mirrors {
				if !m.look(false) {
					look.Reset(settleTime)
					break
				}
			}
			s.giveUpFailed()
		case <-s.closing:
			return
		}
	}
}

// shut lets go of all on the host.
func (s *Set) shut() {
	for _, m := range s.mirrors {
		m.unwatch()
	}
	s.watcher.close()
}

// Close ends the following and waits for that. It tells the guest nothing: the VM has ended. Idempotent.
func (s *Set) Close() {
	s.once.Do(func() { close(s.closing) })
	<-s.closed
}

var errClosed = fmt.Errorf("mirrors are closed: %w", errdefs.ErrUnavailable)

// do runs f on the set's goroutine and returns its error. When ctx ends, f may go on behind the scenes.
func (s *Set) do(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	select {
	case s.requests <- func() { done <- f() }:
	case <-s.closed:
		return errClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// post runs f on the set's goroutine, unless that has ended.
func (s *Set) post(f func()) {
	select {
	case s.requests <- f:
	case <-s.closed:
	}
}

// call is a context for a call of the agent: Close ends it.
func (s *Set) call() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout) //nolint:forbidigo // it follows the host for nobody's request, until Close
	stop := make(chan struct{})
	go func() {
		select {
		case <-s.closing:
			cancel()
		case <-stop:
		}
	}()
	return ctx, sync.OnceFunc(func() { close(stop); cancel() })
}

// Mirror is one tree in the guest.
type Mirror struct {
	set    *Set
	id     string
	source Source
	lost   []func(string) // of all users

	// What follows belongs to the set's goroutine.
	users   int
	guest   Guest  // nil: not started
	path    string // in the guest
	filled  bool   // the guest has all of it
	gaveUp  bool
	fd      int // of the source; -1 when given up
	root    *node
	entries int
	bytes   int64
	staged  int // number of the newest staged file
	out     sender
	failed  error // why it cannot be followed
}

// Add says that a container has a source bound, read-only. An error tells why the source cannot be
// mirrored: errdefs.ErrFailedPrecondition if it is for what it is, or for who else has it. It reads the tree's
// directories and asks nothing of the guest.
func (s *Set) Add(ctx context.Context, src Source) (*Mirror, error) {
	var m *Mirror
	err := s.do(ctx, func() (err error) {
		m, err = s.add(src)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("mirror %s: %w", src.Name, err)
	}
	return m, nil
}

func (s *Set) add(src Source) (*Mirror, error) {
	for _, m := range s.mirrors {
		if m.source.Fallback == src.Fallback && !m.gaveUp {
			m.users++
			m.lost = append(m.lost, src.Lost)
			return m, src.Tree.Close()
		}
	}
	s.last++
	m := &Mirror{set: s, id: fmt.Sprintf("m%d", s.last), source: src, lost: []func(string){src.Lost}, users: 1, fd: int(src.Tree.Fd())}
	m.out.m = m
	err := m.inspect()
	if err == nil {
		err = s.checkWriters(m)
	}
	if err != nil {
		_ = src.Tree.Close()
		return nil, err
	}
	s.mirrors = append(s.mirrors, m)
	return m, nil
}

// checkWriters tells of a container that may write to what m is of: the two see each other's writes at once
// and share locks only if both have the share.
func (s *Set) checkWriters(m *Mirror) error {
	for container, ids := range s.writable {
		if slices.ContainsFunc(ids, m.overlaps) {
			return unfit("container %s may write to it", container)
		}
	}
	return nil
}

// Writable says what a container may write to. Mirrors of the same files, or of what is above or below, are
// given up before it returns.
func (s *Set) Writable(ctx context.Context, container string, ids []FileID) error {
	return s.do(ctx, func() error {
		s.writable[container] = ids
		for _, m := range s.mirrors {
			if slices.ContainsFunc(ids, m.overlaps) {
				m.fail(unfit("container %s may write to it", container))
			}
		}
		s.giveUpFailed()
		return nil
	})
}

// Forget takes back what Writable has said of a container.
func (s *Set) Forget(container string) { s.post(func() { delete(s.writable, container) }) }

// Start makes the guest have the tree, and follows it from then on. It returns the guest's path of the
// tree's root. Another user's Start counts for all. An error tells why the share must do; the caller releases the mirror then.
func (m *Mirror) Start(ctx context.Context, guest Guest) (path string, err error) {
	err = m.set.do(ctx, func() error {
		switch {
		case m.failed != nil:
			return m.failed
		case m.guest != nil:
			m.set.catchUp()
		default:
			m.start(guest)
		}
		path = m.path
		if err := m.failed; err != nil {
			m.set.giveUpFailed()
			return err
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("mirror %s: %w", m.source.Name, err)
	}
	return path, nil
}

// start makes the mirror in the guest and fills it.
func (m *Mirror) start(guest Guest) {
	ctx, cancel := m.set.call()
	defer cancel()
	resp, err := guest.Create(ctx, &agentv1.CreateMirrorRequest{Id: m.id, Name: m.source.Name})
	if err != nil {
		m.fail(err)
		return
	}
	m.guest, m.path = guest, resp.Path
	m.fill()
}

// Created says that a container was made with the mirror: if it was given up meanwhile, the share takes its
// place in that container now.
func (m *Mirror) Created(ctx context.Context) error {
	return m.set.do(ctx, func() error {
		if m.gaveUp && m.filled {
			m.replace()
		}
		return nil
	})
}

// Sync brings to the guest what has changed before the call. What cannot be brought there makes a
// mirror be given up, and is no error.
func (s *Set) Sync(ctx context.Context) error {
	return s.do(ctx, func() error {
		s.catchUp()
		return nil
	})
}

// Release says that a container does not have the mirror any more. With its last user it goes.
func (m *Mirror) Release() {
	m.set.post(func() {
		if m.users--; m.users > 0 {
			return
		}
		m.unwatch()
		m.set.mirrors = slices.DeleteFunc(m.set.mirrors, func(o *Mirror) bool { return o == m })
		if m.guest == nil {
			return
		}
		ctx, cancel := m.set.call()
		defer cancel()
		if _, err := m.guest.Remove(ctx, &agentv1.RemoveMirrorRequest{Id: m.id}); err != nil && !errdefs.IsUnavailable(err) {
			m.set.log.Warn("remove mirror in guest", "source", m.source.Name, "err", err)
		}
	})
}

// fail notes why the mirror cannot be followed; the first reason stays.
func (m *Mirror) fail(err error) {
	if m.failed == nil {
		m.failed = err
	}
}

// giveUpFailed puts the share in the place of mirrors that have failed.
func (s *Set) giveUpFailed() {
	for _, m := range s.mirrors {
		if m.failed != nil && !m.gaveUp {
			m.giveUp()
		}
	}
}

// giveUp puts the share in the mirror's place, and tells it.
func (m *Mirror) giveUp() {
	m.gaveUp = true
	m.unwatch()
	if !m.filled {
		return // nobody has it
	}
	if errdefs.IsUnavailable(m.failed) || m.set.ending() {
		return // the VM has gone
	}
	m.replace()
	m.set.log.Warn("watches of the container do not fire any more: the source of a bind mount cannot be mirrored, it comes over the share now",
		"source", m.source.Name, "why", m.failed)
	for _, tell := range m.lost {
		if tell != nil {
			tell(m.failed.Error())
		}
	}
}

// ending tells whether Close was called.
func (s *Set) ending() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// replace puts the share in the mirror's place where containers have that mounted.
func (m *Mirror) replace() {
	ctx, cancel := m.set.call()
	defer cancel()
	resp, err := m.guest.Replace(ctx, &agentv1.ReplaceMirrorRequest{Id: m.id, Source: m.source.Fallback})
	switch {
	case errdefs.IsUnavailable(err): // the VM has gone
	case err != nil:
		m.set.log.Error("replace mirror by the share: the container sees the files as they were", "source", m.source.Name, "err", err)
	case len(resp.Problems) > 0:
		m.set.log.Error("replace mirror by the share: the container sees the files as they were", "source", m.source.Name, "problem", resp.Problems[0])
	}
}

// overlaps tells whether a file is part of the tree, or above it.
func (m *Mirror) overlaps(id FileID) bool {
	if slices.Contains(m.source.Above, id) {
		return true
	}
	found := false
	m.root.each(func(n *node) { found = found || n.st.id() == id })
	return found
}

// unwatch lets go of the source and of what is known of it.
func (m *Mirror) unwatch() {
	if m.fd < 0 {
		return
	}
	m.root.each(m.set.unwatch)
	m.root, m.bytes, m.entries = nil, 0, 0
	_ = m.source.Tree.Close()
	m.fd = -1
}

// used is how many bytes all mirrors have.
func (s *Set) used() (n int64) {
	for _, m := range s.mirrors {
		n += m.bytes
	}
	return n
}

// unfit is an error that tells why a tree cannot be mirrored.
func unfit(format string, args ...any) error {
	return &unfitError{fmt.Sprintf(format, args...)}
}

type unfitError struct{ why string }

func (e *unfitError) Error() string { return e.why }
func (e *unfitError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// sortedNames are those of a directory's entries.
func sortedNames(children map[string]*node) []string { return slices.Sorted(maps.Keys(children)) }

var errGone = errors.New("it has gone")
