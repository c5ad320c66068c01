package mirror

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// watched are the events that change something. What is only read is nobody's business.
const watched = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE |
	unix.IN_MOVED_FROM | unix.IN_MOVED_TO

// event is one of inotify's.
type event struct {
	wd     int32
	mask   uint32
	cookie uint32
	name   string
}

// watcher is an inotify instance: the host allows few of them for each user. All but its waiting is the
// set's goroutine's. A nil watcher is one that watches nothing.
type watcher struct {
	file  *os.File
	raw   int
	taken int           // bytes of events that were read
	ready chan struct{} // gets a value when there are events
	armed chan struct{} // gets a value when the next ones are of interest
	done  chan struct{}
	ended sync.WaitGroup
}

func newWatcher() (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if errors.Is(err, unix.EMFILE) {
		return nil, fmt.Errorf("watch: no more inotify instances (fs.inotify.max_user_instances): %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	w := &watcher{
		file: os.NewFile(uintptr(fd), "inotify"), raw: fd,
		ready: make(chan struct{}), armed: make(chan struct{}), done: make(chan struct{}),
	}
	conn, err := w.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	w.ended.Go(func() {
		for conn.Read(func(fd uintptr) bool { return pending(int(fd)) }) == nil {
			for _, step := range []func() bool{
				func() bool { return send(w.ready, w.done) },
				func() bool { return receive(w.armed, w.done) },
			} {
				if !step() {
					return
				}
			}
		}
	})
	return w, nil
}

func send(c chan<- struct{}, done <-chan struct{}) bool {
	select {
	case c <- struct{}{}:
		return true
	case <-done:
		return false
	}
}

func receive(c, done <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-done:
		return false
	}
}

func pending(fd int) bool {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	return err != nil || n > 0
}

// queued is how many bytes of events there are.
func (w *watcher) queued() int {
	if w == nil {
		return 0
	}
	n, err := unix.IoctlGetInt(w.raw, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

func (w *watcher) readable() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.ready
}

// rearm makes readable tell of the next events, once it has told of some.
func (w *watcher) rearm() { send(w.armed, w.done) }

func (w *watcher) close() {
	if w == nil {
		return
	}
	close(w.done)
	_ = w.file.Close()
	w.ended.Wait()
}

// bufferSize is how many bytes of events are taken at a time.
const bufferSize = 16 << 10

// read returns events that are there, none if there are none.
func (w *watcher) read() []event {
	buf := make([]byte, bufferSize)
	n, err := unix.Read(w.raw, buf)
	if err != nil {
		return nil
	}
	w.taken += n
	return parse(buf[:n])
}

// parse takes inotify's bytes apart.
func parse(buf []byte) (events []event) {
	for len(buf) >= unix.SizeofInotifyEvent {
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[12:]))
		if size > len(buf) {
			return events
		}
		events = append(events, event{
			wd:     int32(binary.NativeEndian.Uint32(buf)),
			mask:   binary.NativeEndian.Uint32(buf[4:]),
			cookie: binary.NativeEndian.Uint32(buf[8:]),
			name:   unix.ByteSliceToString(buf[unix.SizeofInotifyEvent:size]),
		})
		buf = buf[size:]
	}
	return events
}

const (
	// pairTime is how long the other half of a rename may take, or what explains that something is not there.
	pairTime = 10 * time.Millisecond
	// exchangeTime is how long the second rename may take, of those that an exchange looks like.
	exchangeTime = time.Millisecond
)

// batch reads events, and what comes right after a rename.
func (w *watcher) batch() []event {
	if w == nil {
		return nil
	}
	events := w.read()
	for deadline := time.Now().Add(pairTime); len(events) > 0; {
		// The kernel puts what belongs together into the queue one after the other.
		limit := time.Duration(0)
		switch last := events[len(events)-1]; {
		case last.mask&unix.IN_MOVED_FROM != 0:
			limit = time.Until(deadline)
		case last.mask&unix.IN_MOVED_TO != 0:
			limit = min(exchangeTime, time.Until(deadline))
		}
		if limit <= 0 || !w.wait(limit) {
			break
		}
		events = append(events, w.read()...)
	}
	return events
}

// wait waits for events, and tells whether there are some.
func (w *watcher) wait(d time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(w.raw), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, max(1, int(d.Milliseconds())))
	return n > 0 && err == nil
}

// watch watches what is at a path, which may be of /proc.
func (s *Set) watch(n *node, fd int) error {
	if s.watcher == nil {
		w, err := newWatcher()
		if err != nil {
			return err
		}
		s.watcher = w
	}
	mask := uint32(watched)
	if n.isDir() {
		mask |= unix.IN_ONLYDIR
	}
	wd, err := unix.InotifyAddWatch(s.watcher.raw, fmt.Sprintf("/proc/self/fd/%d", fd), mask)
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("watch: no more watches (fs.inotify.max_user_watches): %w", err)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil // it was removed just now: nothing can happen in it
	}
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	n.wd = int32(wd)
	s.nodes[n.wd] = append(s.nodes[n.wd], n)
	return nil
}

// unwatch ends that.
func (s *Set) unwatch(n *node) {
	if n.wd < 0 {
		return
	}
	wd := n.wd
	n.wd = -1
	left := s.nodes[wd][:0:0]
	for _, other := range s.nodes[wd] {
		if other != n {
			left = append(left, other)
		}
	}
	if len(left) > 0 {
		s.nodes[wd] = left
		return
	}
	delete(s.nodes, wd)
	_, _ = unix.InotifyRmWatch(s.watcher.raw, uint32(wd)) // it may have gone with the directory
}
