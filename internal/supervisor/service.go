package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	agentv1 "runv/api/agent/v1"
	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/bundle"
	"runv/internal/journal"
	"runv/internal/pod"
	"runv/internal/rpcerror"
	"runv/internal/standin"
)

// maxRequest bounds a message: the longest process, and what goes around it.
const maxRequest = bundle.MaxConfig + 1<<20

// newServer returns a gRPC server with the services of api/supervisor/v1 for a pod.
func newServer(p *pod.Pod, version string, log *slog.Logger) *grpc.Server {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			began := time.Now()
			resp, err := handler(ctx, req)
			log.Debug("call", "method", info.FullMethod, "took", time.Since(began), "err", err)
			return resp, toStatus(err)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			return toStatus(handler(srv, ss))
		}),
	)
	supervisorv1.RegisterPodServer(s, &podService{pod: p, version: version})
	supervisorv1.RegisterContainersServer(s, &containersService{pod: p})
	supervisorv1.RegisterProcessesServer(s, &processesService{pod: p})
	return s
}

// toStatus makes an error a gRPC status. Unavailable is what callers get when there is no
// supervisor any more, so nothing else may have that code: not an agent that is gone, and
// no guest that says so.
func toStatus(err error) error {
	if errdefs.IsUnavailable(err) && !errors.Is(err, pod.ErrEnded) {
		err = rpcerror.New(errdefs.ErrInternal, err.Error())
	}
	return rpcerror.ToStatus(err)
}

// parseToken reads the token that names a stand-in.
func parseToken(b []byte) (token standin.Token, err error) {
	if len(b) != len(token) {
		return token, rpcerror.New(errdefs.ErrInvalidArgument, fmt.Sprintf("standin: token of %d bytes, not %d", len(b), len(token)))
	}
	return standin.Token(b), nil
}

type podService struct {
	supervisorv1.UnimplementedPodServer
	pod     *pod.Pod
	version string
}

func (s *podService) Version(context.Context, *supervisorv1.VersionRequest) (*supervisorv1.VersionResponse, error) {
	return &supervisorv1.VersionResponse{Version: s.version, Api: "v1", Pid: uint32(os.Getpid()), PodId: s.pod.ID()}, nil
}

func (s *podService) Events(req *supervisorv1.EventsRequest, stream grpc.ServerStreamingServer[supervisorv1.Event]) error {
	return s.pod.Follow(stream.Context(), req.After, req.Follow, func(ev journal.Event) error {
		if req.ContainerId != "" && ev.Container != req.ContainerId && ev.Type != journal.Lost {
			return nil
		}
		return stream.Send(&supervisorv1.Event{
			Seq: ev.Seq, TimeUnixNano: ev.Time.UnixNano(), Type: ev.Type, ContainerId: ev.Container,
			ExecId: ev.Exec, Pid: uint32(ev.PID), Status: ev.Status, Lost: ev.Lost,
		})
	})
}

func (s *podService) Shutdown(ctx context.Context, _ *supervisorv1.ShutdownRequest) (*supervisorv1.ShutdownResponse, error) {
	return &supervisorv1.ShutdownResponse{}, s.pod.Shutdown(ctx)
}

// inherited is what the guest is told of a caller.
func inherited(in *supervisorv1.Inherited) *agentv1.Inherited {
	if in == nil {
		return nil
	}
	out := &agentv1.Inherited{
		SchedPolicy: in.SchedPolicy, SchedPriority: in.SchedPriority, Nice: in.Nice, SchedResetOnFork: in.SchedResetOnFork,
		IoPriority: in.IoPriority, OomScoreAdj: in.OomScoreAdj, CoredumpFilter: in.CoredumpFilter, TimerSlackNs: in.TimerSlackNs,
		Personality: in.Personality, Securebits: in.Securebits, NoNewPrivs: in.NoNewPrivs, ThpDisable: in.ThpDisable, Umask: in.Umask,
	}
	for _, l := range in.Rlimits {
		out.Rlimits = append(out.Rlimits, &agentv1.Rlimit{Resource: l.Resource, Soft: l.Soft, Hard: l.Hard})
	}
	return out
}

type containersService struct {
	supervisorv1.UnimplementedContainersServer
	pod *pod.Pod
}

func (s *containersService) Create(ctx context.Context, req *supervisorv1.CreateRequest) (*supervisorv1.CreateResponse, error) {
	token, err := parseToken(req.Standin)
	if err != nil {
		return nil, err
	}
	pid, err := s.pod.Create(ctx, pod.CreateRequest{
		ID: req.Id, Bundle: req.Bundle, StandIn: token, NoNewKeyring: req.NoNewKeyring,
		Inherited: inherited(req.Inherited), Environment: req.Environment,
	})
	return &supervisorv1.CreateResponse{Pid: uint32(pid)}, err
}

func (s *containersService) Start(ctx context.Context, req *supervisorv1.StartRequest) (*supervisorv1.StartResponse, error) {
	return &supervisorv1.StartResponse{}, s.pod.Start(ctx, req.Id)
}

