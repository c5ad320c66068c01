package cli

import (
	"context"
	"fmt"

	urfave "github.com/urfave/cli/v3"
)

func (a *app) configCommand() *urfave.Command {
	var asJSON bool
	return &urfave.Command{
		Name:     "config",
		Usage:    "print the configuration in effect, and where each value came from",
		Category: groupSetup,
		Description: `A flag wins over an environment variable (RUNV_ and the key in upper case),
that over the file, that over the default. The output is a valid configuration
file. Unknown keys and bad values are errors that name their place.

Examples:
   runv config > /etc/runv/config.toml
   RUNV_ACCEL=tcg runv config --json | jq .values.accel`,
		Flags: []urfave.Flag{&urfave.BoolFlag{Name: "json", Destination: &asJSON, Usage: "print JSON"}},
		Action: func(_ context.Context, cmd *urfave.Command) error {
			if err := exactArgs(cmd, 0); err != nil {
				return err
			}
			cfg, err := a.loadConfig()
			if err != nil {
				return fmt.Errorf("config: %w", err)
			}
			if asJSON {
				return a.printIndented(cfg)
			}
			text, err := cfg.TOML()
			if err != nil {
				return fmt.Errorf("config: %w", err)
			}
			_, err = fmt.Fprint(a.prog.Stdout, text)
			return err
		},
	}
}
