package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/bundle"
	"runv/internal/caller"
	"runv/internal/config"
	"runv/internal/hook"
	"runv/internal/hostcgroup"
	"runv/internal/join"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

const (
	// createSlack is what create may take beyond the boot of the VM: the share, the
	// container's mounts, the guest's part.
	createSlack = 30 * time.Second
	// undoTimeout bounds the removal of a container that could not be created.
	undoTimeout = 20 * time.Second
	// shutdownTimeout is how long a supervisor may take to end in good order
	// before it is killed.
	shutdownTimeout = 5 * time.Second
)

func (a *app) createCommand() *urfave.Command {
	var opts createOptions
	return &urfave.Command{
		Name:      "create",
		Usage:     "create a container up to the point where its program could run",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `Starts the virtual machine and prepares the container in it; "runv start" then
runs the program. The id must be unique below --root. Standard input, output
and error become those of the program; one that wants a terminal needs
--console-socket.

Examples:
   runv create --bundle /srv/web web
   runv create --bundle /srv/web --console-socket /tmp/tty.sock --pid-file /run/web.pid web`,
		Flags: opts.flags(),
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			opts.detach = true
			ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
			defer stop()
			c, err := a.create(ctx, id, opts)
			if err != nil {
				return err
			}
			c.close()
			return nil
		}),
	}
}

// createOptions are the flags that create and run share.
type createOptions struct {
	bundle        string
	consoleSocket string
	pidFile       string
	pidfdSocket   string
	preserveFDs   int
	noNewKeyring  bool
	detach        bool // of run; create always is
}

func (o *createOptions) flags() []urfave.Flag {
	return []urfave.Flag{
		&urfave.StringFlag{
			Name: "bundle", Aliases: []string{"b"}, Value: ".", Destination: &o.bundle, TakesFile: true,
			Usage: "`DIR` of the bundle",
		},
		&urfave.StringFlag{
			Name: "console-socket", Destination: &o.consoleSocket, TakesFile: true,
			Usage: "unix `SOCKET` that gets the master end of the process's terminal",
		},
		&urfave.StringFlag{
			Name: "pid-file", Destination: &o.pidFile, TakesFile: true,
			Usage: "write the pid of the container's stand-in to `FILE`",
		},
		pidfdSocketFlag(&o.pidfdSocket),
		preserveFDsFlag(&o.preserveFDs),
		&urfave.BoolFlag{Name: "no-pivot", Usage: "without effect; runc has it"},
		&urfave.BoolFlag{
			Name: "no-new-keyring", Destination: &o.noNewKeyring,
			Usage: "give the container no session keyring of its own",
		},
	}
}

func preserveFDsFlag(n *int) urfave.Flag {
	return &urfave.IntFlag{
		Name: "preserve-fds", Destination: n,
		Usage: "pass `N` more files; 0 only: files cannot be passed into a virtual machine",
	}
}

// check refuses combinations of flags, as runc does.
func (o *createOptions) check(terminal bool) error {
	if err := checkPreserveFDs(o.preserveFDs); err != nil {
		return err
	}
	if n := listenFDs(); n > 0 {
		return rpcerror.New(errdefs.ErrNotImplemented,
			fmt.Sprintf("LISTEN_FDS=%d: open files cannot be passed into a virtual machine", n))
	}
	return checkTerminal(o.detach, terminal, o.consoleSocket)
}

func checkPreserveFDs(n int) error {
	if n != 0 {
		return rpcerror.New(errdefs.ErrNotImplemented,
			fmt.Sprintf("--preserve-fds=%d: open files cannot be passed into a virtual machine", n))
	}
	return nil
}

// listenFDs is the number of sockets that systemd has opened for this process to serve, which runc
// gives to the container.
func listenFDs() int {
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0
	}
	return n
}

func checkTerminal(detach, terminal bool, consoleSocket string) error {
	if detach && terminal && consoleSocket == "" {
		return errors.New("cannot allocate tty if runv will detach without setting console socket")
	}
	if (!detach || !terminal) && consoleSocket != "" {
		return errors.New("cannot use console socket if runv will not detach or allocate tty")
	}
	return nil
}

