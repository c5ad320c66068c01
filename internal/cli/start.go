package cli

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/hook"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

func (a *app) startCommand() *urfave.Command {
	return &urfave.Command{
		Name:      "start",
		Usage:     "run the user's program in a created container",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `Returns when the program runs; it does not wait for its end.

Example:
   runv create --bundle web web && runv start web`,
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			store, err := a.openStore()
			if err != nil {
				return err
			}
			c, err := loadContainer(store, id)
			if err != nil {
				return err
			}
			switch store.Live(c) {
			case state.Stopped:
				return rpcerror.New(errdefs.ErrFailedPrecondition, "cannot start a container that has stopped")
			case state.Paused:
				return rpcerror.New(errdefs.ErrFailedPrecondition, "cannot start a container in the paused state")
			case state.Running:
				return rpcerror.New(errdefs.ErrFailedPrecondition, "cannot start an already running container")
			}
			ctx, cancel := context.WithTimeout(ctx, startTimeout(c.Hooks))
			defer cancel()
			sup, err := dial(ctx, store.PodDir(c.PodID))
			if err != nil {
				return err
			}
			defer sup.close()
			_, err = sup.containers.Start(ctx, &supervisorv1.StartRequest{Id: id})
			return err
		}),
	}
}

// startTimeout bounds a start: hooks may take what their timeouts say beyond the usual.
func startTimeout(h specs.Hooks) time.Duration {
	return callTimeout + hook.Timeouts(h.StartContainer, 0) + hook.Timeouts(h.Poststart, 0)
}
