package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	urfave "github.com/urfave/cli/v3"

	"runv/internal/bundle"
)

func (a *app) specCommand() *urfave.Command {
	var dir string
	var rootless bool
	return &urfave.Command{
		Name:     "spec",
		Usage:    "write a config.json to start from",
		Category: groupSetup,
		Description: `Writes config.json into the bundle's directory; it runs sh in a terminal on a
read-only root file system, as that of "runc spec" does. Edit process.args to
run something else. A config.json that exists is not touched: that is an error.

Example:
   mkdir -p web/rootfs && tar -C web/rootfs -xf rootfs.tar
   runv spec --bundle web
   sed -i 's;"sh";"/bin/httpd";' web/config.json`,
		Flags: []urfave.Flag{
			&urfave.StringFlag{Name: "bundle", Aliases: []string{"b"}, Value: ".", Destination: &dir, TakesFile: true, Usage: "`DIR` of the bundle"},
			&urfave.BoolFlag{Name: "rootless", Destination: &rootless, Hidden: true},
		},
		Action: func(_ context.Context, cmd *urfave.Command) error {
			if err := exactArgs(cmd, 0); err != nil {
				return err
			}
			if rootless {
				return errors.New("spec --rootless: not supported: runv needs root")
			}
			if err := writeSpec(filepath.Join(dir, "config.json")); err != nil {
				return fmt.Errorf("spec: %w", err)
			}
			return nil
		},
	}
}

func writeSpec(path string) error {
	data, err := json.MarshalIndent(bundle.DefaultSpec(), "", "\t")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("file %s exists, remove it first", path)
	}
	if err != nil {
		return err
	}
	if _, err := f.Write(append(data, '\n')); err != nil {
		return errors.Join(err, f.Close(), os.Remove(path))
	}
	return f.Close()
}
