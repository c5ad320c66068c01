// Package hostcgroup owns the cgroups of a pod's containers on the host: for each the one that its linux.cgroupsPath
// names, or the one that runc would make without it, of cgroup v1 or v2, made by hand or by systemd.
//
// In each is the stand-in of its container, as the init is under runc. The cgroup of the first container is the pod's: in it are the VMM with
// its helpers, too, which never run anywhere else. That of a further container limits nothing; it is there for callers who
// watch it. The supervisor is not: when the kernel kills for want
// of memory somebody must live who tells of it. The limits of the containers, added up by the pod, bound
// the VM and what it takes on the host beyond that; limits.go says by how much.
//
// The supervisor makes a Group for its pod; the state directory keeps a Record of it, from which
// whoever cleans up after a dead supervisor removes it. The package signals no process and moves none
// but the stand-in. Like runc it leaves alone the parents of a cgroup, also those that it has made.
package hostcgroup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Config is what all containers of a host share.
type Config struct {
	Systemd bool // --systemd-cgroup: systemd makes the cgroup
	// Overhead is what the VMM and its helpers may take of the host's memory beyond the VM's, in
	// bytes, when the container's memory is limited.
	Overhead int64
	Log      *slog.Logger
}

// Container is whose cgroup is made.
type Container struct {
	ID        string
	Path      string                // linux.cgroupsPath
	Resources *specs.LinuxResources // nil: no limits
	VMMemory  int64                 // bytes
}

// Group is a cgroup of a pod. Its methods are safe for concurrent use.
type Group struct {
	cfg Config
	// noDevices: the host has no controller of devices, which would be joined as under runc.
	noDevices bool

	mu      sync.Mutex
	manager cgroups.Manager // nil: there is no cgroup
	record  Record
	places  []place // where Start puts processes; the v1 part
	unified string  // the v2 part; empty: none
	period  uint64  // of the CPU quota, µs; 0: the kernel's default
	kills   uint64  // of the kernel's for want of memory, at the beginning
}

// place is a cgroup in a hierarchy of v1, and where this process itself is in that.
type place struct{ in, own string }

// New makes a Group that does not exist on the host yet.
func New(cfg Config) *Group {
	_, err := cgroups.FindCgroupMountpoint("", "devices")
	return &Group{cfg: cfg, noDevices: err != nil}
}

// Check tells whether linux.cgroupsPath can be asked for: the error names what is wrong.
func Check(path string, bySystemd bool) error {
	if bySystemd && !systemd.IsRunningSystemd() {
		return errdefs.ErrFailedPrecondition.WithMessage("--systemd-cgroup: systemd is not running on this host")
	}
	if _, err := configOf(Container{ID: "x", Path: path}, bySystemd); err != nil {
		return fmt.Errorf("linux.cgroupsPath: %w", err)
	}
	return nil
}

// configOf translates linux.cgroupsPath as runc does.
func configOf(c Container, bySystemd bool) (*cgroups.Cgroup, error) {
	cg := &cgroups.Cgroup{Systemd: bySystemd}
	switch {
	case !bySystemd && c.Path == "":
		cg.Name = c.ID // below the caller's own cgroup
	case !bySystemd:
		cg.Path = filepath.Clean(c.Path)
		if !filepath.IsAbs(cg.Path) { // below the caller's own cgroup, too, but never outside of it
			cg.Path = strings.TrimPrefix(filepath.Clean("/"+cg.Path), "/")
		}
		if cg.Path == "" || cg.Path == "/" {
			return nil, invalid("%q is the root of all cgroups", c.Path)
		}
	case c.Path == "":
		cg.ScopePrefix, cg.Name = "runv", c.ID
	default:
		parts := strings.Split(c.Path, ":")
		if len(parts) != 3 || parts[2] == "" || strings.Contains(c.Path, "/") {
			return nil, invalid("%q is not of the form slice:prefix:name, which --systemd-cgroup demands", c.Path)
		}
		cg.Parent, cg.ScopePrefix, cg.Name = parts[0], parts[1], parts[2]
		if cg.Parent != "" {
			if _, err := systemd.ExpandSlice(cg.Parent); err != nil {
				return nil, invalid("%q: %v", c.Path, err)
			}
		}
	}
	return cg, nil
}

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

// Create makes the cgroup with the container's limits, all but those of CPU time, quota and shares, which the VM's boot
// does not have. Systemd makes none without a process: it gets the one with this pid, which else is
// for Join. Create calls save before the cgroup exists
// and when it does. After an error, too, Remove is to be called. Where cgroups cannot be made and
// nobody asked for one, neither by name nor by a limit, it is content without.
func (g *Group) Create(c Container, pid int, save func(Record)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.create(c, pid, save)
	switch {
	case err == nil:
		return nil
	case c.Path != "":
		return fmt.Errorf("linux.cgroupsPath: %w", err)
	case g.cfg.Systemd:
		return fmt.Errorf("--systemd-cgroup: %w", err)
	case limited(c.Resources):
		return fmt.Errorf("linux.resources: %w", err)
	}
	g.cfg.Log.Warn("the VM runs in the caller's cgroup", "container", c.ID, "why", err)
	return nil
}

