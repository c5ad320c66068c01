package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/bundle"
	"runv/internal/hook"
	"runv/internal/join"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

// findShared tells which pod a new container joins.
func findShared(store *state.Store, b *bundle.Bundle) (join.Plan, error) {
	if !join.Asked(b.Spec) {
		return join.Plan{}, nil
	}
	all, _ := store.Containers() // one that cannot be read cannot be joined
	for i := range all {
		all[i].Status = store.Live(all[i])
	}
	return join.Find(b.Spec, all, join.Look)
}

// joinPod connects to the supervisor of a pod that has containers already. Its undo takes the
// container out again and leaves the others as they are.
func (a *app) joinPod(ctx context.Context, store *state.Store, plan join.Plan, id string, hooks specs.Hooks, undo *undo) (*supervisor, error) {
	sup, err := dial(ctx, store.PodDir(plan.Pod))
	if errdefs.IsUnavailable(err) {
		return nil, rpcerror.New(errdefs.ErrFailedPrecondition, fmt.Sprintf("the pod of container %s has ended", plan.With))
	}
	if err != nil {
		return nil, err
	}
	undo.push(func() error {
		defer sup.close()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forceTimeout+hook.Timeouts(hooks.Poststop, hook.Unbounded))
		defer cancel()
		_, err := sup.containers.Delete(ctx, &supervisorv1.DeleteRequest{Id: id, Force: true})
		if errdefs.IsUnavailable(err) { // then nothing is left there
			return nil
		}
		return err
	})
	return sup, nil
}

// leavePod removes a container's record from a pod of others. A supervisor that has ended meanwhile
// has left its directory to whoever removes the last record.
func leavePod(ctx context.Context, store *state.Store, podID, id string) error {
	if _, err := store.RemoveContainer(id); err != nil {
		return err
	}
	others, _ := store.Containers()
	if slices.ContainsFunc(others, func(c state.Container) bool { return c.PodID == podID && store.Live(c) != state.Stopped }) {
		return nil
	}
	awaitSupervisorEnd(ctx, store, podID)
	return store.SweepPods(ctx)
}

// awaitSupervisorEnd waits until a pod whose containers have all stopped has no supervisor any more. Not
// for long, as awaitPodEnd.
func awaitSupervisorEnd(ctx context.Context, store *state.Store, podID string) {
	ctx, cancel := context.WithTimeout(ctx, podEndTimeout)
	defer cancel()
	tick := time.NewTicker(podEndPoll)
	defer tick.Stop()
	for {
		pod, err := store.LoadPod(podID)
		if err == nil && !pod.Supervisor.Alive() || errors.Is(err, errdefs.ErrNotFound) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