// created is a container that create has made, and the way to its supervisor.
type created struct {
	id         string
	store      *state.Store
	supervisor *supervisor
	standIn    *standIn
	tty        *userTerminal // nil: the program has none, or this command does not stay
	hooks      specs.Hooks
}

func (c *created) close() { c.supervisor.close() }

// create makes a container, in a pod of its own unless it shares something with others. When it
// fails, or ctx ends before it is done, everything is taken back. The caller closes the result.
func (a *app) create(ctx context.Context, id string, opts createOptions) (_ *created, err error) {
	b, err := a.loadBundle(opts.bundle)
	if err != nil {
		return nil, err
	}
	if err := hostcgroup.Check(b.Spec.Linux.CgroupsPath, a.systemdCgroup); err != nil {
		return nil, err
	}
	inherited, err := inherited()
	if err != nil {
		return nil, err
	}
	caller.FreeFiles()
	terminal := b.Spec.Process != nil && b.Spec.Process.Terminal
	if err := opts.check(terminal); err != nil {
		return nil, err
	}
	var tty *userTerminal
	if terminal && !opts.detach {
		if tty, err = a.findTerminal(); err != nil {
			return nil, err
		}
	}
	if os.Getenv("NOTIFY_SOCKET") != "" {
		a.warn("NOTIFY_SOCKET: ignored: what runs in a virtual machine cannot reach it")
	}
	var hooks specs.Hooks
	if b.Spec.Hooks != nil {
		hooks = *b.Spec.Hooks
	}
	cfg, err := a.loadConfig()
	if err != nil {
		return nil, err
	}
	store, err := a.openStore()
	if err != nil {
		return nil, err
	}
	plan, err := findShared(store, b)
	if err != nil {
		return nil, err
	}
	net, err := openNetNS(b)
	if err != nil {
		return nil, err
	}
	defer net.close()
	var undo undo
	defer func() {
		if err == nil {
			return
		}
		if undoErr := undo.run(); undoErr != nil {
			a.warn("undo create %s: %v", id, undoErr)
		}
	}()

	podID, err := a.reserve(ctx, store, plan, id, b, &undo)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	var sup *supervisor
	if plan.Pod != "" {
		sup, err = a.joinPod(ctx, store, plan, id, hooks, &undo)
	} else {
		var process *supervisorProcess
		defer func() {
			if err == nil || process == nil || namesContainer(err, id) { // then it is the supervisor's own word
				return
			}
			if end := process.died(); end != nil { // which is the cause, whatever it broke
				err = fmt.Errorf("supervisor died (%w): %w", end, err)
			}
		}()
		sup, process, err = a.startPod(ctx, cfg, store, podID, hooks, &undo)
	}
	if err != nil {
		return nil, err
	}
	a.log.Debug("supervisor serves", "container", id, "pod", podID, "after", time.Since(began))
	standIn, err := a.startStandIn(ctx, store.PodDir(podID), standInOptions{
		terminal: terminal, consoleSocket: opts.consoleSocket, foreground: !opts.detach, net: net, init: true,
	})
	if err != nil {
		return nil, err
	}
	undo.push(standIn.kill)
	a.log.Debug("stand-in is connected", "container", id, "pid", standIn.pid(), "after", time.Since(began))

	limit := cfg.BootTimeout + createSlack
	//nolint:staticcheck // prestart is deprecated, and used
	for _, list := range [][]specs.Hook{hooks.Prestart, hooks.CreateRuntime, hooks.CreateContainer} {
		limit += hook.Timeouts(list, 0) // one without a timeout has what the others leave
	}
	callCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err = sup.containers.Create(callCtx, &supervisorv1.CreateRequest{
		Id: id, Bundle: b.Dir, Standin: standIn.token(), NoNewKeyring: opts.noNewKeyring,
		//nolint:staticcheck // prestart is deprecated, and used
		Inherited: inherited, Environment: hookEnv(hooks.Prestart, hooks.CreateRuntime, hooks.Poststart, hooks.Poststop),
	})
	if err != nil {
		if ctx.Err() != nil { // the user has ended it
			err = context.Cause(ctx)
		}
		return nil, err
	}
	if err := standIn.process.ShowRoot(rootOf(b)); err != nil {
		return nil, err
	}
	a.log.Debug("container is created", "container", id, "after", time.Since(began))
	if err := sendPidfd(ctx, opts.pidfdSocket, "standard", standIn.pid()); err != nil {
		return nil, err
	}
	if opts.pidFile != "" {
		if err := writePidFile(opts.pidFile, standIn.pid()); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	undo.release()
	return &created{id: id, store: store, supervisor: sup, standIn: standIn, tty: tty, hooks: hooks}, nil
}

// loadBundle checks a bundle early: nothing has to be undone when it is bad.
func (a *app) loadBundle(dir string) (*bundle.Bundle, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("--bundle: %w", err)
	}
	b, err := bundle.Load(abs)
	if err != nil {
		return nil, err
	}
	for _, w := range b.Warnings {
		a.warn("%s", w)
	}
	a.log.Debug("bundle is valid", "bundle", b.Dir, "rootfs", b.Rootfs, "mounts", len(b.Spec.Mounts))
	return b, nil
}

