package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/container"
	"runv/internal/guest/stdio"
)

type guest struct {
	*Server
	conn *watchedConn
}

// Info implements agentv1.GuestService.
func (g *guest) Info(context.Context, *agentv1.InfoRequest) (*agentv1.InfoResponse, error) {
	return g.Machine.Info()
}

// Configure implements agentv1.GuestService.
func (g *guest) Configure(ctx context.Context, r *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	return &agentv1.ConfigureResponse{}, g.Machine.Configure(ctx, r)
}

// Online implements agentv1.GuestService.
func (g *guest) Online(ctx context.Context, r *agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
	return g.Machine.Online(ctx, r), nil
}

// Signalled implements agentv1.GuestService.
func (g *guest) Signalled(_ context.Context, r *agentv1.SignalledRequest) (*agentv1.SignalledResponse, error) {
	return &agentv1.SignalledResponse{Threads: g.Machine.Signalled(r.Threads)}, nil
}

// Events implements agentv1.GuestService.
func (g *guest) Events(ctx context.Context, r *agentv1.EventsRequest, out agentv1.Guest_EventsServer) error {
	after := r.After
	for {
		events, err := g.Server.Events.After(ctx, after)
		if err != nil {
			return toStatus(err)
		}
		for _, ev := range events {
			if err := out.Send(ev); err != nil {
				return err
			}
			after = ev.Seq
		}
	}
}

// The power is cut when nothing was written for quiet, at the latest after grace.
const (
	quiet = 10 * time.Millisecond
	grace = 250 * time.Millisecond
)

// Shutdown implements agentv1.GuestService.
func (g *guest) Shutdown(ctx context.Context, _ *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	if err := g.Machine.Shutdown(ctx); err != nil {
		g.Log.Error("shut down", "error", err)
	}
	go g.powerOff()
	return &agentv1.ShutdownResponse{}, nil
}

// powerOff lets the answer out first. The RPC library does not tell when it has
// written an answer, so the end of writing is taken for it.
func (g *guest) powerOff() {
	end := time.After(grace)
	select {
	case <-g.conn.written: // perhaps an earlier one
	case <-end:
	}
	for waiting := true; waiting; {
		select {
		case <-g.conn.written:
		case <-time.After(quiet):
			waiting = false
		case <-g.conn.closed:
			waiting = false
		case <-end:
			waiting = false
		}
	}
	g.Machine.PowerOff()
}

type containers struct {
	*Server
	claim claimFunc
}

// claimFunc takes a stream from the agent channel by its number.
type claimFunc = func(context.Context, uint32) (net.Conn, error)

// withStreams calls start with the streams that the request names. They are claimed before
// anything can fail, and closed if it does: a stream that nobody claims stays open.
func withStreams(ctx context.Context, claim claimFunc, s *agentv1.Stdio, start func(stdio.Streams) (pid int, err error)) (uint32, error) {
	streams, err := stdio.Claim(ctx, claim, stdio.Numbers{s.GetStdin(), s.GetStdout(), s.GetStderr()})
	if err != nil {
		return 0, err
	}
	pid, err := start(streams)
	if err != nil {
		streams.Close()
		return 0, err
	}
	return uint32(pid), nil
}

// receive reads what a stream carries to its end; without a stream it is inline.
func receive(ctx context.Context, claim claimFunc, stream uint32, inline []byte) ([]byte, error) {
	if stream == 0 {
		return inline, nil
	}
	conn, err := claim(ctx, stream)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	data, err := io.ReadAll(io.LimitReader(conn, container.MaxSpec+1))
	if err != nil {
		return nil, fmt.Errorf("receive specification: %w", err)
	}
	return data, nil
}

// Create implements agentv1.ContainersService.
func (s *containers) Create(ctx context.Context, r *agentv1.CreateRequest) (*agentv1.CreateResponse, error) {
	pid, err := withStreams(ctx, s.claim, r.Stdio, func(streams stdio.Streams) (_ int, err error) {
		if r.Spec, err = receive(ctx, s.claim, r.SpecStream, r.Spec); err != nil {
			return 0, err
		}
		return s.Containers.Create(ctx, r, streams)
	})
	return &agentv1.CreateResponse{Pid: pid}, err
}

// Start implements agentv1.ContainersService.
func (s *containers) Start(ctx context.Context, r *agentv1.StartRequest) (*agentv1.StartResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if err != nil {
		return nil, err
	}
	return &agentv1.StartResponse{}, c.Start(ctx)
}

// Delete implements agentv1.ContainersService.
func (s *containers) Delete(ctx context.Context, r *agentv1.DeleteRequest) (*agentv1.DeleteResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return &agentv1.DeleteResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &agentv1.DeleteResponse{}, c.Delete(ctx)
}

// Pause implements agentv1.ContainersService.
func (s *containers) Pause(ctx context.Context, r *agentv1.PauseRequest) (*agentv1.PauseResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if err != nil {
		return nil, err
	}
	return &agentv1.PauseResponse{}, c.Pause(ctx)
}

// Resume implements agentv1.ContainersService.
func (s *containers) Resume(ctx context.Context, r *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if err != nil {
		return nil, err
	}
	return &agentv1.ResumeResponse{}, c.Resume(ctx)
}

