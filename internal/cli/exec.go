package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

func (a *app) execCommand() *urfave.Command {
	var opts execOptions
	return &urfave.Command{
		Name:         "exec",
		Usage:        "run another process in a container",
		ArgsUsage:    "<container-id> <command> [arguments]",
		Category:     groupProcess,
		StopOnNthArg: new(1),
		Description: `The process gets the environment, user, working directory, capabilities and
limits of the container's own process, as the options change them, or all that
the file of --process has. Options end at the container's id.

The exit status is that of the process, 128+n after signal n; 127 when the
command was not found, 126 when it cannot be executed, 255 for other errors.

Examples:
   runv exec web ls -l /
   runv exec -t web sh
   runv exec --user 1000:1000 --env DEBUG=1 --cwd /tmp web env
   runv exec --detach --pid-file /run/job.pid web /bin/job
   runv exec --process process.json web`,
		Flags: opts.flags(),
		Action: func(ctx context.Context, cmd *urfave.Command) error {
			if err := minArgs(cmd, 1); err != nil {
				return err
			}
			err := inContainer(ctx, cmd, func(ctx context.Context, cmd *urfave.Command, id string) error {
				opts.edit.args = cmd.Args().Tail()
				if cmd.IsSet("no-new-privs") {
					opts.edit.noNewPrivs = &opts.noNewPrivs
				}
				if len(opts.edit.args) > 0 && opts.edit.args[0] == "--" {
					opts.edit.args = opts.edit.args[1:]
				}
				return a.exec(ctx, id, opts)
			})
			if exit := (*exitError)(nil); err != nil && !errors.As(err, &exit) {
				return &exitError{status: statusExecFailed, err: err}
			}
			return err
		},
	}
}

type execOptions struct {
	edit          processEdit
	process       string
	consoleSocket string
	pidFile       string
	pidfdSocket   string
	cgroups       []string
	preserveFDs   int
	detach        bool
	ignorePaused  bool
	noNewPrivs    bool
	refused       map[string]*string // flags of runc that runv does not have, by name
}

func (o *execOptions) flags() []urfave.Flag {
	o.refused = map[string]*string{}
	flags := []urfave.Flag{
		&urfave.BoolFlag{Name: "tty", Aliases: []string{"t"}, Destination: &o.edit.tty, Usage: "give the process a terminal"},
		&urfave.StringFlag{Name: "user", Aliases: []string{"u"}, Destination: &o.edit.user, Usage: "run as `UID[:GID]`, in numbers"},
		&urfave.StringSliceFlag{Name: "env", Aliases: []string{"e"}, Destination: &o.edit.env, Usage: "set `NAME=VALUE` in the environment; repeatable"},
		&urfave.StringFlag{Name: "cwd", Destination: &o.edit.cwd, Usage: "work in `DIR` of the container"},
		&urfave.Int64SliceFlag{Name: "additional-gids", Aliases: []string{"g"}, Destination: &o.edit.gids, Usage: "add the group `GID`; repeatable"},
		&urfave.StringSliceFlag{Name: "cap", Aliases: []string{"c"}, Destination: &o.edit.caps, Usage: "add the capability `CAP`; repeatable"},
		&urfave.BoolFlag{Name: "no-new-privs", Destination: &o.noNewPrivs, Usage: "forbid the process to gain privileges"},
		&urfave.StringFlag{Name: "process", Aliases: []string{"p"}, Destination: &o.process, TakesFile: true, Usage: "take the process from the JSON in `FILE`"},
		&urfave.BoolFlag{Name: "detach", Aliases: []string{"d"}, Destination: &o.detach, Usage: "return when the process runs"},
		&urfave.StringFlag{Name: "pid-file", Destination: &o.pidFile, TakesFile: true, Usage: "write the pid of the process's stand-in to `FILE`"},
		&urfave.StringFlag{Name: "console-socket", Destination: &o.consoleSocket, TakesFile: true, Usage: "unix `SOCKET` that gets the master end of the process's terminal"},
		pidfdSocketFlag(&o.pidfdSocket),
		preserveFDsFlag(&o.preserveFDs),
		&urfave.StringSliceFlag{Name: "cgroup", Destination: &o.cgroups, Usage: "run in the existing cgroup `PATH` below the container's"},
		&urfave.BoolFlag{Name: "ignore-paused", Destination: &o.ignorePaused, Usage: "in a paused container, wait until it is resumed"},
	}
	for _, name := range []string{"apparmor", "process-label"} {
		value := new(string)
		o.refused[name] = value
		flags = append(flags, &urfave.StringFlag{Name: name, Destination: value, Hidden: true})
	}
	return flags
}

