package cli_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/bundle"
	"runv/internal/rpcerror"
	"runv/internal/standin"
	"runv/internal/state"
	"runv/internal/unixsock"
)

// fakeSupervisor serves the API of a pod without a VM. What it was asked it answers from the state
// directory, as far as it has an answer.
type fakeSupervisor struct {
	supervisorv1.UnimplementedPodServer
	supervisorv1.UnimplementedContainersServer
	supervisorv1.UnimplementedProcessesServer
	store    *state.Store
	standIns *standin.Listener
	server   *grpc.Server
	ended    chan struct{} // closed when the pod shall end
	end      sync.Once

	mu      sync.Mutex
	created map[string]bool      // containers that were not running when they were paused
	inits   map[string]*fakeInit // of the containers that were created here
}

// fakeInit is the init of a container.
type fakeInit struct {
	peer    *standin.Peer
	program []string
}

func (f *fakeSupervisor) init(id string) *fakeInit {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.inits[id]
}

// serveFake serves a fake for a pod, until stop is called.
func serveFake(store *state.Store, podID string) (f *fakeSupervisor, stop func(), err error) {
	l, err := unixsock.Listen(store.PodDir(podID), state.SupervisorSocket, "unix")
	if err != nil {
		return nil, nil, err
	}
	standIns, err := standin.Listen(store.PodDir(podID))
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	f = &fakeSupervisor{
		store: store, standIns: standIns, ended: make(chan struct{}), created: map[string]bool{}, inits: map[string]*fakeInit{},
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		resp, err := handler(ctx, req)
		return resp, rpcerror.ToStatus(err)
	}))
	f.server = s
	supervisorv1.RegisterPodServer(s, f)
	supervisorv1.RegisterContainersServer(s, f)
	supervisorv1.RegisterProcessesServer(s, f)
	var served sync.WaitGroup
	served.Go(func() { _ = s.Serve(l) })
	return f, func() {
		s.GracefulStop()
		served.Wait()
		_ = standIns.Close()
	}, nil
}

