package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	urfave "github.com/urfave/cli/v3"
	"google.golang.org/grpc"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/journal"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

func (a *app) eventsCommand() *urfave.Command {
	var interval time.Duration
	var once, all bool
	return &urfave.Command{
		Name:      "events",
		Usage:     "print events of a container, and what it uses, as JSON lines",
		ArgsUsage: "<container-id>",
		Category:  groupInspect,
		Description: `Prints, every interval, an event of type stats, and one of type oom when memory ran out,
until the container has stopped, as runc does. With --all also the container's
other events, first those so far. Types: create, start,
exec-added, exec-started, exit, oom, paused, resumed, delete, and lost
when this reader was too slow. The lines have runc's shape: type, id, data.

Of a container that has stopped the events that were recorded are printed, also
when the supervisor is dead.

Examples:
   runv events --stats web
   runv events --interval 1s web | jq -c 'select(.type == "oom")'`,
		Flags: []urfave.Flag{
			&urfave.DurationFlag{Name: "interval", Value: 5 * time.Second, Destination: &interval, Usage: "`TIME` between two stats events"},
			&urfave.BoolFlag{Name: "stats", Destination: &once, Usage: "print the stats once and end"},
			&urfave.BoolFlag{Name: "all", Destination: &all, Usage: "print the events that runc has not, too, from the first one on"},
		},
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			if interval <= 0 {
				return fmt.Errorf("--interval=%s: must be above 0", interval)
			}
			store, err := a.openStore()
			if err != nil {
				return err
			}
			c, err := loadContainer(store, id)
			if err != nil {
				return err
			}
			out := json.NewEncoder(a.prog.Stdout)
			if store.Live(c) == state.Stopped {
				if once {
					return rpcerror.New(errdefs.ErrFailedPrecondition, fmt.Sprintf("container with id %s is not running", id))
				}
				return printRecorded(filepath.Join(store.PodDir(c.PodID), state.EventsFile), id, out)
			}
			sup, err := dial(ctx, store.PodDir(c.PodID))
			if err != nil {
				return err
			}
			defer sup.close()
			if once {
				return printStats(ctx, sup, id, out)
			}
			return followEvents(ctx, sup, id, interval, all, out)
		}),
	}
}

// event is one line of output.
type event struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data any    `json:"data,omitempty"`
}

// eventData is what an event of runv's own tells; runc has no such events.
type eventData struct {
	Seq    uint64    `json:"seq,omitempty"`
	Time   time.Time `json:"time"`
	ExecID string    `json:"execId,omitempty"`
	Pid    uint32    `json:"pid,omitempty"`
	Status *uint32   `json:"status,omitempty"` // of exit
	Lost   uint64    `json:"lost,omitempty"`   // of lost
}

// printRecorded prints the events of a container that a pod's journal has.
func printRecorded(path, id string, out *json.Encoder) error {
	events, err := journal.Read(path, 0)
	if err != nil {
		return err
	}
	for _, ev := range events {
		if ev.Container != id {
			continue
		}
		data := eventData{Seq: ev.Seq, Time: ev.Time.UTC(), ExecID: ev.Exec, Pid: uint32(ev.PID)}
		if ev.Type == journal.Exit {
			data.Status = new(ev.Status)
		}
		if err := out.Encode(event{Type: ev.Type, ID: id, Data: data}); err != nil {
			return err
		}
	}
	return nil
}

func printStats(ctx context.Context, sup *supervisor, id string, out *json.Encoder) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := sup.containers.Stats(ctx, &supervisorv1.StatsRequest{Id: id})
	if err != nil {
		return err
	}
	return out.Encode(event{Type: "stats", ID: id, Data: statsOf(resp)})
}

// followEvents prints stats and, from now on, that memory ran out, or with all every event, until the
// container's init has exited, the pod has gone, or ctx ends.
func followEvents(ctx context.Context, sup *supervisor, id string, interval time.Duration, all bool, out *json.Encoder) error {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := sup.pod.Events(ctx, &supervisorv1.EventsRequest{Follow: true, ContainerId: id})
	if err != nil {
		return err
	}
	events := make(chan *supervisorv1.Event)
	ended := make(chan error, 1)
	go func() { ended <- receive(ctx, stream, events) }()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case ev := <-events:
			switch {
			case all:
				err = out.Encode(eventOf(ev))
			case ev.GetType() == journal.OOM && ev.GetTimeUnixNano() >= began.UnixNano():
				err = out.Encode(event{Type: "oom", ID: id})
			}
			if err != nil {
				return err
			}
			if ev.GetType() == journal.Exit && ev.GetExecId() == "" || ev.GetType() == journal.Delete {
				return nil
			}
		case <-tick.C:
			err := printStats(ctx, sup, id, out)
			if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
				return err
			}
		case err := <-ended:
			return err
		}
	}
}

// receive passes events on until the stream ends.
func receive(ctx context.Context, stream grpc.ServerStreamingClient[supervisorv1.Event], to chan<- *supervisorv1.Event) error {
	for {
		ev, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) || ctx.Err() != nil:
			return nil
		case err != nil:
			return rpcerror.FromStatus(err)
		}
		select {
		case to <- ev:
		case <-ctx.Done():
			return nil
		}
	}
}