func (s *containersService) State(ctx context.Context, req *supervisorv1.StateRequest) (*supervisorv1.StateResponse, error) {
	c, err := s.pod.State(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	resp := &supervisorv1.StateResponse{Id: c.ID, Status: string(c.Status), Pid: uint32(c.StandIn.PID), Bundle: c.Bundle}
	if c.ExitStatus != nil {
		resp.ExitStatus = *c.ExitStatus
	}
	if c.ExitedAt != nil {
		resp.ExitedUnixNano = c.ExitedAt.UnixNano()
	}
	return resp, nil
}

func (s *containersService) Delete(ctx context.Context, req *supervisorv1.DeleteRequest) (*supervisorv1.DeleteResponse, error) {
	return &supervisorv1.DeleteResponse{}, s.pod.Delete(ctx, req.Id, req.Force, req.Environment)
}

func (s *containersService) Pause(ctx context.Context, req *supervisorv1.PauseRequest) (*supervisorv1.PauseResponse, error) {
	return &supervisorv1.PauseResponse{}, s.pod.Pause(ctx, req.Id)
}

func (s *containersService) Resume(ctx context.Context, req *supervisorv1.ResumeRequest) (*supervisorv1.ResumeResponse, error) {
	return &supervisorv1.ResumeResponse{}, s.pod.Resume(ctx, req.Id)
}

func (s *containersService) Update(ctx context.Context, req *supervisorv1.UpdateRequest) (*supervisorv1.UpdateResponse, error) {
	res, err := s.pod.Update(ctx, req.Id, req.Resources)
	if err != nil {
		return nil, err
	}
	return &supervisorv1.UpdateResponse{
		InEffect: res.InEffect, Vcpus: uint32(res.VCPUs), MemoryBytes: uint64(res.MemoryBytes), Warnings: res.Warnings,
	}, nil
}

func (s *containersService) Stats(ctx context.Context, req *supervisorv1.StatsRequest) (*supervisorv1.StatsResponse, error) {
	st, host, err := s.pod.Stats(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	return &supervisorv1.StatsResponse{
		CpuUsageNanos: st.CpuUsageNanos, CpuUserNanos: st.CpuUserNanos, CpuSystemNanos: st.CpuSystemNanos,
		CpuThrottledPeriods: st.CpuThrottledPeriods, CpuThrottledNanos: st.CpuThrottledNanos,
		MemoryUsageBytes: st.MemoryUsageBytes, MemoryLimitBytes: st.MemoryLimitBytes,
		MemorySwapUsageBytes: st.MemorySwapUsageBytes, MemoryStat: st.MemoryStat,
		PidsCurrent: st.PidsCurrent, PidsLimit: st.PidsLimit, OomKills: st.OomKills,
		Vmm: &supervisorv1.VmmStats{
			Cgroup:        host.Path,
			CpuUsageNanos: host.CPUUsage, CpuUserNanos: host.CPUUser, CpuSystemNanos: host.CPUSys,
			CpuThrottledPeriods: host.ThrottledPeriods, CpuThrottledNanos: host.Throttled,
			MemoryUsageBytes: host.MemoryUsage, MemoryLimitBytes: host.MemoryLimit,
			GuestBytes: host.Guest, OverheadBytes: host.Overhead,
			ThreadsCurrent: host.Pids, ThreadsLimit: host.PidsLimit, OomKills: host.OOMKills,
		},
	}, nil
}

type processesService struct {
	supervisorv1.UnimplementedProcessesServer
	pod *pod.Pod
}

func (s *processesService) Exec(ctx context.Context, req *supervisorv1.ExecRequest) (*supervisorv1.ExecResponse, error) {
	token, err := parseToken(req.Standin)
	if err != nil {
		return nil, err
	}
	id, pid, err := s.pod.Exec(ctx, pod.ExecRequest{
		Container: req.ContainerId, ExecID: req.ExecId, Process: req.Process, StandIn: token, Cgroup: req.Cgroup,
		IgnorePaused: req.IgnorePaused, Inherited: inherited(req.Inherited),
	})
	return &supervisorv1.ExecResponse{ExecId: id, Pid: uint32(pid)}, err
}

func (s *processesService) Signal(ctx context.Context, req *supervisorv1.SignalRequest) (*supervisorv1.SignalResponse, error) {
	return &supervisorv1.SignalResponse{}, s.pod.Signal(ctx, req.ContainerId, req.ExecId, req.Signal, req.All)
}

func (s *processesService) Resize(ctx context.Context, req *supervisorv1.ResizeRequest) (*supervisorv1.ResizeResponse, error) {
	return &supervisorv1.ResizeResponse{}, s.pod.Resize(ctx, req.ContainerId, req.ExecId, req.Width, req.Height)
}

func (s *processesService) CloseStdin(ctx context.Context, req *supervisorv1.CloseStdinRequest) (*supervisorv1.CloseStdinResponse, error) {
	return &supervisorv1.CloseStdinResponse{}, s.pod.CloseStdin(ctx, req.ContainerId, req.ExecId)
}

func (s *processesService) Wait(ctx context.Context, req *supervisorv1.WaitRequest) (*supervisorv1.WaitResponse, error) {
	status, at, err := s.pod.Wait(ctx, req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return &supervisorv1.WaitResponse{Status: status, ExitedUnixNano: at.UnixNano()}, nil
}

func (s *processesService) List(ctx context.Context, req *supervisorv1.ListRequest) (*supervisorv1.ListResponse, error) {
	procs, err := s.pod.Processes(ctx, req.ContainerId)
	if err != nil {
		return nil, err
	}
	resp := &supervisorv1.ListResponse{}
	for _, p := range procs {
		resp.Processes = append(resp.Processes, &supervisorv1.Process{
			Pid: p.Pid, ParentPid: p.ParentPid, Uid: p.Uid, StartTimeUnixNano: p.StartTimeUnixNano, CpuNanos: p.CpuNanos,
			Tty: p.Tty, Command: p.Command, ExecId: p.ExecId, Init: p.Init,
		})
	}
	return resp, nil
}