// Add makes the cgroup of a further container of a pod, and puts the process with this pid into it. The container's limits are
// for the pod's cgroup, where the VM is, so this one has none. Add calls save as Create does. After an error Remove is to be
// called, when the process is elsewhere.
func (g *Group) Add(id, path string, pid int, save func(Record)) error {
	g.mu.Lock()
	err := g.create(Container{ID: id, Path: path}, pid, save)
	g.mu.Unlock()
	if err != nil {
		return err
	}
	return g.Join(pid)
}

// create makes the cgroup. g.mu is held.
func (g *Group) create(c Container, pid int, save func(Record)) error {
	config, err := configOf(c, g.cfg.Systemd)
	if err != nil {
		return err
	}
	config.Resources = g.limits(c.Resources, c.VMMemory, false)
	m, paths, err := newManager(config)
	if err != nil {
		return err
	}
	if err := unused(paths); err != nil {
		return err
	}
	save(plannedRecord(config, paths))
	if !g.cfg.Systemd {
		pid = -1
	}
	err = m.Apply(pid)
	g.record = madeRecord(config, paths)
	save(g.record)
	if err != nil {
		return err
	}
	g.adapt(config.Resources, paths)
	if err := m.Set(config.Resources); err != nil {
		return err
	}
	places, unified, err := findPlaces(paths)
	if err != nil {
		return err
	}
	g.manager, g.places, g.unified = m, places, unified
	g.kills = g.oomKills()
	return nil
}

// newManager returns who makes the cgroup, and where.
func newManager(config *cgroups.Cgroup) (cgroups.Manager, map[string]string, error) {
	m, err := manager.New(config)
	if err != nil {
		return nil, nil, err
	}
	paths := maps.Clone(m.GetPaths())
	if _, hybrid := paths[""]; !hybrid || cgroups.IsCgroup2UnifiedMode() || config.Systemd || filepath.IsAbs(config.Path) {
		return m, paths, nil
	}
	// The manager of v1 takes the root of a v2 hierarchy beside it for this process's own cgroup.
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		return nil, nil, err
	}
	root, err := cgroups.FindCgroupMountpoint("", "")
	if err != nil {
		return nil, nil, err
	}
	paths[""] = filepath.Join(root, own[""], strings.TrimPrefix(paths[""], root))
	m, err = manager.NewWithPaths(config, maps.Clone(paths))
	return m, paths, err
}

// unused refuses a cgroup in which there are processes already: they would be bound by limits that
// are not theirs.
func unused(paths map[string]string) error {
	for _, path := range paths {
		pids, err := cgroups.GetAllPids(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if len(pids) > 0 {
			return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("%s is not empty: %d processes", path, len(pids)))
		}
	}
	return nil
}

// findPlaces sorts the cgroup's directories, leaving out those of hierarchies in which there is
// none: v1 has hierarchies that need not be joined.
func findPlaces(paths map[string]string) (places []place, unified string, err error) {
	for _, name := range slices.Sorted(maps.Keys(paths)) {
		path := paths[name]
		if !cgroups.PathExists(path) {
			continue
		}
		if name == "" {
			unified = path
			continue
		}
		own, err := cgroups.GetOwnCgroupPath(name)
		if err != nil {
			return nil, "", err
		}
		places = append(places, place{in: path, own: own})
	}
	return places, unified, nil
}

// Join puts a process with all its threads into the cgroup. Under v1 that may take the kernel 15 ms,
// which the start of the VM need not wait for. It does nothing without a cgroup.
func (g *Group) Join(pid int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.cfg.Systemd {
		return nil
	}
	dirs := []string{}
	for _, p := range g.places {
		dirs = append(dirs, p.in)
	}
	if g.unified != "" {
		dirs = append(dirs, g.unified)
	}
	for _, dir := range dirs {
		if err := cgroups.WriteCgroupProc(dir, pid); err != nil {
			return fmt.Errorf("enter cgroup %s: %w", dir, err)
		}
	}
	return nil
}

// Limit sets the container's limits, those of CPU time included. It does nothing without a cgroup.
func (g *Group) Limit(r *specs.LinuxResources, vmMemory int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.manager == nil {
		return nil
	}
	resources := g.limits(r, vmMemory, true)
	g.adapt(resources, g.manager.GetPaths())
	if err := g.manager.Set(resources); err != nil {
		return fmt.Errorf("linux.resources: limit %s: %w", g.record, err)
	}
	return nil
}

// Remove removes the cgroup, waiting until ctx ends for processes in it that are ending. Idempotent.
func (g *Group) Remove(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.record.Remove(ctx); err != nil {
		return err
	}
	g.manager, g.record, g.places, g.unified = nil, Record{}, nil, ""
	return nil
}
