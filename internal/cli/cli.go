package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	urfave "github.com/urfave/cli/v3"
)

const defaultRoot = "/run/runv"

// Program is what the process was started with.
type Program struct {
	Version string // as the build names itself; empty: from the build's module information
	Args    []string
	Stdin   *os.File
	Stdout  *os.File
	Stderr  *os.File
}

// Main runs one command and returns the exit status of the process.
func Main(ctx context.Context, prog Program) int {
	a := &app{prog: prog}
	// An error before the log's flags are parsed has nowhere else to go.
	a.log = slog.New(slog.DiscardHandler)
	defer a.closeLog()
	began := time.Now()
	err := a.rootCommand().Run(ctx, prog.Args)
	status := exitStatus(err)
	a.log.Debug("command ends", "status", status, "after", time.Since(began))
	if err != nil { // last: callers read the last line of a log
		a.report(err)
	}
	return status
}

// app holds the values of the global flags and what follows from them.
type app struct {
	prog Program

	root          string
	logPath       string
	logFormat     string
	debug         bool
	systemdCgroup bool
	rootless      string
	guestDir      string
	configFile    string

	log     *slog.Logger
	logFile *os.File
}

func (a *app) rootCommand() *urfave.Command {
	root := &urfave.Command{
		Name:            "runv",
		Usage:           "run OCI containers, each pod in a virtual machine of its own",
		StopOnNthArg:    new(1),
		HideHelpCommand: true,
		HideVersion:     true,
		Writer:          a.prog.Stdout,
		ErrWriter:       a.prog.Stderr,
		ExitErrHandler:  func(context.Context, *urfave.Command, error) {},
		OnUsageError:    usageErrorOf,
		Before:          a.before,
		Action:          a.noCommand,
		Commands:        a.commands(),
		Flags: []urfave.Flag{
			&urfave.StringFlag{
				Name: "root", Value: defaultRoot, Destination: &a.root, Local: true, TakesFile: true,
				Usage: "`DIR` that keeps the state of pods and containers; should be on a tmpfs",
			},
			&urfave.StringFlag{
				Name: "log", Destination: &a.logPath, Local: true, TakesFile: true,
				Usage: "append errors and warnings to `FILE`, as runc does for containerd and podman",
			},
			&urfave.StringFlag{
				Name: "log-format", Value: "text", Destination: &a.logFormat, Local: true,
				Usage: "`FORMAT` of the log: text or json",
			},
			&urfave.BoolFlag{
				Name: "debug", Destination: &a.debug, Local: true,
				Usage: "log what is done, here, in the supervisor and in the guest's agent",
			},
			&urfave.StringFlag{
				Name: "config", Destination: &a.configFile, Local: true, TakesFile: true,
				Usage: "configuration `FILE`, instead of /etc/runv/config.toml",
			},
			&urfave.StringFlag{
				Name: "guest-dir", Destination: &a.guestDir, Local: true, TakesFile: true,
				Usage: "`DIR` with the guest's kernel and initramfs",
			},
			&urfave.BoolFlag{
				Name: "systemd-cgroup", Destination: &a.systemdCgroup, Local: true,
				Usage: "let systemd make the cgroup of the VM; cgroupsPath is then of the form slice:prefix:name",
			},
			&urfave.StringFlag{
				Name: "rootless", Value: "auto", Destination: &a.rootless, Local: true,
				Usage: "`WHEN` to do without root; accepted because runc has it: false or auto",
			},
			&urfave.StringFlag{Name: "criu", Local: true, Hidden: true, Usage: "without effect; runc had it"},
			&urfave.BoolFlag{Name: "version", Aliases: []string{"v"}, Local: true, Usage: "print the version"},
		},
	}
	root.CustomRootCommandHelpTemplate = rootHelp(root)
	return root
}

