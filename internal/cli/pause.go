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
			return a.askLive(ctx, id, errNotRunning, func(ctx context.Context, sup *supervisor) error {
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
			return a.askLive(ctx, id, notPaused, func(ctx context.Context, sup *supervisor) error {
				_, err := sup.containers.Resume(ctx, &supervisorv1.ResumeRequest{Id: id})
				return err
			})
		}),
	}
}

// askLive calls the supervisor of a container that has not stopped. Otherwise the
// answer is otherwise. All else is the supervisor's to judge: what the state file says may be
// old, when the disk was full.
func (a *app) askLive(ctx context.Context, id string, otherwise error, call func(context.Context, *supervisor) error) error {
	store, err := a.openStore()
	if err != nil {
		return err
	}
	c, err := loadContainer(store, id)
	if err != nil {
		return err
	}
	if store.Live(c) == state.Stopped {
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