func eventOf(ev *supervisorv1.Event) event {
	data := eventData{
		Seq:    ev.GetSeq(),
		Time:   time.Unix(0, ev.GetTimeUnixNano()).UTC(),
		ExecID: ev.GetExecId(),
		Pid:    ev.GetPid(),
		Lost:   ev.GetLost(),
	}
	if ev.GetType() == journal.Exit {
		data.Status = new(ev.GetStatus())
	}
	return event{Type: ev.GetType(), ID: ev.GetContainerId(), Data: data}
}

// stats has the JSON of runc's events for what a guest knows.
type stats struct {
	CPU struct {
		Usage      cpuUsage   `json:"usage"`
		Throttling throttling `json:"throttling"`
	} `json:"cpu"`
	Memory struct {
		Cache uint64            `json:"cache,omitempty"` // bytes, as all sizes
		Usage memoryEntry       `json:"usage"`
		Swap  memoryEntry       `json:"swap"`
		Raw   map[string]uint64 `json:"raw,omitempty"`
	} `json:"memory"`
	Pids struct {
		Current uint64 `json:"current,omitempty"`
		Limit   uint64 `json:"limit,omitempty"`
	} `json:"pids"`
	// Runc's readers expect these members; a guest has nothing to say about them.
	Blkio    struct{} `json:"blkio"`
	Hugetlb  struct{} `json:"hugetlb"`
	IntelRdt struct{} `json:"intel_rdt"`
	// VMM is what runc has not: what the VM takes on the host, beside what the container takes in it.
	VMM *vmmStats `json:"vmm,omitempty"`
}

// vmmStats is of QEMU and its helpers. The names are those of a container's where they mean the same.
type vmmStats struct {
	Cgroup string `json:"cgroup,omitempty"` // empty: there is none, and little is known
	CPU    struct {
		Usage      cpuUsage   `json:"usage"`
		Throttling throttling `json:"throttling"`
	} `json:"cpu"`
	Memory struct {
		Usage memoryEntry `json:"usage"`
		// Guest is how much of the guest's memory the host holds, Overhead what QEMU and its helpers
		// hold for themselves.
		Guest    uint64 `json:"guest"`
		Overhead uint64 `json:"overhead"`
	} `json:"memory"`
	Threads struct {
		Current uint64 `json:"current,omitempty"`
		Limit   uint64 `json:"limit,omitempty"`
	} `json:"threads"`
	OOMKills uint64 `json:"oomKills"` // by the host's kernel
}

type cpuUsage struct {
	Total  uint64 `json:"total,omitempty"` // nanoseconds, as all times
	Kernel uint64 `json:"kernel"`
	User   uint64 `json:"user"`
}

type throttling struct {
	ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
	ThrottledTime    uint64 `json:"throttledTime,omitempty"`
}

type memoryEntry struct {
	Limit   uint64 `json:"limit"`
	Usage   uint64 `json:"usage,omitempty"`
	Failcnt uint64 `json:"failcnt"`
}

func statsOf(r *supervisorv1.StatsResponse) stats {
	var s stats
	s.CPU.Usage.Total = r.GetCpuUsageNanos()
	s.CPU.Usage.Kernel = r.GetCpuSystemNanos()
	s.CPU.Usage.User = r.GetCpuUserNanos()
	s.CPU.Throttling.ThrottledPeriods = r.GetCpuThrottledPeriods()
	s.CPU.Throttling.ThrottledTime = r.GetCpuThrottledNanos()
	s.Memory.Cache = r.GetMemoryStat()["file"]
	s.Memory.Usage = memoryEntry{Limit: r.GetMemoryLimitBytes(), Usage: r.GetMemoryUsageBytes()}
	s.Memory.Swap = memoryEntry{Usage: r.GetMemorySwapUsageBytes()}
	s.Memory.Raw = r.GetMemoryStat()
	s.Pids.Current = r.GetPidsCurrent()
	s.Pids.Limit = r.GetPidsLimit()
	if r.GetVmm() != nil {
		s.VMM = vmmStatsOf(r.GetVmm())
	}
	return s
}

func vmmStatsOf(r *supervisorv1.VmmStats) *vmmStats {
	s := &vmmStats{Cgroup: r.GetCgroup(), OOMKills: r.GetOomKills()}
	s.CPU.Usage = cpuUsage{Total: r.GetCpuUsageNanos(), Kernel: r.GetCpuSystemNanos(), User: r.GetCpuUserNanos()}
	s.CPU.Throttling = throttling{ThrottledPeriods: r.GetCpuThrottledPeriods(), ThrottledTime: r.GetCpuThrottledNanos()}
	s.Memory.Usage = memoryEntry{Limit: r.GetMemoryLimitBytes(), Usage: r.GetMemoryUsageBytes()}
	s.Memory.Guest, s.Memory.Overhead = r.GetGuestBytes(), r.GetOverheadBytes()
	s.Threads.Current, s.Threads.Limit = r.GetThreadsCurrent(), r.GetThreadsLimit()
	return s
}
