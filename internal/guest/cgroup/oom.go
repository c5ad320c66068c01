package cgroup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// watcher learns of changes to the groups' memory.events.
type watcher struct {
	inotify *os.File
	fd      int // of inotify; File.Fd could make it blocking

	mu     sync.Mutex
	groups map[int32]*Group // by watch descriptor
}

func newWatcher() (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch cgroups: %w", err)
	}
	return &watcher{inotify: os.NewFile(uintptr(fd), "inotify"), fd: fd, groups: make(map[int32]*Group)}, nil
}

// add watches g. A kernel without the memory controller has nothing to watch.
func (w *watcher) add(g *Group) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	wd, err := unix.InotifyAddWatch(w.fd, filepath.Join(g.dir, "memory.events"), unix.IN_MODIFY)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch memory.events: %w", err)
	}
	w.groups[int32(wd)] = g
	return nil
}

// remove forgets g; its watch went with its files.
func (w *watcher) remove(g *Group) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for wd, other := range w.groups {
		if other == g {
			delete(w.groups, wd)
		}
	}
}

func (w *watcher) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { w.inotify.Close() })
	defer stop()
	buf := make([]byte, 4096)
	for {
		n, err := w.inotify.Read(buf)
		if err != nil {
			return
		}
		// struct inotify_event: wd, mask, cookie, len, name.
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			b = b[min(size, len(b)):]
			w.mu.Lock()
			g := w.groups[wd]
			w.mu.Unlock()
			if g != nil {
				g.CheckOOM()
			}
		}
	}
}

// CheckOOM reports kills that were not reported yet, without waiting for the
// kernel's notification.
func (g *Group) CheckOOM() {
	g.mu.Lock()
	defer g.mu.Unlock()
	kills := g.flat("memory.events")["oom_kill"]
	if kills > g.kills {
		g.kills = kills
		g.onOOM(kills)
	}
}

// OOMKills is how many processes of the group the kernel has killed for want of memory.
func (g *Group) OOMKills() uint64 { return g.flat("memory.events")["oom_kill"] }
