// Package container creates and controls the guest's containers and their
// processes. internal/guest/server calls it for the host's requests.
//
// A container is created by starting a stage (internal/guest/stage), which sets
// it up from inside and then waits; the start lets it become the user's program.
//
//	creating ──► created ──► running ──► stopped
//	               └───────────────────────▲
//
// The end of init stops the container. Paused is a property of a container that is
// created or running. No lock is held while a process is started, waited for or
// written to.
package container

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/cgroup"
	"runv/internal/guest/eventlog"
	"runv/internal/guest/fault"
	"runv/internal/guest/reaper"
	"runv/internal/guest/stage"
	"runv/internal/guest/stdio"
)

// Config is what a Set works with.
type Config struct {
	Exe     string // executable that runs stage.Main under the name stage.Name
	Reaper  *reaper.Reaper
	Events  *eventlog.Log
	Cgroups Cgroups
	// Networks has the networks that containers may be in; nil: there are none.
	Networks Networks
	Log      *slog.Logger
}

// Cgroups makes control groups; cgroup.Hierarchy does.
type Cgroups interface {
	Create(name string, r *cgroup.Resources, onOOM func(kills uint64)) (*cgroup.Group, error)
}

// Set is all containers of the guest. It is safe for concurrent use.
type Set struct {
	Config
	pidNS int // descriptor of the agent's own pid namespace

	mu   sync.Mutex
	byID map[string]*Container
}

// NewSet makes an empty set.
func NewSet(cfg Config) (*Set, error) {
	fd, err := unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &Set{Config: cfg, pidNS: fd, byID: make(map[string]*Container)}, nil
}

type status string

const (
	creating status = "creating" // init's stage is at work
	created  status = "created"  // init waits for Start
	running  status = "running"  // init is the user's program
	stopped  status = "stopped"  // init has ended
)

// Container is one container.
type Container struct {
	set        *Set
	id         string
	paths      []string // of the root and of what is bound
	namespaces namespaces
	shared     stage.Shared
	group      *cgroup.Group

	mu       sync.Mutex
	status   status
	paused   bool
	starting int           // execs between their admission and their becoming the program
	started  chan struct{} // closed when starting comes to 0; nil: it is
	deleting bool
	init     *process
	execs    map[string]*process
	lingers  map[*process]struct{} // whose output is still copied
}

// Get returns the container, or a not-found error.
func (s *Set) Get(id string) (*Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.byID[id]
	if !ok {
		return nil, fault.New(errdefs.ErrNotFound, "container %q does not exist", id)
	}
	return c, nil
}

// All returns all containers.
func (s *Set) All() []*Container {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Container, 0, len(s.byID))
	for _, c := range s.byID {
		all = append(all, c)
	}
	return all
}

func (s *Set) reserve(c *Container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.byID[c.id]; ok {
		return fault.New(errdefs.ErrAlreadyExists, "container %q exists", c.id)
	}
	s.byID[c.id] = c
	return nil
}

// forget tells whether it was the one to remove the container from the set.
func (s *Set) forget(c *Container) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.byID[c.id] == c
	if known {
		delete(s.byID, c.id)
	}
	return known
}

// validID tells whether id can be a file name.
func validID(id string) bool {
	return id != "" && len(id) <= 255 && id != "." && id != ".." && filepath.Base(id) == id
}

// Create creates a container, as the request says it, and returns the pid of its init, which waits
// for Start. streams are the caller's to close when Create fails, and else the container's.
func (s *Set) Create(ctx context.Context, r *agentv1.CreateRequest, streams stdio.Streams) (pid int, err error) {
	id := r.Id
	if !validID(id) {
		return 0, invalid("container id %q is not valid", id)
	}
	spec, err := parseSpec(r.Spec)
	if err != nil {
		return 0, err
	}
	c := &Container{
		set: s, id: id, status: creating,
		execs: make(map[string]*process), lingers: make(map[*process]struct{}),
	}
	ns := &c.namespaces
	if *ns, err = translateNamespaces(spec.Linux); err != nil {
		return 0, err
	}
	defer func() {
		ns.close()
		if err != nil {
			s.release(ns)
		}
	}()
	if err := s.find(ns); err != nil {
		return 0, err
	}
	cfg, err := translateInit(spec, ns)
	if err != nil {
		return 0, err
	}
	if cfg.Container.Hooks, err = translateHooks(id, r.Bundle, spec); err != nil {
		return 0, err
	}
	resources, err := cgroup.Translate(spec.Linux.Resources)
	if err != nil {
		return 0, invalid("linux.resources: %w", err)
	}
	if cfg.Process.Shared, err = translateShared(spec.Linux); err != nil {
		return 0, err
	}
	if cfg.Process.Shared.Seccomp, err = translateSeccomp(r.Seccomp); err != nil {
		return 0, err
	}
	if !r.NoNewKeyring {
		cfg.Process.Shared.Keyring = "_ses." + id // runc's name
	}
	c.shared = cfg.Process.Shared
	outside, err := inherit(cfg, r.Inherited)
	if err != nil {
		return 0, err
	}
	if err := s.reserve(c); err != nil {
		return 0, err
	}
	c.paths = []string{spec.Root.Path}
	for i := range cfg.Container.Mounts {
		if m := &cfg.Container.Mounts[i]; m.Type == "bind" && !m.Inside {
			c.paths = append(c.paths, m.Source)
		}
	}
	if err := c.create(ctx, cfg, outside, resources, r.Stdio, streams); err != nil {
		s.forget(c)
		dropCached(c.paths, dropAttempts)
		return 0, err
	}
	return c.init.pid, nil
}

