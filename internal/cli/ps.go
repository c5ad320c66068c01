package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	urfave "github.com/urfave/cli/v3"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

func (a *app) psCommand() *urfave.Command {
	var format string
	return &urfave.Command{
		Name:         "ps",
		Usage:        "list the processes in a container",
		ArgsUsage:    "<container-id> [ps options]",
		Category:     groupProcess,
		StopOnNthArg: new(1),
		Description: `The pids of the table are those of the guest. It is that of "ps -ef"; of the
options of ps, -e, -f and -o with the columns uid, user, pid, ppid, c, stime,
tty, time, args, cmd are understood. JSON lists the pids on the host: that of
the container's stand-in.

Examples:
   runv ps web
   runv ps web -o pid,time,args
   runv ps --format json web`,
		Flags: []urfave.Flag{formatFlag(&format)},
		Action: func(ctx context.Context, cmd *urfave.Command) error {
			if err := minArgs(cmd, 1); err != nil {
				return err
			}
			if err := checkFormat(format); err != nil {
				return fmt.Errorf("ps: %w", err)
			}
			return inContainer(ctx, cmd, func(ctx context.Context, cmd *urfave.Command, id string) error {
				columns, err := psColumns(cmd.Args().Tail())
				if err != nil {
					return err
				}
				if format == "json" {
					return a.printPids(id)
				}
				processes, err := a.processes(ctx, id)
				if err != nil {
					return err
				}
				return printProcesses(a.prog.Stdout, processes, columns, time.Now())
			})
		},
	}
}

// processes asks for a container's processes; a stopped one has none.
func (a *app) processes(ctx context.Context, id string) ([]*supervisorv1.Process, error) {
	store, err := a.openStore()
	if err != nil {
		return nil, err
	}
	c, err := loadContainer(store, id)
	if err != nil {
		return nil, err
	}
	if store.Live(c) == state.Stopped {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	sup, err := dial(ctx, store.PodDir(c.PodID))
	if err != nil {
		return nil, err
	}
	defer sup.close()
	resp, err := sup.processes.List(ctx, &supervisorv1.ListRequest{ContainerId: id})
	return resp.GetProcesses(), err
}

// printPids prints the pids of a container on the host, on which callers look up what they want to know of a
// process, or do it something: that of its stand-in. A pid of the guest is a stranger's there.
func (a *app) printPids(id string) error {
	store, err := a.openStore()
	if err != nil {
		return err
	}
	c, err := loadContainer(store, id)
	if err != nil {
		return err
	}
	pids := []int{}
	if store.Live(c) != state.Stopped && c.StandIn.PID > 0 {
		pids = append(pids, c.StandIn.PID)
	}
	return json.NewEncoder(a.prog.Stdout).Encode(pids)
}

// psColumn is one column of ps. A negative width is left-aligned, 0 is the
// last column's.
type psColumn struct {
	names  []string // as -o has it
	header string
	width  int
	value  func(p *supervisorv1.Process, now time.Time) string
}

// psTable lists the columns in the order of ps -ef.
func psTable() []psColumn {
	return []psColumn{
		{[]string{"uid", "user"}, "UID", -8, func(p *supervisorv1.Process, _ time.Time) string { return psUser(p.GetUid()) }},
		{[]string{"pid"}, "PID", 5, func(p *supervisorv1.Process, _ time.Time) string { return decimal(p.GetPid()) }},
		{[]string{"ppid"}, "PPID", 5, func(p *supervisorv1.Process, _ time.Time) string { return decimal(p.GetParentPid()) }},
		{[]string{"c"}, "C", 2, func(p *supervisorv1.Process, now time.Time) string { return psUsage(p, now) }},
		{[]string{"stime"}, "STIME", -5, func(p *supervisorv1.Process, now time.Time) string { return psStart(p, now) }},
		{[]string{"tty", "tt"}, "TTY", -8, func(p *supervisorv1.Process, _ time.Time) string { return visible(p.GetTty()) }},
		{[]string{"time", "cputime"}, "TIME", 8, func(p *supervisorv1.Process, _ time.Time) string { return psTime(p) }},
		{[]string{"cmd", "args", "command"}, "CMD", 0, func(p *supervisorv1.Process, _ time.Time) string { return visible(p.GetCommand()) }},
	}
}

// psColumns understands the options of ps that runv has.
func psColumns(options []string) ([]psColumn, error) {
	table := psTable()
	names, chosen := "", false
	for i := 0; i < len(options); i++ {
		switch opt := options[i]; {
		case slices.Contains([]string{"-e", "-f", "-ef", "-fe", "-A"}, opt):
		case opt == "-o" && i+1 < len(options):
			i++
			names, chosen = options[i], true
		case strings.HasPrefix(opt, "-o") && len(opt) > 2:
			names, chosen = opt[2:], true
		default:
			return nil, fmt.Errorf("ps option %q is not supported (-e, -f and -o are)", opt)
		}
	}
	if !chosen {
		return table, nil
	}
	var columns []psColumn
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(table, func(c psColumn) bool { return slices.Contains(c.names, name) })
		if i < 0 {
			return nil, rpcerror.New(errdefs.ErrInvalidArgument, fmt.Sprintf("ps column %q is not known", name))
		}
		columns = append(columns, table[i])
	}
	return columns, nil
}

func printProcesses(w io.Writer, processes []*supervisorv1.Process, columns []psColumn, now time.Time) error {
	line := func(cell func(psColumn) string) error {
		cells := make([]string, len(columns))
		for i, c := range columns {
			cells[i] = fmt.Sprintf("%*s", c.width, cell(c))
		}
		_, err := fmt.Fprintln(w, strings.TrimRight(strings.Join(cells, " "), " "))
		return err
	}
	if err := line(func(c psColumn) string { return c.header }); err != nil {
		return err
	}
	for _, p := range processes {
		if err := line(func(c psColumn) string { return c.value(p, now) }); err != nil {
			return err
		}
	}
	return nil
}

// psUser names root only: other names are the container's affair.
func psUser(uid uint32) string {
	if uid == 0 {
		return "root"
	}
	return decimal(uid)
}

// psUsage is the share of one CPU that the process has used in its life, in
// percent.
func psUsage(p *supervisorv1.Process, now time.Time) string {
	life := now.Sub(time.Unix(0, p.GetStartTimeUnixNano()))
	if life <= 0 {
		return "0"
	}
	return strconv.FormatUint(min(99, p.GetCpuNanos()*100/uint64(life)), 10)
}

func psStart(p *supervisorv1.Process, now time.Time) string {
	start := time.Unix(0, p.GetStartTimeUnixNano())
	switch {
	case now.Sub(start) < 24*time.Hour && now.Day() == start.Day():
		return start.Format("15:04")
	case now.Year() == start.Year():
		return start.Format("Jan02")
	}
	return start.Format("2006")
}

func psTime(p *supervisorv1.Process) string {
	s := p.GetCpuNanos() / uint64(time.Second)
	return fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
}

func decimal(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
