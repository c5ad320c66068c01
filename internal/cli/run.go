package cli

import (
	"context"
	"errors"
	"os"
	"os/signal"

	"github.com/containerd/errdefs"
	urfave "github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/hook"
	"runv/internal/standin"
	"runv/internal/state"
)

func (a *app) runCommand() *urfave.Command {
	var opts createOptions
	var keep bool
	flags := append(opts.flags(),
		&urfave.BoolFlag{Name: "detach", Aliases: []string{"d"}, Destination: &opts.detach, Usage: "return when the program runs"},
		&urfave.BoolFlag{Name: "keep", Destination: &keep, Usage: "do not delete the container after its end"},
		&urfave.BoolFlag{Name: "no-subreaper", Usage: "without effect; runc has it"},
	)
	return &urfave.Command{
		Name:      "run",
		Usage:     "create and start a container, and wait for its end",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `Signals are passed on to the program, the size of the terminal, too. The exit
status is that of the program, 128+n after signal n; the container is deleted
afterwards.

Examples:
   runv run --bundle /srv/web web
   echo 'uname -r' | runv run --bundle /srv/web web
   runv run --detach --bundle /srv/web web </dev/null >web.log 2>&1`,
		Flags: flags,
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			return a.run(ctx, id, opts, keep)
		}),
	}
}

func (a *app) run(ctx context.Context, id string, opts createOptions, keep bool) error {
	createCtx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	c, err := a.create(createCtx, id, opts)
	if err != nil {
		return err
	}
	defer c.close()
	if opts.detach {
		if err := c.start(createCtx); err != nil {
			return errors.Join(err, a.removeAfterwards(ctx, c))
		}
		a.log.Debug("program runs", "container", id)
		return nil
	}
	err = a.attend(ctx, stop, c)
	if exit := (*exitError)(nil); err == nil || errors.As(err, &exit) {
		if keep {
			return err
		}
		if rmErr := a.removeAfterwards(ctx, c); rmErr != nil {
			a.warn("delete %s: %v", id, rmErr)
		}
		a.log.Debug("container is removed", "container", id)
		return err
	}
	return errors.Join(err, a.removeAfterwards(ctx, c))
}

// attend starts the program and is its foreground until its end: terminal,
// signals. A status other than 0 is an *exitError. release is called when
// SIGINT and SIGTERM are the program's and no longer ours.
func (a *app) attend(ctx context.Context, release func(), c *created) error {
	if c.tty != nil {
		if err := c.tty.makeRaw(); err != nil {
			return err
		}
		defer c.tty.restore()
		stop := c.tty.follow(ctx, a.resizer(c.supervisor, c.id, ""))
		defer stop()
	}
	stop := a.forwardSignals(c.standIn.signal)
	defer stop()
	release()
	if err := c.start(ctx); err != nil {
		if errdefs.IsUnavailable(err) && c.hasRun() {
			return &exitError{status: statusKilled, err: errSupervisorGone}
		}
		return err
	}
	a.log.Debug("program runs", "container", c.id)
	status, err := c.standIn.wait()
	if err != nil {
		return err
	}
	a.log.Debug("program has ended", "container", c.id, "status", status)
	c.awaitDelivery(ctx)
	// A supervisor writes down how a container has ended before the stand-in ends. Only the
	// status of a stand-in that has lost its supervisor needs that proof: disks are full at times.
	record, err := c.store.LoadContainer(c.id)
	if err == nil && record.ExitStatus == nil && status == standin.StatusKilled {
		return &exitError{status: status, err: errSupervisorGone}
	}
	if status != 0 {
		return &exitError{status: status, err: podFailure(c.store, record.PodID)}
	}
	return nil
}

// hasRun tells whether the program of a container has run, as its record says: a supervisor that
// dies just then can no longer answer that it has.
func (c *created) hasRun() bool {
	record, err := c.store.LoadContainer(c.id)
	return err == nil && record.Status != state.Creating && record.Status != state.Created
}

// podFailure tells why a pod's VM has ended, if nobody asked it to.
func podFailure(store *state.Store, podID string) error {
	if pod, err := store.LoadPod(podID); err == nil && pod.Failure != "" {
		return errors.New(pod.Failure)
	}
	return nil
}

// awaitDelivery waits until whoever reads the program's output has all of it: a pager
// may take hours, and removing the container would take the rest away. SIGINT and the like end it.
func (c *created) awaitDelivery(ctx context.Context) {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	// An error is that of a supervisor that has ended: there is nothing to wait for then.
	_, _ = c.supervisor.processes.Wait(ctx, &supervisorv1.WaitRequest{ContainerId: c.id})
}

func (c *created) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout(c.hooks))
	defer cancel()
	_, err := c.supervisor.containers.Start(ctx, &supervisorv1.StartRequest{Id: c.id})
	return err
}

// removeAfterwards deletes a container that run has made, whatever its state.
func (a *app) removeAfterwards(ctx context.Context, c *created) error {
	limit := callTimeout + forceTimeout + hook.Timeouts(c.hooks.Poststop, hook.Unbounded)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	return a.remove(ctx, c.id, true)
}

// forwardSignals passes all signals on that a user or a caller may mean for the
// container's process. The returned function ends that.
func (a *app) forwardSignals(send func(unix.Signal) error) (stop func()) {
	signals := make(chan os.Signal, 64)
	done := make(chan struct{})
	signal.Notify(signals)
	go func() {
		defer close(done)
		for s := range signals {
			sig, ok := s.(unix.Signal)
			if !ok || ownSignal(sig) {
				continue
			}
			if err := send(sig); err != nil { // the process has just ended, and its waiter knows
				a.log.Debug("forward signal", "signal", sig, "error", err)
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		<-done
	}
}

// ownSignal tells whether a signal is about this process and not for the
// container's.
func ownSignal(sig unix.Signal) bool {
	switch sig {
	case unix.SIGCHLD, unix.SIGPIPE, unix.SIGURG, unix.SIGWINCH, unix.SIGTTIN, unix.SIGTTOU:
		return true
	}
	return false
}