// commands lists all subcommands, in the order in which help shows them within
// their group.
func (a *app) commands() []*urfave.Command {
	all := []*urfave.Command{
		a.createCommand(),
		a.startCommand(),
		a.runCommand(),
		a.killCommand(),
		a.deleteCommand(),
		a.pauseCommand(),
		a.resumeCommand(),
		a.updateCommand(),
		a.stateCommand(),
		a.listCommand(),
		a.eventsCommand(),
		a.consoleCommand(),
		a.execCommand(),
		a.psCommand(),
		a.specCommand(),
		a.featuresCommand(),
		a.doctorCommand(),
		a.configCommand(),
		a.helpCommand(),
		a.refusedCommand("checkpoint", "containers cannot be checkpointed"),
		a.refusedCommand("restore", "containers cannot be restored"),
	}
	for _, c := range all {
		c.OnUsageError = usageErrorOf
		c.CustomHelpTemplate = commandHelp(c)
		c.HideHelpCommand = true
		c.DisableSliceFlagSeparator = true
	}
	return all
}

// Groups of commands in help.
const (
	groupLife    = "Container life cycle"
	groupInspect = "Inspection"
	groupProcess = "Processes in a container"
	groupSetup   = "Setup and diagnosis"
)

// before checks the global flags. It runs before each command's action.
func (a *app) before(ctx context.Context, cmd *urfave.Command) (context.Context, error) {
	if cmd.Bool("version") {
		return ctx, nil
	}
	if a.rootless != "auto" && a.rootless != "false" {
		return ctx, fmt.Errorf("--rootless=%s: runv needs root; false and auto are accepted", a.rootless)
	}
	if a.root == "" {
		return ctx, errors.New("--root: the directory's name is empty")
	}
	abs, err := filepath.Abs(a.root)
	if err != nil {
		return ctx, fmt.Errorf("--root: %w", err)
	}
	a.root = abs
	if err := a.openLog(); err != nil {
		return ctx, err
	}
	a.log.Debug("command begins", "command", cmd.Args().First(), "root", a.root)
	return ctx, nil
}

// noCommand is the action of runv without a subcommand that it knows.
func (a *app) noCommand(_ context.Context, cmd *urfave.Command) error {
	switch {
	case cmd.Bool("version"):
		fmt.Fprint(a.prog.Stdout, a.versionText())
		return nil
	case cmd.Args().Present():
		name := cmd.Args().First()
		msg := fmt.Sprintf("unknown command %q", name)
		if near := nearest(name, cmd.Commands); near != "" {
			msg += fmt.Sprintf(", did you mean %q?", near)
		}
		return &usageError{msg: msg}
	}
	return urfave.ShowRootCommandHelp(cmd)
}

// nearest is the command whose name starts like name does, or contains it.
func nearest(name string, cmds []*urfave.Command) string {
	for _, c := range cmds {
		if !c.Hidden && len(name) > 1 && (strings.HasPrefix(c.Name, name) || strings.HasPrefix(name, c.Name)) {
			return c.Name
		}
	}
	return urfave.SuggestCommand(nil, name)
}

func (a *app) helpCommand() *urfave.Command {
	return &urfave.Command{
		Name:      "help",
		Aliases:   []string{"h"},
		Usage:     "show the list of commands, or the help of one",
		ArgsUsage: "[command]",
		Category:  groupSetup,
		Action: func(ctx context.Context, cmd *urfave.Command) error {
			name := cmd.Args().First()
			if name == "" {
				return urfave.ShowRootCommandHelp(cmd.Root())
			}
			if cmd.Root().Command(name) == nil {
				return &usageError{msg: fmt.Sprintf("unknown command %q", name)}
			}
			return urfave.ShowCommandHelp(ctx, cmd.Root(), name)
		},
	}
}

// refusedCommand is a command of runc that runv does not have. It says so
// whatever its arguments are.
func (a *app) refusedCommand(name, why string) *urfave.Command {
	return &urfave.Command{
		Name:            name,
		Usage:           "not supported yet",
		Hidden:          true,
		SkipFlagParsing: true,
		Action: func(context.Context, *urfave.Command) error {
			return fmt.Errorf("%s: not supported yet: %s", name, why)
		},
	}
}
