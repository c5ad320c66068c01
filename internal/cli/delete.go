package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/hook"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

// forceTimeout is how long delete --force believes that a supervisor will do
// it before it does it itself, from disk.
const forceTimeout = 20 * time.Second

// A supervisor without containers ends at once; see awaitPodEnd.
const (
	podEndTimeout = 5 * time.Second
	podEndPoll    = 2 * time.Millisecond
	// standInEndTimeout is what a stand-in gets to end with its process's status.
	standInEndTimeout = time.Second
)

func (a *app) deleteCommand() *urfave.Command {
	var force bool
	return &urfave.Command{
		Name:      "delete",
		Usage:     "remove a container and, with its last one, the pod",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `The container must have stopped, or never have been started. With --force it
is killed first; that also works when its supervisor is dead or hangs and
when its state file is damaged, and an unknown container is success.

Examples:
   runv delete web
   runv delete --force web`,
		Flags: []urfave.Flag{
			&urfave.BoolFlag{Name: "force", Aliases: []string{"f"}, Destination: &force, Usage: "kill the container when it has not stopped"},
		},
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			err := a.remove(ctx, id, force)
			if force {
				a.sweep(ctx)
			}
			return err
		}),
	}
}

// sweep removes what commands that were killed have left in the state directory.
func (a *app) sweep(ctx context.Context) {
	store, err := a.openStore()
	if err == nil {
		err = store.SweepPods(ctx)
	}
	if err != nil {
		a.warn("%v", err)
	}
}

// remove deletes a container: by its supervisor when that lives, else from disk.
func (a *app) remove(ctx context.Context, id string, force bool) error {
	store, err := a.openStore()
	if err != nil {
		return err
	}
	c, err := loadContainer(store, id)
	switch {
	case errdefs.IsNotFound(err) && force:
		return nil
	case err != nil && force:
		a.log.Debug("remove damaged container from disk", "container", id, "error", err)
		return a.purge(ctx, store, id)
	case err != nil:
		return err
	}
	status := store.Live(c)
	if status != state.Stopped && status != state.Created && !force {
		return rpcerror.New(errdefs.ErrFailedPrecondition,
			fmt.Sprintf("cannot delete container %s that is not stopped: %s", id, status))
	}
	timeout := callTimeout
	if force {
		timeout = forceTimeout
	}
	timeout += hook.Timeouts(c.Hooks.Poststop, hook.Unbounded)
	err = a.askDelete(ctx, store, c, timeout, force || status == state.Created)
	if err == nil {
		// A supervisor that was never asked to create the container, because the
		// command died first, does not know it.
		if _, err := store.LoadContainer(id); !errdefs.IsNotFound(err) {
			return a.purge(ctx, store, id)
		}
		awaitPodEnd(ctx, store, c.PodID)
		if force {
			return endStandIn(ctx, c.StandIn)
		}
		return nil
	}
	// A supervisor ends with its last container, so it may be gone, or going.
	// One that a user has lost patience with is not asked again.
	if errdefs.IsUnavailable(err) || status == state.Stopped || force {
		a.log.Debug("remove container from disk", "container", id, "error", err)
		return a.purge(ctx, store, id)
	}
	return err
}

// purge removes a container from disk, and then runs its poststop hooks unless somebody else has
// removed it meanwhile: among all who try, supervisors included, one does.
func (a *app) purge(ctx context.Context, store *state.Store, id string) error {
	c, err := store.Purge(ctx, id)
	if c == nil || len(c.Hooks.Poststop) == 0 {
		return err
	}
	data, jsonErr := json.Marshal(specs.State{
		Version: specs.Version, ID: c.ID, Status: specs.StateStopped, Bundle: c.Bundle, Annotations: c.Annotations,
	})
	if jsonErr != nil {
		return errors.Join(err, jsonErr)
	}
	around := hook.Surroundings{Dir: c.Bundle, State: data, Env: os.Environ()}
	// The container is gone whatever comes of them, and ctx may be over.
	if hookErr := hook.RunAll(context.WithoutCancel(ctx), hook.Poststop, c.Hooks.Poststop, around); hookErr != nil {
		a.warn("delete %s: %v", id, hookErr)
	}
	return err
}

func (a *app) askDelete(ctx context.Context, store *state.Store, c state.Container, timeout time.Duration, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	sup, err := dial(ctx, store.PodDir(c.PodID))
	if err != nil {
		return err
	}
	defer sup.close()
	_, err = sup.containers.Delete(ctx, &supervisorv1.DeleteRequest{Id: c.ID, Force: force, Environment: hookEnv(c.Hooks.Poststop)})
	return err
}

// awaitPodEnd waits until a supervisor whose last container was deleted has
// cleared away after itself: delete leaves nothing. Not for long, though:
// whatever stays is swept when the next pod is made.
func awaitPodEnd(ctx context.Context, store *state.Store, podID string) {
	others, _ := store.Containers()
	if slices.ContainsFunc(others, func(c state.Container) bool { return c.PodID == podID }) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, podEndTimeout)
	defer cancel()
	tick := time.NewTicker(podEndPoll)
	defer tick.Stop()
	for {
		if _, err := os.Lstat(store.PodDir(podID)); err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// endStandIn sees to the end of a stand-in whose container is gone: it ends by
// itself, unless somebody has stopped it.
func endStandIn(ctx context.Context, standIn state.Process) error {
	patience := time.NewTimer(standInEndTimeout)
	defer patience.Stop()
	tick := time.NewTicker(podEndPoll)
	defer tick.Stop()
	for standIn.Alive() {
		select {
		case <-tick.C:
		case <-patience.C:
			return standIn.Kill(ctx)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
