package cli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	supervisorv1 "runv/api/supervisor/v1"
)

// resizeTimeout bounds the telling of a terminal's new size.
const resizeTimeout = 5 * time.Second

// userTerminal is the user's terminal while a container's process uses it. Without a console there is
// nothing to do.
type userTerminal struct {
	console console.Console
}

// findTerminal finds the user's terminal as runc does: what is redirected is not it.
func (a *app) findTerminal() (*userTerminal, error) {
	for _, f := range []*os.File{a.prog.Stderr, a.prog.Stdout, a.prog.Stdin} {
		if c, err := console.ConsoleFromFile(f); err == nil {
			return &userTerminal{console: c}, nil
		}
	}
	f, err := os.Open("/dev/tty")
	if err != nil {
		return nil, fmt.Errorf("find terminal: standard input, output and error are none: %w", err)
	}
	c, err := console.ConsoleFromFile(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("find terminal: %w", err)
	}
	return &userTerminal{console: c}, nil
}

// makeRaw leaves to the guest's terminal what this one does with input. Its output processing stays on: the guest's
// passes newlines on as they are, so that what the user has sent into a file has them so. The caller calls restore.
func (t *userTerminal) makeRaw() error {
	if err := t.console.SetRaw(); err != nil {
		return fmt.Errorf("make terminal raw: %w", err)
	}
	return nil
}

func (t *userTerminal) restore() {
	if t.console != nil {
		_ = t.console.Reset()
	}
}

// size is the terminal's size; 0, 0 when there is none.
func (t *userTerminal) size() (width, height uint16) {
	if t.console == nil {
		return 0, 0
	}
	size, err := t.console.Size()
	if err != nil {
		return 0, 0
	}
	return size.Width, size.Height
}

// follow tells the terminal's size now and after each change, until stop is
// called.
func (t *userTerminal) follow(ctx context.Context, tell func(ctx context.Context, width, height uint16)) (stop func()) {
	if t.console == nil {
		return func() {}
	}
	once := func() {
		if width, height := t.size(); width > 0 && height > 0 {
			ctx, cancel := context.WithTimeout(ctx, resizeTimeout)
			defer cancel()
			tell(ctx, width, height)
		}
	}
	changed := make(chan os.Signal, 1)
	done := make(chan struct{})
	signal.Notify(changed, unix.SIGWINCH)
	once()
	go func() {
		defer close(done)
		for range changed {
			once()
		}
	}()
	return func() {
		signal.Stop(changed)
		close(changed)
		<-done
	}
}

// resizer tells the supervisor the size of a process's terminal.
func (a *app) resizer(sup *supervisor, id, execID string) func(ctx context.Context, width, height uint16) {
	return func(ctx context.Context, width, height uint16) {
		_, err := sup.processes.Resize(ctx, &supervisorv1.ResizeRequest{
			ContainerId: id, ExecId: execID, Width: uint32(width), Height: uint32(height),
		})
		if err != nil {
			a.log.Debug("resize terminal", "container", id, "exec", execID, "error", err)
		}
	}
}
