package cli

import (
	"context"
	"fmt"
	"strings"

	urfave "github.com/urfave/cli/v3"

	"runv/internal/bundle"
)

// exactArgs refuses a number of arguments that is not n.
func exactArgs(cmd *urfave.Command, n int) error {
	if got := cmd.Args().Len(); got != n {
		return &usageError{cmd.Name, fmt.Sprintf("takes %s, got %d", arguments("exactly", n), got)}
	}
	return nil
}

// minArgs refuses fewer than n arguments.
func minArgs(cmd *urfave.Command, n int) error {
	if got := cmd.Args().Len(); got < n {
		return &usageError{cmd.Name, fmt.Sprintf("takes %s, got %d", arguments("at least", n), got)}
	}
	return nil
}

func arguments(limit string, n int) string {
	switch n {
	case 0:
		return "no arguments"
	case 1:
		return limit + " 1 argument"
	}
	return fmt.Sprintf("%s %d arguments", limit, n)
}

// forContainer makes an action of a command that takes a container's id and
// nothing else. Its errors name the command and the container.
func forContainer(run func(ctx context.Context, cmd *urfave.Command, id string) error) urfave.ActionFunc {
	return func(ctx context.Context, cmd *urfave.Command) error {
		if err := exactArgs(cmd, 1); err != nil {
			return err
		}
		return inContainer(ctx, cmd, run)
	}
}

// inContainer is forContainer for commands with more arguments.
func inContainer(ctx context.Context, cmd *urfave.Command, run func(context.Context, *urfave.Command, string) error) error {
	id := cmd.Args().First()
	if err := bundle.ValidateID(id); err != nil {
		return fmt.Errorf("%s: %w", cmd.Name, err)
	}
	err := run(ctx, cmd, id)
	if err == nil || namesContainer(err, id) {
		return err
	}
	return fmt.Errorf("%s %s: %w", cmd.Name, id, err)
}

// namesContainer tells whether an error begins with a verb and the container,
// as the supervisor's do; it needs no further introduction then.
func namesContainer(err error, id string) bool {
	_, rest, ok := strings.Cut(err.Error(), " ")
	return ok && strings.HasPrefix(rest, id+": ")
}
