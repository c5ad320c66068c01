package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	urfave "github.com/urfave/cli/v3"

	"runv/internal/rpcerror"
	"runv/internal/state"
)

// consolePoll is how often console --follow looks for more.
const consolePoll = 200 * time.Millisecond

func (a *app) consoleCommand() *urfave.Command {
	var follow bool
	return &urfave.Command{
		Name:      "console",
		Usage:     "print what the guest of a container wrote to its console",
		ArgsUsage: "<container-id>",
		Category:  groupInspect,
		Description: `The console has the messages of the guest's kernel and of runv's agent, not the
output of the container. Control characters are shown as ^X or \xNN. Works
from the state directory alone, also when the supervisor is dead. With the
global option --debug, given to create or run, the guest says more.

Examples:
   runv console web
   runv console --follow web`,
		Flags: []urfave.Flag{
			&urfave.BoolFlag{Name: "follow", Aliases: []string{"f"}, Destination: &follow, Usage: "go on until the virtual machine has ended"},
		},
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			store, err := a.openStore()
			if err != nil {
				return err
			}
			c, err := loadContainer(store, id)
			if err != nil {
				return err
			}
			f, err := os.Open(filepath.Join(store.PodDir(c.PodID), state.ConsoleFile))
			if errors.Is(err, fs.ErrNotExist) {
				return rpcerror.New(errdefs.ErrNotFound, "no console yet: the virtual machine has not been started")
			}
			if err != nil {
				return err
			}
			defer f.Close()
			if info, err := f.Stat(); err == nil && info.Size() == 0 && !follow {
				fmt.Fprintln(a.prog.Stderr, "runv: the guest has written nothing to its console; with --debug at its creation it says more")
				return nil
			}
			out := &visibleWriter{w: a.prog.Stdout}
			if follow {
				err = copyWhile(ctx, out, f, func() bool { return vmAlive(store, c.PodID) })
			} else {
				_, err = io.Copy(out, f)
			}
			if err != nil {
				return fmt.Errorf("copy console: %w", err)
			}
			return out.flush()
		}),
	}
}

// copyWhile copies a growing file as long as alive says that it may grow, or
// until ctx ends.
func copyWhile(ctx context.Context, w io.Writer, r io.Reader, alive func() bool) error {
	tick := time.NewTicker(consolePoll)
	defer tick.Stop()
	for {
		more := alive() // before the read: what was written before the end is read
		if _, err := io.Copy(w, r); err != nil {
			return err
		}
		if !more {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// vmAlive tells whether a pod's VM runs, or may still be started.
func vmAlive(store *state.Store, podID string) bool {
	pod, err := store.LoadPod(podID)
	if err != nil {
		return false
	}
	if len(pod.VM) == 0 {
		return pod.Supervisor.Alive()
	}
	return slices.ContainsFunc(pod.VM, state.Process.Alive)
}
