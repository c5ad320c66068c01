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

// terminal is the user's terminal while a container's process uses it. It has
// no file when standard input is no terminal: then there is nothing to do.
type terminal struct {
	console console.Console
}

// openTerminal makes the user's terminal raw: the guest's terminal does what
// this one did. Call restore at the end.
func (a *app) openTerminal() (*terminal, error) {
	c, err := console.ConsoleFromFile(a.prog.Stdin)
	if err != nil {
		return &terminal{}, nil // no terminal
	}
	if err := c.SetRaw(); err != nil {
		return nil, fmt.Errorf("make terminal raw: %w", err)
	}
	// That leaves output processing on, and the guest's terminal has made CR LF of LF already.
	if err := console.ClearONLCR(c.Fd()); err != nil {
		_ = c.Reset()
		return nil, fmt.Errorf("make terminal raw: %w", err)
	}
	return &terminal{console: c}, nil
}

func (t *terminal) restore() {
	if t.console != nil {
		_ = t.console.Reset()
	}
}

// size is the terminal's size; 0, 0 when there is none.
func (t *terminal) size() (width, height uint16) {
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
func (t *terminal) follow(ctx context.Context, tell func(ctx context.Context, width, height uint16)) (stop func()) {
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
