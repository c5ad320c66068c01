package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/signal"
	urfave "github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/state"
)

func (a *app) killCommand() *urfave.Command {
	var all bool
	return &urfave.Command{
		Name:      "kill",
		Usage:     "send a signal to a container",
		ArgsUsage: "<container-id> [signal]",
		Category:  groupLife,
		Description: `The signal goes to the container's init process; TERM when none is given. It
is a name, with or without SIG and in any case, or a number.

Examples:
   runv kill web
   runv kill web KILL
   runv kill web SIGUSR1
   runv kill web 9 --all`,
		Flags: []urfave.Flag{
			&urfave.BoolFlag{Name: "all", Aliases: []string{"a"}, Destination: &all, Usage: "send it to all processes of the container"},
		},
		Action: func(ctx context.Context, cmd *urfave.Command) error {
			if err := minArgs(cmd, 1); err != nil {
				return err
			}
			if cmd.Args().Len() > 2 {
				return &usageError{"kill", "takes one container and one signal"}
			}
			return inContainer(ctx, cmd, func(ctx context.Context, cmd *urfave.Command, id string) error {
				name := cmd.Args().Get(1)
				if name == "" {
					name = "TERM"
				}
				sig, err := parseSignal(name)
				if err != nil {
					return err
				}
				return a.kill(ctx, id, sig, all)
			})
		},
	}
}

func (a *app) kill(ctx context.Context, id string, sig unix.Signal, all bool) error {
	store, err := a.openStore()
	if err != nil {
		return err
	}
	c, err := loadContainer(store, id)
	if err != nil {
		return err
	}
	if store.Live(c) == state.Stopped {
		if all {
			return nil // there is nobody left to signal, as under runc
		}
		return errNotRunning
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	sup, err := dial(ctx, store.PodDir(c.PodID))
	if err != nil {
		return err
	}
	defer sup.close()
	_, err = sup.processes.Signal(ctx, &supervisorv1.SignalRequest{ContainerId: id, Signal: uint32(sig), All: all})
	if errdefs.IsNotFound(err) {
		return errNotRunning
	}
	return err
}

// parseSignal reads a signal's name or number. 0 is a signal: it asks whether
// the process is there.
func parseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 0 || n > 64 {
			return 0, fmt.Errorf("unknown signal %q", s)
		}
		return unix.Signal(n), nil
	}
	sig, err := signal.ParseSignal(strings.ToUpper(s))
	if err != nil {
		return 0, fmt.Errorf("unknown signal %q", s)
	}
	return sig, nil
}