// fakeMain is the supervisor process of the tests. $RUNV_FAKE says how it fails:
// "silent" ends without a word, "deaf" never serves, "no-guest" says that it
// cannot, "no-vm" fails to create, "hangs" does not answer create, "no-start"
// fails to start, "dies-started" ends before it can say that it has started.
func fakeMain(args []string) int {
	flags := flag.NewFlagSet("supervisor", flag.ExitOnError)
	root := flags.String("root", "", "")
	podID := flags.String("pod", "", "")
	config := flags.String("config", "", "")
	_ = flags.String("guest-dir", "", "")
	_ = flags.Bool("debug", false, "")
	_ = flags.Parse(args)
	ready := os.NewFile(3, "ready")
	fail := os.Getenv("RUNV_FAKE")
	switch fail {
	case "silent":
		fmt.Fprintln(os.Stderr, "panic: out of luck")
		return 2
	case "no-guest":
		fmt.Fprintln(ready, "find guest files: none")
		return 1
	case "deaf":
		_, _ = io.Copy(io.Discard, ready) // until killed
	}
	if *config != "" && !filepath.IsAbs(*config) {
		fmt.Fprintln(ready, "relative path of configuration")
		return 1
	}
	err := func() error {
		store, err := state.Open(*root)
		if err != nil {
			return err
		}
		pod, err := store.LoadPod(*podID)
		if err != nil {
			return err
		}
		if pod.Supervisor, err = state.ProcessOf(os.Getpid()); err != nil {
			return err
		}
		if err := store.SavePod(pod); err != nil {
			return err
		}
		f, stop, err := serveFake(store, *podID)
		if err != nil {
			return err
		}
		fmt.Fprintln(ready, "ok")
		ready.Close()
		<-f.ended
		stop()
		return store.RemovePod(*podID)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (f *fakeSupervisor) Create(ctx context.Context, req *supervisorv1.CreateRequest) (*supervisorv1.CreateResponse, error) {
	switch os.Getenv("RUNV_FAKE") {
	case "no-vm":
		return nil, rpcerror.New(errdefs.ErrUnavailable, "create "+req.GetId()+": start VM: VMM ended; console: panic")
	case "hangs":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	id := req.GetId()
	b, err := bundle.Load(req.GetBundle())
	if err != nil {
		return nil, err
	}
	init := &fakeInit{program: b.Spec.Process.Args}
	if init.program[0] == "nonesuch" {
		return nil, rpcerror.New(errdefs.ErrNotFound, "create "+id+`: exec: "nonesuch": executable file not found in $PATH`)
	}
	if init.peer, err = f.standIns.Await(ctx, standin.Token(req.GetStandin())); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.inits[id] = init
	f.mu.Unlock()
	c, err := f.store.LoadContainer(id)
	if err != nil {
		return nil, err
	}
	c.Status = state.Created
	if c.StandIn, err = state.ProcessOf(init.peer.PID); err != nil {
		return nil, err
	}
	return &supervisorv1.CreateResponse{Pid: uint32(init.peer.PID)}, f.store.SaveContainer(c)
}

func (f *fakeSupervisor) Start(_ context.Context, req *supervisorv1.StartRequest) (*supervisorv1.StartResponse, error) {
	if os.Getenv("RUNV_FAKE") == "no-start" {
		return nil, rpcerror.New(errdefs.ErrPermissionDenied, "start "+req.GetId()+`: exec: "/etc": permission denied`)
	}
	if err := f.set(req.GetId(), state.Running); err != nil {
		return nil, err
	}
	if os.Getenv("RUNV_FAKE") == "dies-started" {
		os.Exit(9)
	}
	if init := f.init(req.GetId()); init != nil {
		go f.live(req.GetId(), init)
	}
	return &supervisorv1.StartResponse{}, nil
}

// live is the life of init: it ends with the status that exit or a signal gives.
func (f *fakeSupervisor) live(id string, init *fakeInit) {
	var status uint32
	switch init.program[0] {
	case "exit":
		n, _ := strconv.ParseUint(init.program[1], 10, 8)
		status = uint32(n)
	case "cat":
		_, _ = io.Copy(init.peer.Stdout, init.peer.Stdin)
	case "wait":
		signals := make(chan int, 1)
		go func() {
			_ = init.peer.Serve(context.Background(), func(n int) { signals <- n }, func(uint32, uint32) {})
		}()
		fmt.Fprintln(init.peer.Stdout, "waiting")
		if status = 128 + uint32(<-signals); status == 128+uint32(unix.SIGUSR2) {
			f.server.GracefulStop() // the answer to start goes out
			os.Exit(9)
		}
	}
	if c, err := f.store.LoadContainer(id); err == nil {
		c.Status, c.ExitStatus = state.Stopped, &status
		_ = f.store.SaveContainer(c)
	}
	init.peer.CloseStdio()
	_ = init.peer.Exit(status)
}

func (f *fakeSupervisor) Shutdown(context.Context, *supervisorv1.ShutdownRequest) (*supervisorv1.ShutdownResponse, error) {
	f.end.Do(func() { close(f.ended) })
	return &supervisorv1.ShutdownResponse{}, nil
}

// set writes a status as a supervisor does.
func (f *fakeSupervisor) set(id string, status state.Status) error {
	c, err := f.store.LoadContainer(id)
	if err != nil {
		return err
	}
	c.Status = status
	return f.store.SaveContainer(c)
}

func (f *fakeSupervisor) Pause(_ context.Context, req *supervisorv1.PauseRequest) (*supervisorv1.PauseResponse, error) {
	id := req.GetId()
	if c, err := f.store.LoadContainer(id); err == nil && c.Status == state.Created {
		f.mu.Lock()
		f.created[id] = true
		f.mu.Unlock()
		return &supervisorv1.PauseResponse{}, f.set(id, state.Paused)
	}
	return &supervisorv1.PauseResponse{}, f.move(id, state.Running, state.Paused, "container not running")
}

func (f *fakeSupervisor) Resume(_ context.Context, req *supervisorv1.ResumeRequest) (*supervisorv1.ResumeResponse, error) {
	id, to := req.GetId(), state.Running
	f.mu.Lock()
	if f.created[id] {
		to = state.Created
		delete(f.created, id)
	}
	f.mu.Unlock()
	return &supervisorv1.ResumeResponse{}, f.move(id, state.Paused, to, "container not paused")
}

// move sets a container's status if it has the one before.
func (f *fakeSupervisor) move(id string, from, to state.Status, denial string) error {
	c, err := f.store.LoadContainer(id)
	if err == nil && c.Status != from {
		err = rpcerror.New(errdefs.ErrFailedPrecondition, denial)
	}
	if err != nil {
		return err
	}
	return f.set(id, to)
}

// Delete removes a container, and with the last one the pod ends.
func (f *fakeSupervisor) Delete(_ context.Context, req *supervisorv1.DeleteRequest) (*supervisorv1.DeleteResponse, error) {
	if init := f.init(req.GetId()); init != nil {
		_ = init.peer.Close()
	}
	c, err := f.store.LoadContainer(req.GetId())
	if err == nil {
		_, err = f.store.RemoveContainer(c.ID)
	}
	others, _ := f.store.Containers()
	if slices.ContainsFunc(others, func(o state.Container) bool { return o.PodID == c.PodID }) {
		return &supervisorv1.DeleteResponse{}, err
	}
	f.end.Do(func() { close(f.ended) })
	if err != nil {
		return nil, err
	}
	return &supervisorv1.DeleteResponse{}, f.store.RemovePod(c.PodID)
}

// Signal obeys KILL and refuses HUP, so that a supervisor's error can be seen.
func (f *fakeSupervisor) Signal(_ context.Context, req *supervisorv1.SignalRequest) (*supervisorv1.SignalResponse, error) {
	switch req.GetSignal() {
	case 9:
		return &supervisorv1.SignalResponse{}, f.set(req.GetContainerId(), state.Stopped)
	case 1:
		return nil, rpcerror.New(errdefs.ErrNotFound, "process has exited")
	case 2:
		return nil, rpcerror.New(errdefs.ErrInternal, "the guest said:\nno")
	}
	return &supervisorv1.SignalResponse{}, nil
}

func (f *fakeSupervisor) List(context.Context, *supervisorv1.ListRequest) (*supervisorv1.ListResponse, error) {
	return &supervisorv1.ListResponse{Processes: []*supervisorv1.Process{
		{Pid: 71, ParentPid: 1, Tty: "?", Command: "sleep 30", Init: true},
		{Pid: 99, ParentPid: 71, Uid: 5, Tty: "pts/0", Command: "sh", ExecId: "e"},
	}}, nil
}

// Update refuses pids, and tells what it was asked.
func (f *fakeSupervisor) Update(_ context.Context, req *supervisorv1.UpdateRequest) (*supervisorv1.UpdateResponse, error) {
	r, warnings, err := bundle.ParseResources(req.GetResources())
	if err != nil {
		return nil, err
	}
	if r.Pids != nil {
		return nil, rpcerror.New(errdefs.ErrInvalidArgument, "pids.limit: no")
	}
	return &supervisorv1.UpdateResponse{
		InEffect: map[string]string{"asked": string(req.GetResources())}, Vcpus: 2, MemoryBytes: 3 << 20, Warnings: warnings,
	}, nil
}

func (f *fakeSupervisor) Stats(context.Context, *supervisorv1.StatsRequest) (*supervisorv1.StatsResponse, error) {
	return &supervisorv1.StatsResponse{CpuUsageNanos: 7, MemoryUsageBytes: 8, PidsCurrent: 2}, nil
}

// Events tells of a short life, and then, to a follower, of its end.
func (f *fakeSupervisor) Events(req *supervisorv1.EventsRequest, stream grpc.ServerStreamingServer[supervisorv1.Event]) error {
	for _, ev := range []*supervisorv1.Event{
		{Seq: 1, TimeUnixNano: 1e9, Type: "create", ContainerId: req.GetContainerId(), Pid: 4711},
		{Seq: 2, TimeUnixNano: 2e9, Type: "oom", ContainerId: req.GetContainerId()},
		{Seq: 3, TimeUnixNano: 3e9, Type: "exit", ContainerId: req.GetContainerId(), ExecId: "e", Status: 1},
		{Seq: 4, TimeUnixNano: 4e9, Type: "exit", ContainerId: req.GetContainerId(), Pid: 4711},
	} {
		if err := stream.Send(ev); err != nil {
			return err
		}
	}
	if req.GetFollow() {
		<-stream.Context().Done()
	}
	return nil
}

// Exec has programs of its own: those that do not run, exit, and cat, which
// copies its input once, and tells the process as it came.
func (f *fakeSupervisor) Exec(ctx context.Context, req *supervisorv1.ExecRequest) (*supervisorv1.ExecResponse, error) {
	peer, err := f.standIns.Await(ctx, standin.Token(req.GetStandin()))
	if err != nil {
		return nil, err
	}
	var p specs.Process
	if err := json.Unmarshal(req.GetProcess(), &p); err != nil {
		return nil, err
	}
	defer peer.Close()
	defer peer.CloseStdio()
	var status uint64
	switch p.Args[0] {
	case "nonesuch":
		return nil, rpcerror.New(errdefs.ErrNotFound, `exec: "nonesuch": executable file not found in $PATH`)
	case "/etc":
		return nil, rpcerror.New(errdefs.ErrPermissionDenied, `exec: "/etc": permission denied`)
	case "broken":
		return nil, rpcerror.New(errdefs.ErrInternal, "agent does not answer")
	case "exit":
		status, err = strconv.ParseUint(p.Args[1], 10, 8)
	case "cat":
		_, err = io.Copy(peer.Stdout, peer.Stdin)
	case "show":
		_, err = fmt.Fprintf(peer.Stdout, "%s\n", req.GetProcess())
	}
	if err != nil {
		return nil, err
	}
	return &supervisorv1.ExecResponse{ExecId: "e", Pid: uint32(peer.PID)}, peer.Exit(uint32(status))
}
