// Package cgroup keeps the containers' control groups: one cgroup v2 directory for
// each, with the specification's limits. internal/guest/container uses it. It
// writes the few files itself, since the guest has cgroup v2 and nothing else that
// manages groups.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// Hierarchy is the directory that has a group for each container.
type Hierarchy struct {
	dir   string
	watch *watcher
}

// Open makes the directory dir in the cgroup2 mount above it, and lets both pass
// on all controllers that the kernel has.
func Open(dir string) (*Hierarchy, error) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := enableControllers(d); err != nil {
			return nil, fmt.Errorf("enable cgroup controllers: %w", err)
		}
	}
	w, err := newWatcher()
	if err != nil {
		return nil, err
	}
	return &Hierarchy{dir: dir, watch: w}, nil
}

func enableControllers(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	names := strings.Fields(string(data))
	if len(names) == 0 {
		return nil
	}
	return write(dir, "cgroup.subtree_control", "+"+strings.Join(names, " +"))
}

// Watch reports out-of-memory kills until ctx ends.
func (h *Hierarchy) Watch(ctx context.Context) { h.watch.run(ctx) }

// Group is the control group of one container.
type Group struct {
	dir   string
	fd    *os.File
	watch *watcher

	updating sync.Mutex
	amounts  amounts // guarded by updating

	mu    sync.Mutex
	kills uint64 // that were reported
	onOOM func(kills uint64)
}

// Create makes a group. onOOM is called with the number of processes that were killed
// in it so far whenever that has grown; it must not block. The caller calls Remove.
func (h *Hierarchy) Create(name string, r *Resources, onOOM func(kills uint64)) (_ *Group, err error) {
	g := &Group{dir: filepath.Join(h.dir, name), watch: h.watch, onOOM: onOOM, amounts: r.amounts}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close(), os.Remove(g.dir))
		}
	}()
	if g.fd, err = os.OpenFile(g.dir, unix.O_DIRECTORY, 0); err != nil {
		return nil, err
	}
	if err := r.apply(g.dir); err != nil {
		return nil, fmt.Errorf("linux.resources.%w", err)
	}
	if err := g.limitDevices(r.devices); err != nil {
		return nil, err
	}
	if err := h.watch.add(g); err != nil {
		return nil, err
	}
	return g, nil
}

// FD is a descriptor of the group's directory, to clone processes into it. It is
// valid until Remove.
func (g *Group) FD() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fd == nil {
		return -1
	}
	return int(g.fd.Fd())
}

// FDOf opens the directory of the group that the process is in: that of the
// container or one that the container has made below it. The caller closes it.
func (g *Group) FDOf(pid int) (*os.File, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	name := strings.TrimPrefix(strings.TrimSpace(string(data)), "0::/")
	root := filepath.Dir(filepath.Dir(g.dir))
	dir := filepath.Join(root, filepath.Clean("/"+name))
	if dir != g.dir && !strings.HasPrefix(dir, g.dir+"/") {
		return nil, fmt.Errorf("process %d is in cgroup %q", pid, name)
	}
	return os.OpenFile(dir, unix.O_DIRECTORY|unix.O_PATH, 0)
}

// Sub opens the directory of an existing group below this one, or of this one for "/". A path that leads out of it
// is refused, wherever it ends: errdefs.ErrInvalidArgument. The caller closes it.
func (g *Group) Sub(path string) (*os.File, error) {
	local := filepath.Join(".", strings.TrimLeft(path, "/"))
	if !filepath.IsLocal(local) {
		return nil, fault.New(errdefs.ErrInvalidArgument, "bad sub cgroup path: %s", path)
	}
	how := unix.OpenHow{
		Flags:   unix.O_DIRECTORY | unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	fd, err := unix.Openat2(g.FD(), local, &how)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Kill kills all processes in the group and below it, frozen ones too.
func (g *Group) Kill() error { return write(g.dir, "cgroup.kill", "1") }

// Freeze stops all processes, or lets them run again, and returns when they have.
func (g *Group) Freeze(ctx context.Context, frozen bool) error {
	value := "0"
	if frozen {
		value = "1"
	}
	if err := write(g.dir, "cgroup.freeze", value); err != nil {
		return err
	}
	return g.waitEvent(ctx, "frozen "+value)
}

// pollInterval bounds how long a wait overlooks the end of its context.
const pollInterval = 100 * time.Millisecond

// waitEvent waits until cgroup.events has the line.
func (g *Group) waitEvent(ctx context.Context, line string) error {
	f, err := os.Open(filepath.Join(g.dir, "cgroup.events"))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if n == 0 && err != nil {
			return fmt.Errorf("read cgroup.events: %w", err)
		}
		if strings.Contains("\n"+string(buf[:n]), "\n"+line+"\n") {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for cgroup to be %q: %w", line, context.Cause(ctx))
		}
		p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(p, int(pollInterval.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for cgroup: %w", err)
		}
	}
}

// Remove removes the group and those below it when all processes have ended; it
// waits for that until ctx ends. Idempotent.
func (g *Group) Remove(ctx context.Context) error {
	err := g.waitEvent(ctx, "populated 0")
	if errors.Is(err, fs.ErrNotExist) {
		return g.close()
	}
	if err != nil {
		return err
	}
	dirs, err := g.dirs()
	if err != nil {
		return err
	}
	for _, dir := range slices.Backward(dirs) { // children come after their parents
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
	return g.close()
}

func (g *Group) close() error {
	g.watch.remove(g)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fd == nil {
		return nil
	}
	err := g.fd.Close()
	g.fd = nil
	return err
}

// maxGroups bounds how many groups of a container's own are looked at.
const maxGroups = 10000

// dirs returns the directories of the group and of those that the container has
// made below it, parents first.
func (g *Group) dirs() ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(g.dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // it was removed meanwhile
		case err != nil:
			return err
		case len(dirs) >= maxGroups:
			return errors.New("too many cgroups")
		case d.IsDir():
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs, err
}

// Processes returns the pids of all processes in the group and below it.
func (g *Group) Processes() ([]int, error) {
	dirs, err := g.dirs()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
				continue // removed meanwhile, or a threaded group
			}
			return nil, err
		}
		for f := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

func write(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s to %q: %w", file, value, err)
	}
	return nil
}
