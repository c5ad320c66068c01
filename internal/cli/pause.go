package cli

import (
	"context"

	"github.com/containerd/errdefs"
	urfave "github.com/urfave/cli/v3"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

func (a *app) pauseCommand() *urfave.Command {
	return &urfave.Command{
		Name:      "pause",
		Usage:     "freeze all processes of a container",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `Example:
   runv pause web && runv list && runv resume web`,
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			return a.inState(ctx, id, state.Running, errNotRunning, func(ctx context.Context, sup *supervisor) error {
				_, err := sup.containers.Pause(ctx, &supervisorv1.PauseRequest{Id: id})
				return err
			})
		}),
	}
}

func (a *app) resumeCommand() *urfave.Command {
	notPaused := rpcerror.New(errdefs.ErrFailedPrecondition, "container not paused")
	return &urfave.Command{
		Name:      "resume",
		Usage:     "let the processes of a paused container go on",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `Example:
   runv resume web`,
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			return a.inState(ctx, id, state.Paused, notPaused, func(ctx context.Context, sup *supervisor) error {
				_, err := sup.containers.Resume(ctx, &supervisorv1.ResumeRequest{Id: id})
				return err
			})
		}),
	}
}

// inState calls the supervisor of a container that must be in one state.
// Otherwise the answer is otherwise.
func (a *app) inState(ctx context.Context, id string, want state.Status, otherwise error, call func(context.Context, *supervisor) error) error {
	store, err := a.openStore()
	if err != nil {
		return err
	}
	c, err := loadContainer(store, id)
	if err != nil {
		return err
	}
	if store.Live(c) != want {
		return otherwise
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	sup, err := dial(ctx, store.PodDir(c.PodID))
	if err != nil {
		return err
	}
	defer sup.close()
	return call(ctx, sup)
}
