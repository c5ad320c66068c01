package boot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Lists of module files in the initramfs, one absolute path a line, in load order.
// A kernel with everything built in comes without them.
const (
	EarlyModules = "/etc/runv/modules.early" // what the agent channel needs
	LateModules  = "/etc/runv/modules.late"  // what containers may need
)

// LoadModules loads the modules of a list.
func LoadModules(list string) error {
	paths, err := readList(list)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := loadModule(path); err != nil {
			return err
		}
	}
	return nil
}

func readList(list string) ([]string, error) {
	f, err := os.Open(list)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var paths []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" {
			paths = append(paths, line)
		}
	}
	return paths, s.Err()
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}

// Late loads modules in the background.
type Late struct {
	log     *slog.Logger
	modules []lateModule
	hurry   chan string // names that somebody waits for
}

type lateModule struct {
	name, path string
	loaded     chan struct{} // closed when loading was tried
}

// NewLate reads the list. Run loads.
func NewLate(list string, log *slog.Logger) (*Late, error) {
	paths, err := readList(list)
	if err != nil {
		return nil, err
	}
	l := &Late{log: log, hurry: make(chan string)}
	for _, path := range paths {
		name, _, _ := strings.Cut(filepath.Base(path), ".ko")
		name = strings.ReplaceAll(name, "-", "_")
		l.modules = append(l.modules, lateModule{name: name, path: path, loaded: make(chan struct{})})
	}
	return l, nil
}

// patience is how long modules that nobody waits for stay unloaded: starting the
// first container comes first.
const patience = 1500 * time.Millisecond

// Run loads the modules and returns when all are, or ctx ends. A module that the kernel
// refuses is logged: whoever needs it will fail with a reason of its own.
func (l *Late) Run(ctx context.Context) {
	idle := time.NewTimer(patience)
	defer idle.Stop()
	wanted := ""
	for next := 0; next < len(l.modules); {
		if wanted == "" {
			select {
			case <-ctx.Done():
				return
			case wanted = <-l.hurry:
			case <-idle.C:
				idle.Reset(0)
			}
		}
		m := &l.modules[next]
		if err := loadModule(m.path); err != nil {
			l.log.Error("load module", "error", err)
		}
		close(m.loaded)
		next++
		if m.name == wanted {
			wanted = ""
		}
	}
}

// Wait has the module loaded at once, with those before it in the list, and returns
// when it is. A module that is not in the list is built in, or will be missed later.
func (l *Late) Wait(ctx context.Context, name string) error {
	for i := range l.modules {
		m := &l.modules[i]
		if m.name != name {
			continue
		}
		select {
		case <-m.loaded:
			return nil
		case l.hurry <- name:
		case <-ctx.Done():
			return fmt.Errorf("wait for module %s: %w", name, context.Cause(ctx))
		}
		select {
		case <-m.loaded:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("wait for module %s: %w", name, context.Cause(ctx))
		}
	}
	return nil
}