// dropCached makes the kernel let go of what it has cached of a container's files when the host has
// taken them away: a name whose time of cacheLifetime is over is looked up again, and with one that has
// gone goes all that is cached below it. Otherwise it would stay until the machine needs the memory, and
// the host's file server keeps each file open that is cached here. What other containers use stays.
func dropCached(paths []string, attempts int) {
	time.AfterFunc(2*cacheLifetime, func() {
		left := slices.DeleteFunc(paths, func(path string) bool {
			_, err := os.Lstat(path)
			return err != nil
		})
		if len(left) > 0 && attempts > 1 {
			dropCached(left, attempts-1) // the host is busy
		}
	})
}

const (
	// cacheLifetime is how long the host lets names be cached.
	cacheLifetime = time.Second
	dropAttempts  = 5
)

func translateInit(spec *specs.Spec, ns *namespaces) (*stage.Config, error) {
	p, err := translateProcess(spec.Process)
	if err != nil {
		return nil, err
	}
	c, err := translateContainer(spec, ns)
	if err != nil {
		return nil, err
	}
	return &stage.Config{Process: *p, Container: c, UserNS: ns.user()}, nil
}

func (c *Container) create(ctx context.Context, cfg *stage.Config, outside scheduling, r *cgroup.Resources, files *agentv1.Stdio, streams stdio.Streams) (err error) {
	c.group, err = c.set.Cgroups.Create(c.id, r, func(kills uint64) {
		c.set.Events.Append(&agentv1.Event{ContainerId: c.id, Kind: &agentv1.Event_Oom{Oom: &agentv1.OOM{Kills: kills}}})
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.removeGroup())
		}
	}()
	if c.namespaces.user() && cfg.Container.NewCgroupNS {
		if err := c.namespaces.delegate(c.group.FD()); err != nil {
			return err
		}
	}
	p, err := c.launch(ctx, launchOptions{scheduling: outside, files: files}, cfg, streams)
	if err != nil {
		if c.group.OOMKills() > 0 {
			err = fault.New(errdefs.ErrResourceExhausted, "container init was killed for want of memory; the memory limit is too low: %w", err)
		}
		return err
	}
	c.mu.Lock()
	c.init = p
	c.status = created
	c.mu.Unlock()
	p.announce()
	return nil
}

// removeTimeout bounds the wait for killed processes to end.
const removeTimeout = 10 * time.Second

func (c *Container) removeGroup() error {
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	return errors.Join(c.group.Kill(), c.group.Remove(ctx))
}

func (c *Container) wrongState(verb string) error {
	s := string(c.status)
	if c.paused {
		s = "paused"
	}
	return fault.New(errdefs.ErrFailedPrecondition, "cannot %s container %q: it is %s", verb, c.id, s)
}

// Start lets init become the user's program, and returns when it has or could not. A
// hook that does not let it get there until ctx ends is killed with the container.
func (c *Container) Start(ctx context.Context) error {
	c.mu.Lock()
	if c.status != created || c.paused {
		defer c.mu.Unlock()
		return c.wrongState("start")
	}
	c.status = running // the one start there is
	p := c.init
	c.mu.Unlock()
	if err := p.ctl.Start(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(err, c.group.Kill())
		}
		return err
	}
	p.ctl.Close()
	return nil
}

// Exec starts a process in the container and returns its pid when it has become
// the program. streams are as in Create.
func (c *Container) Exec(ctx context.Context, r *agentv1.ExecRequest, streams stdio.Streams) (int, error) {
	execID := r.ExecId
	if !validID(execID) {
		return 0, invalid("exec id %q is not valid", execID)
	}
	spec, err := parseProcess(r.Process)
	if err != nil {
		return 0, err
	}
	sp, err := translateProcess(spec)
	if err != nil {
		return 0, err
	}
	if err := translateAffinity(sp, spec.ExecCPUAffinity); err != nil {
		return 0, err
	}
	sp.Shared = c.shared
	if err := c.reserveExec(execID); err != nil {
		return 0, err
	}
	cfg := &stage.Config{
		Process: *sp,
		Join:    c.namespaces.flags &^ (unix.CLONE_NEWPID | singleThreaded),
		UserNS:  c.namespaces.user(),
	}
	outside, err := inherit(cfg, r.Inherited)
	var p *process
	if err == nil {
		p, err = c.launch(ctx, launchOptions{execID: execID, cgroup: r.Cgroup, scheduling: outside, files: r.Stdio}, cfg, streams)
	}
	c.mu.Lock()
	if c.starting--; c.starting == 0 {
		close(c.started)
		c.started = nil
	}
	if err != nil {
		delete(c.execs, execID)
		c.mu.Unlock()
		return 0, err
	}
	c.execs[execID] = p
	c.mu.Unlock()
	p.announce()
	return p.pid, nil
}