// Update implements agentv1.ContainersService.
func (s *containers) Update(_ context.Context, r *agentv1.UpdateRequest) (*agentv1.UpdateResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if err != nil {
		return nil, err
	}
	limits, err := c.Update(r.Resources)
	return &agentv1.UpdateResponse{InEffect: limits}, err
}

// Stats implements agentv1.ContainersService.
func (s *containers) Stats(_ context.Context, r *agentv1.StatsRequest) (*agentv1.StatsResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if err != nil {
		return nil, err
	}
	st, err := c.Stats()
	if err != nil {
		return nil, err
	}
	return &agentv1.StatsResponse{
		CpuUsageNanos:        st.CPUUsage * 1000,
		CpuUserNanos:         st.CPUUser * 1000,
		CpuSystemNanos:       st.CPUSystem * 1000,
		CpuThrottledPeriods:  st.ThrottledPeriods,
		CpuThrottledNanos:    st.ThrottledTime * 1000,
		MemoryUsageBytes:     st.Memory,
		MemoryLimitBytes:     st.MemoryLimit,
		MemorySwapUsageBytes: st.Swap,
		MemoryStat:           st.MemoryStat,
		PidsCurrent:          st.Pids,
		PidsLimit:            st.PidsLimit,
		OomKills:             st.OOMKills,
	}, nil
}

// Processes implements agentv1.ContainersService.
func (s *containers) Processes(_ context.Context, r *agentv1.ProcessesRequest) (*agentv1.ProcessesResponse, error) {
	c, err := s.Containers.Get(r.Id)
	if err != nil {
		return nil, err
	}
	list, err := c.Processes()
	return &agentv1.ProcessesResponse{Processes: list}, err
}

type processes struct {
	*Server
	claim claimFunc
}

// Exec implements agentv1.ProcessesService.
func (s *processes) Exec(ctx context.Context, r *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	pid, err := withStreams(ctx, s.claim, r.Stdio, func(streams stdio.Streams) (int, error) {
		var err error
		if r.Process, err = receive(ctx, s.claim, r.ProcessStream, r.Process); err != nil {
			return 0, err
		}
		c, err := s.Containers.Get(r.ContainerId)
		if err != nil {
			return 0, err
		}
		return c.Exec(ctx, r, streams)
	})
	return &agentv1.ExecResponse{Pid: pid}, err
}

// Signal implements agentv1.ProcessesService.
func (s *processes) Signal(_ context.Context, r *agentv1.SignalRequest) (*agentv1.SignalResponse, error) {
	c, err := s.Containers.Get(r.ContainerId)
	if err != nil {
		return nil, err
	}
	return &agentv1.SignalResponse{}, c.Signal(r.ExecId, r.Signal, r.All)
}

// Resize implements agentv1.ProcessesService.
func (s *processes) Resize(_ context.Context, r *agentv1.ResizeRequest) (*agentv1.ResizeResponse, error) {
	c, err := s.Containers.Get(r.ContainerId)
	if err != nil {
		return nil, err
	}
	return &agentv1.ResizeResponse{}, c.Resize(r.ExecId, r.Width, r.Height)
}

type networks struct {
	*Server
	claim claimFunc
}

// Apply implements agentv1.NetworksService.
func (n *networks) Apply(ctx context.Context, r *agentv1.ApplyNetworkRequest) (*agentv1.ApplyNetworkResponse, error) {
	return n.Networks.Apply(ctx, r)
}

// Remove implements agentv1.NetworksService.
func (n *networks) Remove(ctx context.Context, r *agentv1.RemoveNetworkRequest) (*agentv1.RemoveNetworkResponse, error) {
	return &agentv1.RemoveNetworkResponse{}, n.Networks.Remove(ctx, r.Id)
}

// Resolve implements agentv1.NetworksService.
func (n *networks) Resolve(ctx context.Context, r *agentv1.ResolveRequest) (*agentv1.ResolveResponse, error) {
	stream, err := n.claim(ctx, r.Stream)
	if err != nil {
		return nil, err
	}
	if err := n.Networks.Resolve(r.Id, r.Ip, stream); err != nil {
		_ = stream.Close()
		return nil, err
	}
	return &agentv1.ResolveResponse{}, nil
}

type mirrors struct{ *Server }

// Create implements agentv1.MirrorsService.
func (m *mirrors) Create(_ context.Context, r *agentv1.CreateMirrorRequest) (*agentv1.CreateMirrorResponse, error) {
	path, err := m.Mirrors.Create(r)
	return &agentv1.CreateMirrorResponse{Path: path}, err
}

// Apply implements agentv1.MirrorsService.
func (m *mirrors) Apply(ctx context.Context, r *agentv1.ApplyMirrorRequest) (*agentv1.ApplyMirrorResponse, error) {
	return &agentv1.ApplyMirrorResponse{}, m.Mirrors.Apply(ctx, r)
}

// Replace implements agentv1.MirrorsService.
func (m *mirrors) Replace(_ context.Context, r *agentv1.ReplaceMirrorRequest) (*agentv1.ReplaceMirrorResponse, error) {
	problems, err := m.Mirrors.Replace(r)
	return &agentv1.ReplaceMirrorResponse{Problems: problems}, err
}

// Remove implements agentv1.MirrorsService.
func (m *mirrors) Remove(_ context.Context, r *agentv1.RemoveMirrorRequest) (*agentv1.RemoveMirrorResponse, error) {
	return &agentv1.RemoveMirrorResponse{}, m.Mirrors.Remove(r.Id)
}