// exec runs a process in a container. This path is kept short: no
// configuration is read, no host is probed.
func (a *app) exec(ctx context.Context, id string, opts execOptions) error {
	for name, value := range opts.refused {
		if *value != "" {
			return rpcerror.New(errdefs.ErrNotImplemented, fmt.Sprintf("--%s=%s: not supported: the guest has neither AppArmor nor SELinux", name, *value))
		}
	}
	if err := checkPreserveFDs(opts.preserveFDs); err != nil {
		return err
	}
	cgroup, err := subCgroup(opts.cgroups)
	if err != nil {
		return err
	}
	store, err := a.openStore()
	if err != nil {
		return err
	}
	c, err := loadContainer(store, id)
	if err != nil {
		return err
	}
	if err := execAllowed(store.Live(c), opts.ignorePaused); err != nil {
		return err
	}
	process, err := opts.load(c.Bundle)
	if err != nil {
		return err
	}
	if err := a.checkProcess(process); err != nil {
		return err
	}
	if err := checkTerminal(opts.detach, process.Terminal, opts.consoleSocket); err != nil {
		return err
	}
	a.log.Debug("process is valid", "container", id, "program", process.Args[0], "uid", process.User.UID, "gid", process.User.GID,
		"cwd", process.Cwd, "terminal", process.Terminal)
	sup, err := dial(ctx, store.PodDir(c.PodID))
	if err != nil {
		return err
	}
	defer sup.close()
	a.log.Debug("supervisor is connected", "container", id, "pod", c.PodID)
	job := execJob{app: a, supervisor: sup, podDir: store.PodDir(c.PodID), id: id, process: process, cgroup: cgroup, opts: opts}
	if opts.detach {
		return job.detached(ctx, opts.consoleSocket)
	}
	status, err := job.foreground(ctx)
	a.log.Debug("process has ended", "container", id, "status", status)
	if err == nil && status != 0 {
		return &exitError{status: status, err: podFailure(store, c.PodID)}
	}
	return err
}

// subCgroup reads the values of --cgroup: in a guest with cgroup v2 there is one, without the
// controllers that it has before it for v1.
func subCgroup(values []string) (string, error) {
	switch {
	case len(values) == 0:
		return "", nil
	case len(values) > 1 || strings.Contains(values[0], ":"):
		return "", rpcerror.New(errdefs.ErrNotImplemented,
			fmt.Sprintf("--cgroup=%s: the guest has cgroup v2: one path without controllers is possible", strings.Join(values, " --cgroup=")))
	}
	// As runc since 1.2, which looks at where the path leads and not only at where it ends.
	if !filepath.IsLocal(filepath.Join(".", strings.TrimLeft(values[0], "/"))) {
		return "", rpcerror.New(errdefs.ErrInvalidArgument, fmt.Sprintf("--cgroup=%s: bad sub cgroup path: it leads out of the container's", values[0]))
	}
	return values[0], nil
}

func execAllowed(status state.Status, ignorePaused bool) error {
	switch {
	case status == state.Stopped:
		return rpcerror.New(errdefs.ErrFailedPrecondition, "cannot exec in a stopped container")
	case status == state.Creating:
		return rpcerror.New(errdefs.ErrFailedPrecondition, "cannot exec in a container that is being created")
	case status == state.Paused && !ignorePaused:
		return rpcerror.New(errdefs.ErrFailedPrecondition, "cannot exec in a paused container (use --ignore-paused to override)")
	}
	return nil
}

// load makes the process to execute.
func (o *execOptions) load(bundleDir string) (*specs.Process, error) {
	p, err := containerProcess(bundleDir)
	if err != nil {
		return nil, err
	}
	if o.process != "" {
		return processFile(o.process, p)
	}
	return p, o.edit.apply(p)
}