func (c *Container) reserveExec(execID string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if (c.status != created && c.status != running) || c.paused || c.deleting {
		return c.wrongState("exec in")
	}
	if _, ok := c.execs[execID]; ok {
		return fault.New(errdefs.ErrAlreadyExists, "exec %q exists in container %q", execID, c.id)
	}
	c.execs[execID] = nil
	if c.starting == 0 {
		c.started = make(chan struct{})
	}
	c.starting++
	return nil
}

// Delete kills what is left of the container and removes it.
func (c *Container) Delete(ctx context.Context) error {
	c.mu.Lock()
	if c.status == creating {
		defer c.mu.Unlock()
		return c.wrongState("delete")
	}
	c.deleting = true
	processes := c.processes()
	c.mu.Unlock()

	if err := c.group.Kill(); err != nil {
		return err
	}
	for _, p := range processes {
		select {
		case <-p.gone:
		case <-ctx.Done():
			return fault.New(context.Cause(ctx), "delete container %q: process %d does not end", c.id, p.pid)
		}
	}
	if err := c.group.Remove(ctx); err != nil {
		return err
	}
	if c.set.forget(c) {
		c.set.release(&c.namespaces)
		dropCached(c.paths, dropAttempts)
	}
	for _, p := range processes {
		p.close()
	}
	return nil
}

// processes returns all that are or were started and not closed. The caller
// holds c.mu.
func (c *Container) processes() []*process {
	all := []*process{c.init}
	for _, p := range c.execs {
		if p != nil {
			all = append(all, p)
		}
	}
	for p := range c.lingers {
		all = append(all, p)
	}
	return all
}

// Pause freezes all processes, and returns when they are. It lets the execs that are on their way
// become their programs: the agent waits in a fork until its child has left its memory, and
// would itself hang with a child that is frozen before.
func (c *Container) Pause(ctx context.Context) error {
	c.mu.Lock()
	if c.status != created && c.status != running {
		defer c.mu.Unlock()
		return c.wrongState("pause")
	}
	before := c.paused
	c.paused = true // no more execs
	started := c.started
	c.mu.Unlock()
	if started != nil {
		select {
		case <-started:
		case <-ctx.Done():
			c.mu.Lock()
			c.paused = before
			c.mu.Unlock()
			return fault.New(context.Cause(ctx), "pause container %q: a process does not become its program", c.id)
		}
	}
	if err := c.group.Freeze(ctx, true); err != nil {
		return errors.Join(err, c.Resume(context.WithoutCancel(ctx)))
	}
	return nil
}

// Resume lets all processes run again.
func (c *Container) Resume(ctx context.Context) error {
	c.mu.Lock()
	if c.status != created && c.status != running {
		defer c.mu.Unlock()
		return c.wrongState("resume")
	}
	c.mu.Unlock()
	if err := c.group.Freeze(ctx, false); err != nil {
		return err
	}
	c.mu.Lock()
	c.paused = false
	c.mu.Unlock()
	return nil
}

// Update changes limits, given as resources of a specification in JSON, and returns those
// that are in effect, by file of cgroup v2.
func (c *Container) Update(resourcesJSON []byte) (map[string]string, error) {
	resources, err := parseResources(resourcesJSON)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.status != created && c.status != running {
		defer c.mu.Unlock()
		return nil, c.wrongState("update")
	}
	c.mu.Unlock()
	if err := c.group.Update(resources); err != nil {
		return nil, err
	}
	return c.group.InEffect(), nil
}

// Stats reads the container's counters.
func (c *Container) Stats() (cgroup.Stats, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status == creating {
		return cgroup.Stats{}, c.wrongState("read statistics of")
	}
	return c.group.Stats(), nil
}

// find returns the process that has not exited.
func (c *Container) find(execID string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.init
	if execID != "" {
		p = c.execs[execID]
	}
	if p == nil || p.exited {
		name := "init"
		if execID != "" {
			name = execID
		}
		return nil, fault.New(errdefs.ErrNotFound, "process %q of container %q is not running", name, c.id)
	}
	return p, nil
}

// Resize sets the window size of a process's terminal.
func (c *Container) Resize(execID string, width, height uint32) error {
	p, err := c.find(execID)
	if err != nil {
		return err
	}
	if width > 0xffff || height > 0xffff {
		return invalid("resize terminal: %d by %d is too large", width, height)
	}
	if err := p.io.Resize(uint16(width), uint16(height)); err != nil {
		return invalid("resize terminal: %w", err)
	}
	return nil
}