// reserve takes the id, and makes a pod's directory unless the container joins one.
func (a *app) reserve(ctx context.Context, store *state.Store, plan join.Plan, id string, b *bundle.Bundle, undo *undo) (podID string, err error) {
	if err := store.SweepPods(ctx); err != nil {
		a.warn("%v", err) // dead pods do not keep a new one from living
	}
	if podID = plan.Pod; podID == "" {
		podID = newPodID()
	}
	now := time.Now().UTC()
	trees, mounts := writableTrees(b)
	err = store.ReserveContainer(state.Container{
		ID: id, PodID: podID, Bundle: b.Dir, Rootfs: b.Rootfs, OCIVersion: b.Spec.Version, Status: state.Creating,
		Created: now, Annotations: b.Spec.Annotations, Owner: os.Geteuid(), Terminal: b.Spec.Process.Terminal, Writable: trees,
	})
	if errdefs.IsAlreadyExists(err) {
		return "", rpcerror.New(errdefs.ErrAlreadyExists, "container with given ID already exists")
	}
	if err != nil {
		return "", err
	}
	undo.push(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if plan.Pod != "" {
			return leavePod(ctx, store, podID, id)
		}
		// The container's record may have gone before its pod's.
		return errors.Join(a.purge(ctx, store, id), store.RemovePod(podID))
	})
	for _, w := range overlaps(store, podID, trees, mounts) {
		a.warn("%s", w)
	}
	if plan.Pod == "" {
		return podID, store.CreatePod(state.Pod{ID: podID, Created: now})
	}
	return podID, nil
}

// startPod starts the supervisor of a new pod. The process is told, too, when it does not serve.
func (a *app) startPod(ctx context.Context, cfg *config.Effective, store *state.Store, podID string, hooks specs.Hooks, undo *undo) (*supervisor, *supervisorProcess, error) {
	process, err := a.launch(ctx, cfg, podID, store.PodDir(podID))
	if err != nil {
		return nil, nil, err
	}
	undo.push(func() error { process.kill(); return nil })
	sup, err := dial(ctx, store.PodDir(podID))
	if err != nil {
		return nil, process, err
	}
	undo.push(func() error {
		sup.shutdown()
		process.await(shutdownTimeout + hook.Timeouts(hooks.Poststop, hook.Unbounded)) // it removes its own traces
		return nil
	})
	return sup, process, nil
}

// newPodID is unique without anybody being asked: 80 random bits.
func newPodID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// shutdown asks the supervisor to end in good order, for a short time.
func (s *supervisor) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	_, _ = s.pod.Shutdown(ctx, &supervisorv1.ShutdownRequest{})
	s.close()
}

// writePidFile makes a file appear with its content at once: its readers wait
// for it.
func writePidFile(path string, pid int) error {
	dir, name := filepath.Split(path)
	tmp := filepath.Join(dir, "."+name)
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_SYNC, 0o666)
	if err != nil {
		return fmt.Errorf("--pid-file: %w", err)
	}
	_, err = f.WriteString(strconv.Itoa(pid))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return fmt.Errorf("--pid-file: %w", errors.Join(err, os.Remove(tmp)))
	}
	return nil
}

// loadConfig reads the configuration as the global flags say.
func (a *app) loadConfig() (*config.Effective, error) {
	return config.Load(config.Overrides{File: a.configFile, GuestDir: a.guestDir})
}