// execJob is one exec.
type execJob struct {
	app        *app
	supervisor *supervisor
	podDir     string
	id         string
	process    *specs.Process
	cgroup     string
	opts       execOptions
}

// request asks the supervisor to run the process for a stand-in.
func (j *execJob) request(ctx context.Context, token []byte) (*supervisorv1.ExecResponse, error) {
	data, err := json.Marshal(j.process)
	if err != nil {
		return nil, err
	}
	inherited, err := inherited()
	if err != nil {
		return nil, err
	}
	if !j.opts.ignorePaused { // else it takes as long as the user lets it
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	return j.supervisor.processes.Exec(ctx, &supervisorv1.ExecRequest{
		ContainerId: j.id, Process: data, Standin: token, Cgroup: j.cgroup, IgnorePaused: j.opts.ignorePaused,
		Inherited: inherited,
	})
}

// detached leaves a stand-in process behind that holds the process's stdio.
func (j *execJob) detached(ctx context.Context, consoleSocket string) error {
	standIn, err := j.app.startStandIn(ctx, j.podDir, standInOptions{terminal: j.process.Terminal, consoleSocket: consoleSocket})
	if err != nil {
		return err
	}
	j.app.log.Debug("stand-in is connected", "container", j.id, "pid", standIn.pid())
	started, err := j.request(ctx, standIn.token())
	if err != nil {
		return errors.Join(err, standIn.kill())
	}
	j.app.log.Debug("process runs", "container", j.id, "exec", started.GetExecId())
	if err := sendPidfd(ctx, j.opts.pidfdSocket, "setns", standIn.pid()); err != nil {
		return errors.Join(err, standIn.kill())
	}
	if j.opts.pidFile != "" {
		if err := writePidFile(j.opts.pidFile, standIn.pid()); err != nil {
			return errors.Join(err, standIn.kill())
		}
	}
	return nil
}

// foreground is the process's stand-in itself until the process's end.
func (j *execJob) foreground(ctx context.Context) (status int, err error) {
	if err := sendPidfd(ctx, j.opts.pidfdSocket, "setns", os.Getpid()); err != nil {
		return 0, err
	}
	if j.opts.pidFile != "" {
		if err := writePidFile(j.opts.pidFile, os.Getpid()); err != nil {
			return 0, err
		}
	}
	tty := &userTerminal{}
	if j.process.Terminal {
		if tty, err = j.app.findTerminal(); err != nil {
			return 0, err
		}
		if err := tty.makeRaw(); err != nil {
			return 0, err
		}
		defer tty.restore()
		if width, height := tty.size(); width > 0 && height > 0 {
			j.process.ConsoleSize = &specs.Box{Width: uint(width), Height: uint(height)}
		}
	}
	client, err := j.app.connectStandIn(ctx, j.podDir, j.process.Terminal)
	if err != nil {
		return 0, err
	}
	defer client.close()
	// From here on signals are the process's, which may be heard of before the answer comes.
	asking, stopAsking := context.WithCancelCause(ctx)
	defer stopAsking(nil)
	defer j.app.forwardSignals(func(sig unix.Signal) error {
		if ends(sig) {
			time.AfterFunc(askPatience, func() { stopAsking(interrupted(sig)) })
		}
		return client.signal(sig)
	})()
	started, err := j.request(asking, client.token())
	if cause := (*exitError)(nil); errors.As(context.Cause(asking), &cause) && err != nil {
		return 0, cause
	}
	if err != nil {
		return 0, err
	}
	j.app.log.Debug("process runs", "container", j.id, "exec", started.GetExecId())
	defer tty.follow(ctx, j.app.resizer(j.supervisor, j.id, started.GetExecId()))()
	return client.wait(ctx)
}

// askPatience is how long a process may take to start after its user has sent a signal that would end it.
const askPatience = 2 * time.Second

// ends tells whether a signal is one by which users end a command.
func ends(sig unix.Signal) bool {
	return sig == unix.SIGINT || sig == unix.SIGTERM || sig == unix.SIGHUP || sig == unix.SIGQUIT
}

// interrupted is the end of a command by a signal.
func interrupted(sig unix.Signal) error {
	return &exitError{status: 128 + int(sig), err: fmt.Errorf("%w before the process had started", errInterrupted)}
}

var errInterrupted = errors.New("interrupted")
