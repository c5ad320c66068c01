package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	urfave "github.com/urfave/cli/v3"
)

func (a *app) listCommand() *urfave.Command {
	var format string
	var quiet bool
	return &urfave.Command{
		Name:     "list",
		Usage:    "list the containers below --root",
		Category: groupInspect,
		Description: `Works from the state directory alone, also when supervisors are dead. An
entry that cannot be read is a warning and does not hide the others; remove it
with "runv delete --force ID".

Examples:
   runv list
   runv list -q
   runv --root /run/user/test list --format json`,
		Flags: []urfave.Flag{
			formatFlag(&format),
			&urfave.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Destination: &quiet, Usage: "print the ids only"},
		},
		Action: func(_ context.Context, cmd *urfave.Command) error {
			if err := exactArgs(cmd, 0); err != nil {
				return err
			}
			if err := checkFormat(format); err != nil {
				return err
			}
			store, err := a.openStore()
			if err != nil {
				return fmt.Errorf("list: %w", err)
			}
			all, broken := store.Containers()
			var states []containerState // without any, JSON is null, as under runc
			for _, c := range all {
				s := a.describe(store, c)
				s.Owner = userName(c.Owner)
				states = append(states, s)
			}
			if err := printList(a.prog.Stdout, states, format, quiet); err != nil {
				return fmt.Errorf("list: %w", err)
			}
			if broken != nil { // no reason to keep the others from whoever reads them
				a.warn("list: %v", broken)
			}
			return nil
		},
	}
}

// printList has the columns and the JSON of runc's list.
func printList(w io.Writer, states []containerState, format string, quiet bool) error {
	if quiet {
		for _, s := range states {
			if _, err := fmt.Fprintln(w, s.ID); err != nil {
				return err
			}
		}
		return nil
	}
	if format == "json" {
		return json.NewEncoder(w).Encode(states)
	}
	t := tabwriter.NewWriter(w, 12, 1, 3, ' ', 0)
	fmt.Fprint(t, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER\n")
	for _, s := range states {
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\n",
			s.ID, s.Pid, s.Status, s.Bundle, s.Created.Format(time.RFC3339Nano), s.Owner)
	}
	return t.Flush()
}

func formatFlag(format *string) urfave.Flag {
	return &urfave.StringFlag{
		Name: "format", Aliases: []string{"f"}, Value: "table", Destination: format,
		Usage: "`FORMAT` of the output: table or json",
	}
}

func checkFormat(format string) error {
	if format != "table" && format != "json" {
		return fmt.Errorf("--format=%s: table or json is possible", format)
	}
	return nil
}
