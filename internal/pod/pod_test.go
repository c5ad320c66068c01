package pod_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/poll"

	agentv1 "runv/api/agent/v1"
	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/hostcgroup"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/fake"
	"runv/internal/journal"
	"runv/internal/mirror"
	"runv/internal/pod"
	"runv/internal/rpcerror"
	"runv/internal/standin"
	"runv/internal/state"
	"runv/internal/storage"
	"runv/internal/transport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agent is an agent without a kernel: it speaks the real protocol over the fake
// driver's channel, and its containers are records.
type agent struct {
	mu      sync.Mutex
	session *transport.Session
	channel net.Conn // under the session
	events  chan *agentv1.Event
	seq     uint64
	stdout  map[string]net.Conn // by container and exec id
	stdin   map[string]net.Conn
	signals chan uint32
	// What the next calls do; nil: succeed.
	create, start, exec func() error
	created             map[string]*specs.Spec // by container
	online              func(*agentv1.OnlineRequest) (*agentv1.OnlineResponse, error)
	update              func(*agentv1.UpdateRequest) (*agentv1.UpdateResponse, error)
	shutdown            func()
	mirrors             guestMirrors
}

func newAgent() *agent {
	return &agent{
		events: make(chan *agentv1.Event, 100), stdout: make(map[string]net.Conn), stdin: make(map[string]net.Conn),
		signals: make(chan uint32, 10), created: make(map[string]*specs.Spec),
	}
}

// serve is the guest of a fake VM.
func (a *agent) serve(_ *fake.VM, channel net.Conn) {
	session, err := transport.Guest(channel)
	if err != nil {
		return
	}
	a.session, a.channel = session, channel
	server, _ := ttrpc.NewServer()
	agentv1.RegisterGuestService(server, a)
	agentv1.RegisterContainersService(server, a)
	agentv1.RegisterProcessesService(server, a)
	agentv1.RegisterMirrorsService(server, &a.mirrors)
	l := &oneListener{conn: session.Control(), done: make(chan struct{})}
	go func() {
		<-session.Done()
		l.Close()
		server.Close()
	}()
	_ = server.Serve(context.Background(), l)
}

// oneListener accepts one connection.
type oneListener struct {
	mu   sync.Mutex
	conn net.Conn
	once sync.Once
	done chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	conn := l.conn
	l.conn = nil
	l.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	<-l.done
	return nil, io.EOF
}
func (l *oneListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{} }

func (a *agent) send(ev *agentv1.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seq++
	ev.Seq = a.seq
	a.events <- ev
}

// exit ends a process after it has written this.
func (a *agent) exit(id, execID, output string, status uint32) {
	a.mu.Lock()
	out := a.stdout[id+"/"+execID]
	a.mu.Unlock()
	if out != nil {
		_, _ = io.WriteString(out, output)
		_ = out.Close()
	}
	a.send(&agentv1.Event{ContainerId: id, ExecId: execID, Kind: &agentv1.Event_Exit{Exit: &agentv1.Exit{Status: status}}})
	a.send(&agentv1.Event{ContainerId: id, ExecId: execID, Kind: &agentv1.Event_Drained{Drained: &agentv1.Drained{StdoutBytes: uint64(len(output))}}})
}

func (a *agent) claim(id, execID string, s *agentv1.Stdio) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for n, m := range map[uint32]map[string]net.Conn{s.Stdin: a.stdin, s.Stdout: a.stdout} {
		if n == 0 {
			continue
		}
		conn, err := a.session.Claim(ctx, n)
		if err != nil {
			return err
		}
		m[id+"/"+execID] = conn
	}
	return nil
}

func (a *agent) Info(context.Context, *agentv1.InfoRequest) (*agentv1.InfoResponse, error) {
	return &agentv1.InfoResponse{KernelRelease: "6.1.0-\x1b[2Jown" + strings.Repeat("x", 1<<10)}, nil
}

func (a *agent) Online(_ context.Context, r *agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
	if a.online != nil {
		return a.online(r)
	}
	return &agentv1.OnlineResponse{Cpus: r.Cpus, PluggedBytes: r.PluggedBytes}, nil
}

func (a *agent) Configure(context.Context, *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	return &agentv1.ConfigureResponse{}, nil
}

func (a *agent) Shutdown(context.Context, *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	if a.shutdown != nil {
		a.shutdown()
	}
	return &agentv1.ShutdownResponse{}, nil
}

func (a *agent) Events(ctx context.Context, _ *agentv1.EventsRequest, stream agentv1.Guest_EventsServer) error {
	for {
		select {
		case ev := <-a.events:
			if err := stream.Send(ev); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-a.session.Done():
			return io.EOF
		}
	}
}

func (a *agent) Create(_ context.Context, r *agentv1.CreateRequest) (*agentv1.CreateResponse, error) {
	if a.create != nil {
		if err := a.create(); err != nil {
			return nil, err
		}
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(r.Spec, spec); err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.created[r.Id] = spec
	a.mu.Unlock()
	return &agentv1.CreateResponse{Pid: 10}, a.claim(r.Id, "", r.Stdio)
}

func (a *agent) Start(context.Context, *agentv1.StartRequest) (*agentv1.StartResponse, error) {
	if a.start != nil {
		if err := a.start(); err != nil {
			return nil, err
		}
	}
	return &agentv1.StartResponse{}, nil
}

func (a *agent) Delete(context.Context, *agentv1.DeleteRequest) (*agentv1.DeleteResponse, error) {
	return &agentv1.DeleteResponse{}, nil
}

func (a *agent) Pause(context.Context, *agentv1.PauseRequest) (*agentv1.PauseResponse, error) {
	return &agentv1.PauseResponse{}, nil
}

func (a *agent) Resume(context.Context, *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	return &agentv1.ResumeResponse{}, nil
}

// Signalled says of even threads that they have a signal.
func (a *agent) Signalled(_ context.Context, r *agentv1.SignalledRequest) (*agentv1.SignalledResponse, error) {
	resp := &agentv1.SignalledResponse{}
	for _, thread := range r.Threads {
		if thread%2 == 0 {
			resp.Threads = append(resp.Threads, thread)
		}
	}
	return resp, nil
}

func (a *agent) Update(_ context.Context, r *agentv1.UpdateRequest) (*agentv1.UpdateResponse, error) {
	if a.update != nil {
		return a.update(r)
	}
	return &agentv1.UpdateResponse{}, nil
}

func (a *agent) Stats(context.Context, *agentv1.StatsRequest) (*agentv1.StatsResponse, error) {
	return &agentv1.StatsResponse{PidsCurrent: 1}, nil
}

func (a *agent) Processes(context.Context, *agentv1.ProcessesRequest) (*agentv1.ProcessesResponse, error) {
	return &agentv1.ProcessesResponse{Processes: []*agentv1.Process{{Pid: 10}}}, nil
}

func (a *agent) Exec(_ context.Context, r *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	if a.exec != nil {
		if err := a.exec(); err != nil {
			return nil, err
		}
	}
	return &agentv1.ExecResponse{Pid: 11}, a.claim(r.ContainerId, r.ExecId, r.Stdio)
}

func (a *agent) Signal(_ context.Context, r *agentv1.SignalRequest) (*agentv1.SignalResponse, error) {
	a.signals <- r.Signal
	if r.Signal == 9 {
		go a.exit(r.ContainerId, r.ExecId, "", 137)
	}
	return &agentv1.SignalResponse{}, nil
}

func (a *agent) Resize(context.Context, *agentv1.ResizeRequest) (*agentv1.ResizeResponse, error) {
	return &agentv1.ResizeResponse{}, nil
}

// noShare is a share without mounts.
type noShare struct {
	mu    sync.Mutex
	added map[string]bool
	done  chan struct{}
	add   error

	waits       chan []int
	interrupted chan []int
}

func (s *noShare) LockWaits() <-chan []int { return s.waits }
func (s *noShare) InterruptWaits(threads []int) error {
	s.interrupted <- threads
	return nil
}

func (s *noShare) Start(context.Context) error { return nil }
func (s *noShare) Socket() string              { return "" }
func (s *noShare) Add(_ context.Context, id string, _ storage.Root, binds map[int]storage.Bind) (storage.Mapping, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.add != nil {
		return storage.Mapping{}, s.add
	}
	s.added[id] = true
	m := storage.Mapping{Root: "/share/" + id, Binds: map[int]string{}}
	for i, b := range binds {
		m.Binds[i] = "/share/binds" + b.Source
	}
	return m, nil
}

func (s *noShare) Remove(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.added, id)
	return nil
}
func (s *noShare) Processes() []int            { return nil }
func (s *noShare) Done() <-chan struct{}       { return s.done }
func (s *noShare) Err() error                  { return errors.New("share server: killed") }
func (s *noShare) Close(context.Context) error { return nil }

// disk is a state directory that may be full.
type disk struct {
	*state.Store
	full atomic.Bool
}

func (d *disk) SaveContainer(c state.Container) error {
	if d.full.Load() {
		return syscall.ENOSPC
	}
	return d.Store.SaveContainer(c)
}

// world is a pod with a fake VM, a real state directory and real stand-in sockets.
type world struct {
	t       *testing.T
	store   *state.Store
	disk    *disk
	pod     *pod.Pod
	agent   *agent
	driver  *fake.Driver
	share   *noShare
	cgroup  *noCgroup
	others  chan *noCgroup // for further containers
	ran     chan error
	bundle  string
	journal *journal.Journal
	mirrors *mirrors
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, agent: newAgent(), share: &noShare{added: map[string]bool{}, done: make(chan struct{}), waits: make(chan []int), interrupted: make(chan []int)}, cgroup: &noCgroup{}, others: make(chan *noCgroup, 1), ran: make(chan error, 1), mirrors: &mirrors{}}
	w.driver = &fake.Driver{Guest: w.agent.serve}
	root := filepath.Join(t.TempDir(), "root")
	var err error
	w.store, err = state.Open(root)
	assert.NilError(t, err)
	w.disk = &disk{Store: w.store}
	record := state.Pod{ID: "p", Created: time.Now()}
	assert.NilError(t, w.store.CreatePod(record))
	record, err = w.store.LoadPod("p")
	assert.NilError(t, err)
	w.journal, err = journal.Open(filepath.Join(w.store.PodDir("p"), "events.log"))
	assert.NilError(t, err)
	listener, err := standin.Listen(w.store.PodDir("p"))
	assert.NilError(t, err)
	w.pod = pod.New(pod.Config{
		Record: record, VM: hypervisor.Config{ID: "p", RunDir: w.store.PodDir("p"), Accel: hypervisor.TCG},
		DefaultVCPUs: 1, DefaultMemory: 512 << 20, IdleTimeout: time.Minute,
		Factory: factory.Direct{Driver: w.driver, BootTimeout: 5 * time.Second},
		Share:   w.share, Cgroup: w.cgroup, NewCgroup: w.newCgroup, Recorder: w.disk, StandIns: listener, Journal: w.journal,
		OnHost: func(f func() error) error { return f() }, Log: slog.New(slog.DiscardHandler),
		Mirror: w.mirrors.make, Mirrors: mirror.New(mirror.DefaultLimits(), slog.New(slog.DiscardHandler)),
	})
	ctx, cancel := context.WithCancel(context.Background())
	go func() { w.ran <- w.pod.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-w.ran:
			t.Log("the pod ended:", err)
		case <-time.After(20 * time.Second):
			t.Error("the pod does not end")
		}
		assert.Check(t, w.journal.Close())
		assert.Check(t, listener.Close())
	})
	w.bundle = t.TempDir()
	assert.NilError(t, os.Mkdir(filepath.Join(w.bundle, "rootfs"), 0o755))
	spec := bundle.DefaultSpec()
	spec.Process.Terminal = false
	data, err := json.Marshal(spec)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(w.bundle, "config.json"), data, 0o600))
	return w
}

// newCgroup gives the cgroup that a test has prepared, or any.
func (w *world) newCgroup() pod.Cgroup {
	select {
	case g := <-w.others:
		return g
	default:
		return &noCgroup{}
	}
}

// caller is the other end of a container's or exec's stdio.
type caller struct {
	token  standin.Token
	client chan *standin.Client
	stdout *os.File
	stdin  *os.File
}

// standIn connects as a stand-in does.
func (w *world) standIn(token byte) *caller {
	w.t.Helper()
	c := &caller{token: standin.Token{token}, client: make(chan *standin.Client, 1)}
	inR, inW, err := os.Pipe()
	assert.NilError(w.t, err)
	outR, outW, err := os.Pipe()
	assert.NilError(w.t, err)
	c.stdin, c.stdout = inW, outR
	go func() {
		client, err := standin.Connect(context.Background(), w.store.PodDir("p"), c.token, standin.Stdio{Stdin: inR, Stdout: outW})
		inR.Close()
		outW.Close()
		if err == nil {
			c.client <- client
		}
		close(c.client)
	}()
	w.t.Cleanup(func() {
		inW.Close()
		outR.Close()
		if client := <-c.client; client != nil {
			client.Close()
		}
	})
	return c
}

func (w *world) reserve(id string) {
	w.t.Helper()
	assert.NilError(w.t, w.store.ReserveContainer(state.Container{ID: id, PodID: "p", Status: state.Creating, Created: time.Now()}))
}

func (w *world) create(id string, token byte) (*caller, error) {
	w.t.Helper()
	w.reserve(id)
	c := w.standIn(token)
	_, err := w.pod.Create(w.t.Context(), pod.CreateRequest{ID: id, Bundle: w.bundle, StandIn: c.token})
	return c, err
}

func (w *world) status(id string) state.Status {
	w.t.Helper()
	c, err := w.store.LoadContainer(id)
	if errdefs.IsNotFound(err) {
		return ""
	}
	assert.NilError(w.t, err)
	return c.Status
}

func TestLifeOfAContainer(t *testing.T) {
	w := newWorld(t)
	c, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.Equal(t, w.status("web"), state.Created)
	assert.NilError(t, w.pod.Pause(t.Context(), "web"))
	assert.ErrorContains(t, w.pod.Start(t.Context(), "web"), "in the paused state")
	assert.NilError(t, w.pod.Resume(t.Context(), "web"))
	assert.Equal(t, w.status("web"), state.Created)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	assert.Equal(t, w.status("web"), state.Running)
	assert.ErrorContains(t, w.pod.Start(t.Context(), "web"), "already running")
	assert.ErrorIs(t, w.pod.Delete(t.Context(), "web", false, nil), errdefs.ErrFailedPrecondition)

	assert.NilError(t, w.pod.Pause(t.Context(), "web"))
	assert.Equal(t, w.status("web"), state.Paused)
	assert.NilError(t, w.pod.Resume(t.Context(), "web"))

	_, err = io.WriteString(c.stdin, "typed")
	assert.NilError(t, err)
	buf := make([]byte, 5)
	_, err = io.ReadFull(w.agent.stdin["web/"], buf)
	assert.NilError(t, err)
	assert.Equal(t, string(buf), "typed")

	w.agent.exit("web", "", "done\n", 3)
	status, _, err := w.pod.Wait(t.Context(), "web", "")
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(3))
	out, err := io.ReadAll(c.stdout)
	assert.NilError(t, err)
	assert.Equal(t, string(out), "done\n")
	client := <-c.client
	told, err := client.Wait(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, told, uint32(3))
	client.Close()

	assert.NilError(t, <-w.ran, "the pod ends with its last container")
	w.ran <- nil
	assert.Equal(t, w.status("web"), state.Stopped)
	record, err := w.store.LoadContainer("web")
	assert.NilError(t, err)
	assert.Equal(t, *record.ExitStatus, uint32(3))
	assert.Equal(t, w.types(), "create paused resumed start paused resumed exit")
	for _, vm := range w.driver.VMs() {
		<-vm.Done()
		assert.NilError(t, vm.Err())
	}
}

// types are the types of all events so far.
func (w *world) types() string {
	w.t.Helper()
	var types string
	assert.NilError(w.t, w.pod.Follow(w.t.Context(), 0, false, func(ev journal.Event) error {
		if types != "" {
			types += " "
		}
		types += ev.Type
		return nil
	}))
	return types
}

func TestDeleteOfTheLastContainerWaitsForTheVM(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
	assert.Equal(t, <-w.agent.signals, uint32(9))
	select {
	case <-w.driver.VMs()[0].Done():
	default:
		t.Error("the VM has not ended")
	}
	assert.Equal(t, w.status("web"), state.Status(""))
	assert.NilError(t, <-w.ran)
	w.ran <- nil
	assert.Equal(t, w.types(), "create start exit delete")
}

func TestSecondContainerAndExec(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "a"))
	_, err = w.create("b", 2)
	assert.NilError(t, err)
	assert.Equal(t, len(w.driver.VMs()), 1)

	c := w.standIn(3)
	process := []byte(`{"args":["true"],"cwd":"/"}`)
	execID, _, err := w.pod.Exec(t.Context(), pod.ExecRequest{Container: "a", ExecID: "e1", Process: process, StandIn: c.token})
	assert.NilError(t, err)
	assert.Equal(t, execID, "e1")
	w.agent.exit("a", "e1", "x", 7)
	status, _, err := w.pod.Wait(t.Context(), "a", "e1")
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(7))
	assert.Equal(t, w.status("a"), state.Running)

	assert.NilError(t, w.pod.Delete(t.Context(), "a", true, nil))
	assert.Equal(t, w.status("b"), state.Created, "the pod lives on")
	select {
	case <-w.driver.VMs()[0].Done():
		t.Error("the VM has ended")
	default:
	}
	w.share.mu.Lock()
	assert.DeepEqual(t, w.share.added, map[string]bool{"b": true})
	w.share.mu.Unlock()
}

func TestPause(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	_, err = w.create("b", 5) // the pod outlives a
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Pause(t.Context(), "a"))
	assert.ErrorContains(t, w.pod.Pause(t.Context(), "a"), "container not running")
	assert.Error(t, w.pod.Start(t.Context(), "a"), "start a: cannot start a container in the paused state")
	assert.NilError(t, w.pod.Resume(t.Context(), "a"))
	assert.Equal(t, w.status("a"), state.Created, "it goes back to what it was")
	assert.NilError(t, w.pod.Start(t.Context(), "a"))
	assert.NilError(t, w.pod.Pause(t.Context(), "a"))

	req := pod.ExecRequest{Container: "a", Process: []byte(`{"args":["true"],"cwd":"/"}`), StandIn: w.standIn(2).token}
	_, _, err = w.pod.Exec(t.Context(), req)
	assert.Error(t, err, "cannot exec in a paused container")
	req.IgnorePaused = true
	impatient, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, errors.New("lost patience"))
	defer cancel()
	_, _, err = w.pod.Exec(impatient, req)
	assert.Error(t, err, "lost patience")

	req.StandIn, req.ExecID = w.standIn(3).token, "e"
	done := make(chan error)
	go func() {
		_, _, err := w.pod.Exec(t.Context(), req)
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("exec did not wait for the end of the pause: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	assert.NilError(t, w.pod.Resume(t.Context(), "a"))
	assert.NilError(t, <-done)

	assert.NilError(t, w.pod.Pause(t.Context(), "a"))
	req.StandIn, req.ExecID = w.standIn(4).token, "late"
	go func() {
		_, _, err := w.pod.Exec(t.Context(), req)
		done <- err
	}()
	w.agent.exit("a", "", "", 9)
	assert.Error(t, <-done, "cannot exec in a stopped container")
}

func TestFailedCreateIsUndone(t *testing.T) {
	boom := errors.New("boom")
	for _, tc := range []struct {
		name     string
		sabotage func(w *world)
		want     string
	}{
		{"share", func(w *world) { w.share.add = boom }, "create web: mount: boom"},
		{"agent", func(w *world) { w.agent.create = func() error { return boom } }, "create web: boom"},
		{"driver", func(w *world) { w.driver.OnStart = func(context.Context, hypervisor.Config) error { return boom } }, "create web: start VM p: boom"},
		{"VM dies", func(w *world) {
			w.agent.create = func() error {
				w.driver.VMs()[0].Print("Kernel panic - not syncing")
				w.driver.VMs()[0].Crash("signal: killed")
				<-w.agent.session.Done()
				return boom
			}
		}, "Kernel panic"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			tc.sabotage(w)
			_, err := w.create("web", 1)
			assert.ErrorContains(t, err, tc.want)
			w.ran <- <-w.ran // it ends
			assert.Equal(t, w.status("web"), state.Status(""))
			w.share.mu.Lock()
			assert.Equal(t, len(w.share.added), 0)
			w.share.mu.Unlock()
		})
	}
}

// hook adds a hook to the bundle that writes a line to a log: its phase, and the state's status.
func (w *world) hook(phase, script string) (log string) {
	w.t.Helper()
	path := filepath.Join(w.bundle, "config.json")
	data, err := os.ReadFile(path)
	assert.NilError(w.t, err)
	var spec map[string]any
	assert.NilError(w.t, json.Unmarshal(data, &spec))
	hooks, _ := spec["hooks"].(map[string]any)
	if hooks == nil {
		hooks = map[string]any{}
	}
	log = filepath.Join(w.bundle, "log")
	tell := `state=$(cat); state=${state#*'"status":"'}; echo "` + phase + `:${state%%'"'*}" >>` + log + "; "
	hooks[phase] = []any{map[string]any{"path": "/bin/sh", "args": []string{"sh", "-c", tell + script}}}
	spec["hooks"] = hooks
	data, err = json.Marshal(spec)
	assert.NilError(w.t, err)
	assert.NilError(w.t, os.WriteFile(path, data, 0o600))
	return log
}

func (w *world) hooksRan(log string) string {
	w.t.Helper()
	data, err := os.ReadFile(log)
	if !errors.Is(err, fs.ErrNotExist) {
		assert.NilError(w.t, err)
	}
	return strings.Join(strings.Fields(string(data)), " ")
}

func TestHooks(t *testing.T) {
	w := newWorld(t)
	for _, phase := range []string{"prestart", "createRuntime", "poststart", "poststop"} {
		w.hook(phase, "")
	}
	log := w.hook("createContainer", "exit 9") // the guest's, as startContainer
	var before string
	w.agent.create = func() error { before = w.hooksRan(log); return nil }
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.Equal(t, before, "prestart:creating createRuntime:creating")
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	assert.Equal(t, w.hooksRan(log), before+" poststart:running")
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
	assert.Equal(t, w.hooksRan(log), before+" poststart:running poststop:stopped")
}

func TestFailedCreateRunsPoststop(t *testing.T) {
	for _, tc := range []struct {
		name     string
		sabotage func(w *world)
		want     string
		ran      string
	}{
		{"share", func(w *world) { w.share.add = errors.New("boom") }, "mount: boom", "poststop:stopped"},
		{
			"hook", func(w *world) { w.hook("createRuntime", "echo sorry; exit 3") },
			"create web: hooks.createRuntime[0] /bin/sh: exit status 3: sorry", "createRuntime:creating poststop:stopped",
		},
		{"agent", func(w *world) { w.agent.create = func() error { return errors.New("boom") } }, "boom", "poststop:stopped"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			log := w.hook("poststop", "exit 1")
			tc.sabotage(w)
			_, err := w.create("web", 1)
			assert.ErrorContains(t, err, tc.want)
			assert.Equal(t, w.hooksRan(log), tc.ran, "before create answers")
			w.ran <- <-w.ran // it ends
			assert.Equal(t, w.status("web"), state.Status(""))
		})
	}
}

// Somebody else may remove the record, and then the hooks are his.
func TestPoststopBelongsToWhoRemovesTheRecord(t *testing.T) {
	w := newWorld(t)
	log := w.hook("poststop", "")
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	taken, err := w.store.RemoveContainer("web")
	assert.NilError(t, err)
	assert.Equal(t, len(taken.Hooks.Poststop), 1)
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
	assert.Equal(t, w.hooksRan(log), "")
}

func TestFailedPoststartStopsTheContainer(t *testing.T) {
	w := newWorld(t)
	w.hook("poststart", "exit 3")
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.ErrorContains(t, w.pod.Start(t.Context(), "web"), "start web: hooks.poststart[0] /bin/sh: exit status 3")
	assert.Equal(t, w.status("web"), state.Stopped)
}

// Whatever hangs in a hook, delete ends it, and so does a shutdown.
func TestHangingHooksAreEnded(t *testing.T) {
	for _, tc := range []struct{ phase, verb, why, after string }{
		{"createRuntime", "delete", "container is being deleted", " poststop:stopped"},
		{"poststart", "delete", "container is being deleted", " poststop:stopped"},
		{"createRuntime", "shutdown", "pod is stopping", " poststop:stopped"},
		{"poststart", "shutdown", "pod is stopping", ""}, // the container is there, stopped
	} {
		phase := tc.phase
		t.Run(tc.verb+" "+phase, func(t *testing.T) {
			w := newWorld(t)
			fifo := filepath.Join(w.bundle, "fifo")
			assert.NilError(t, unix.Mkfifo(fifo, 0o600))
			w.hook("poststop", "")
			log := w.hook(phase, ": >"+fifo+"; sleep 1000")
			hung := make(chan error, 1)
			go func() {
				_, err := w.create("web", 1)
				if err == nil {
					err = w.pod.Start(context.Background(), "web")
				}
				hung <- err
			}()
			f, err := os.Open(fifo) // until the hook runs
			assert.NilError(t, err)
			f.Close()
			if tc.verb == "delete" {
				assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
			} else {
				assert.NilError(t, w.pod.Shutdown(t.Context()))
			}
			assert.ErrorContains(t, <-hung, "hooks."+phase+"[0] /bin/sh: "+tc.why)
			status := map[string]string{"createRuntime": "creating", "poststart": "running"}[phase]
			assert.Equal(t, w.hooksRan(log), phase+":"+status+tc.after)
		})
	}
}

func TestCallerThatGoesAwayUndoesItsCreate(t *testing.T) {
	w := newWorld(t)
	w.reserve("web")
	ctx, cancel := context.WithCancel(t.Context())
	w.agent.create = func() error { cancel(); return nil }
	c := w.standIn(1)
	_, err := w.pod.Create(ctx, pod.CreateRequest{ID: "web", Bundle: w.bundle, StandIn: c.token})
	assert.ErrorIs(t, err, context.Canceled)
	assert.NilError(t, <-w.ran)
	w.ran <- nil
	assert.Equal(t, w.status("web"), state.Status(""))
}

func TestDeathOfTheVMEndsItsContainers(t *testing.T) {
	for name, kill := range map[string]func(w *world){
		"crash":     func(w *world) { w.driver.VMs()[0].Crash("signal: killed") },
		"power off": func(w *world) { w.driver.VMs()[0].PowerOff() },
		"share":     func(w *world) { close(w.share.done) },
		"garbage on the channel": func(w *world) {
			_, err := w.agent.channel.Write(bytes.Repeat([]byte{0xff}, 1<<12))
			assert.Check(w.t, err)
		},
		"event out of order": func(w *world) {
			w.agent.mu.Lock()
			w.agent.seq += 5
			w.agent.mu.Unlock()
			w.agent.send(&agentv1.Event{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c, err := w.create("web", 1)
			assert.NilError(t, err)
			assert.NilError(t, w.pod.Start(t.Context(), "web"))
			kill(w)
			status, _, err := w.pod.Wait(t.Context(), "web", "")
			assert.NilError(t, err)
			assert.Equal(t, status, uint32(137))
			client := <-c.client
			status, err = client.Wait(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, status, uint32(137))
			client.Close()
			assert.Assert(t, <-w.ran != nil, "the pod's failure is told")
			w.ran <- nil
			assert.Equal(t, w.status("web"), state.Stopped)
		})
	}
}

func TestDeathOfTheStandInKillsItsProcess(t *testing.T) {
	w := newWorld(t)
	c, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	client := <-c.client
	assert.NilError(t, client.Signal(15))
	assert.Equal(t, <-w.agent.signals, uint32(15))
	client.Close()
	assert.Equal(t, <-w.agent.signals, uint32(9))
	assert.NilError(t, <-w.ran)
	w.ran <- nil
	assert.Equal(t, w.status("web"), state.Stopped)
}

func TestGuestTellsItsKernel(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	for {
		record, err := w.store.LoadPod("p")
		assert.NilError(t, err)
		if record.Kernel != "" {
			assert.Assert(t, strings.HasPrefix(record.Kernel, "6.1.0-[2Jownxxx"), record.Kernel)
			assert.Assert(t, len(record.Kernel) <= 128)
			return
		}
		<-time.After(time.Millisecond)
	}
}

func TestUnknownNames(t *testing.T) {
	w := newWorld(t)
	assert.ErrorIs(t, w.pod.Start(t.Context(), "none"), errdefs.ErrNotFound)
	assert.ErrorIs(t, w.pod.Delete(t.Context(), "none", false, nil), errdefs.ErrNotFound)
	assert.NilError(t, w.pod.Delete(t.Context(), "none", true, nil))
	_, _, err := w.pod.Stats(t.Context(), "none")
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = w.create("web", 1)
	assert.NilError(t, err)
	_, err = w.pod.Create(t.Context(), pod.CreateRequest{ID: "web", Bundle: w.bundle})
	assert.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, _, err = w.pod.Wait(t.Context(), "web", "none")
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	assert.Assert(t, cmp.Contains(err.Error(), "none"))
	assert.ErrorIs(t, w.pod.Signal(t.Context(), "web", "", 99, false), errdefs.ErrInvalidArgument)
	assert.NilError(t, w.pod.Shutdown(t.Context()))
	assert.NilError(t, w.pod.Shutdown(t.Context()))
}

func TestUpdate(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	asked := make(chan string, 1)
	w.agent.update = func(r *agentv1.UpdateRequest) (*agentv1.UpdateResponse, error) {
		asked <- string(r.Resources)
		// A hostile guest's idea of limits.
		answer := map[string]string{"memory.max": "4096", "io.max": "8:0 a\n8:1 b\x1b[2J", "long": strings.Repeat("x", 1<<20)}
		for i := range 1000 {
			answer[strings.Repeat("y", i)] = ""
		}
		return &agentv1.UpdateResponse{InEffect: answer}, nil
	}
	res, err := w.pod.Update(t.Context(), "web", []byte(`{"memory":{"limit":4096,"swappiness":1},"future":1}`))
	assert.NilError(t, err)
	assert.Equal(t, <-asked, `{"memory":{"limit":4096,"swappiness":1}}`)
	assert.Assert(t, len(res.InEffect) <= 256)
	for _, value := range res.InEffect {
		assert.Assert(t, len(value) <= 4096 && !strings.ContainsRune(value, '\x1b'))
	}
	assert.Equal(t, res.MemoryBytes, int64(512<<20))
	assert.Equal(t, w.cgroup.limited.Swap(0), int64(512<<20), "the host's limit follows")
	assert.Equal(t, len(res.Warnings), 2, "%q", res.Warnings)

	_, err = w.pod.Update(t.Context(), "web", []byte(`{"cpu":{"quota":1}}`))
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	assert.ErrorContains(t, err, "cpu.quota")
	w.agent.update = func(*agentv1.UpdateRequest) (*agentv1.UpdateResponse, error) {
		return nil, rpcerror.ToStatus(rpcerror.New(errdefs.ErrInvalidArgument, "pids.limit: no"))
	}
	_, err = w.pod.Update(t.Context(), "web", []byte(`{"pids":{"limit":1}}`))
	assert.ErrorContains(t, err, "pids.limit: no")
	_, err = w.pod.Update(t.Context(), "none", []byte(`{}`))
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
}

// noCgroup is a cgroup on a host that has none, or whose kernel says why it has killed something in it.
type noCgroup struct {
	oom     atomic.Value // string
	removed atomic.Bool
	create  error
	limited atomic.Int64 // of the VM's memory
	limits  atomic.Pointer[specs.LinuxResources]
	joined  atomic.Int64 // pid
	told    atomic.Int64 // how often, of an OOM
}

func (g *noCgroup) Create(c hostcgroup.Container, _ int, save func(hostcgroup.Record)) error {
	if g.create == nil {
		save(hostcgroup.Record{Dirs: []hostcgroup.Dir{{Path: "/no/such/cgroup/" + c.ID}}})
	}
	return g.create
}

func (g *noCgroup) Add(id, _ string, pid int, save func(hostcgroup.Record)) error {
	if err := g.Create(hostcgroup.Container{ID: id}, pid, save); err != nil {
		return err
	}
	return g.Join(pid)
}

func (g *noCgroup) Join(pid int) error {
	g.joined.Store(int64(pid))
	return nil
}

func (g *noCgroup) Limit(r *specs.LinuxResources, vmMemory int64) error {
	g.limits.Store(r)
	g.limited.Store(vmMemory)
	return nil
}

func (g *noCgroup) Stats([]int) (hostcgroup.Stats, error) {
	return hostcgroup.Stats{Guest: 1 << 20}, nil
}
func (g *noCgroup) TellOOM() error               { g.told.Add(1); return nil }
func (g *noCgroup) OOM() string                  { why, _ := g.oom.Load().(string); return why }
func (g *noCgroup) Remove(context.Context) error { g.removed.Store(true); return nil }

// TestOOMIsToldOnTheHost lets those who watch the cgroup see it before the container's end, and once.
func TestOOMIsToldOnTheHost(t *testing.T) {
	w := newWorld(t)
	c, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	for range 2 {
		w.agent.send(&agentv1.Event{ContainerId: "web", Kind: &agentv1.Event_Oom{Oom: &agentv1.OOM{Kills: 1}}})
	}
	w.agent.exit("web", "", "", 137)
	client := <-c.client
	defer client.Close()
	status, err := client.Wait(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(137))
	assert.Equal(t, w.cgroup.told.Load(), int64(1))
}

// TestOOMInPodIsToldOfOne tells of an OOM in the cgroup of the container that had it, if it has one of its own.
func TestOOMInPodIsToldOfOne(t *testing.T) {
	w := newWorld(t)
	oom := func(id string) {
		t.Helper()
		events := func() (n int) {
			assert.NilError(t, w.pod.Follow(t.Context(), 0, false, func(ev journal.Event) error {
				if ev.Type == journal.OOM && ev.Container == id {
					n++
				}
				return nil
			}))
			return n
		}
		before := events()
		w.agent.send(&agentv1.Event{ContainerId: id, Kind: &agentv1.Event_Oom{Oom: &agentv1.OOM{Kills: 1}}})
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			if events() == before {
				return poll.Continue("no event")
			}
			return poll.Success()
		}, poll.WithDelay(time.Millisecond))
	}
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	own := &noCgroup{}
	w.others <- own
	c, err := w.create("db", 2)
	assert.NilError(t, err)
	assert.Equal(t, own.joined.Load(), int64(os.Getpid()), "the stand-in")
	record, err := w.store.LoadContainer("db")
	assert.NilError(t, err)
	assert.Equal(t, record.Cgroup.String(), "/no/such/cgroup/db")
	assert.NilError(t, w.pod.Start(t.Context(), "db"))
	oom("db")
	w.agent.exit("db", "", "", 137)
	client := <-c.client
	defer client.Close()
	_, err = client.Wait(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, own.told.Load(), int64(1))
	assert.Equal(t, w.cgroup.told.Load(), int64(0))
	assert.NilError(t, w.pod.Delete(t.Context(), "db", false, nil))
	assert.Assert(t, own.removed.Load())
	assert.Assert(t, !w.cgroup.removed.Load())

	// Who cannot have one is in the pod's, in which then nobody is told.
	w.cgroup.joined.Store(0)
	busy := &noCgroup{create: errors.New("it is not empty")}
	w.others <- busy
	_, err = w.create("log", 3)
	assert.NilError(t, err)
	assert.Equal(t, w.cgroup.joined.Load(), int64(os.Getpid()))
	assert.Assert(t, busy.removed.Load(), "what was made of it")
	oom("log")
	assert.Equal(t, w.cgroup.told.Load(), int64(0))
	assert.NilError(t, w.pod.Delete(t.Context(), "log", true, nil))

	// One that cannot be created leaves none.
	failed := &noCgroup{}
	w.others <- failed
	w.share.add = errors.New("boom")
	_, err = w.create("bad", 4)
	assert.ErrorContains(t, err, "boom")
	assert.Assert(t, failed.removed.Load())

	oom("web")
	w.agent.exit("web", "", "", 137)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if w.cgroup.told.Load() == 0 {
			return poll.Continue("the first container's are not told")
		}
		return poll.Success()
	}, poll.WithDelay(time.Millisecond))
	assert.Equal(t, own.told.Load(), int64(1))
	assert.Equal(t, busy.told.Load(), int64(0))
}

func TestCgroup(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.Equal(t, w.cgroup.joined.Load(), int64(os.Getpid()), "the stand-in")
	assert.Equal(t, w.cgroup.limited.Load(), int64(512<<20))
	record, err := w.store.LoadPod("p")
	assert.NilError(t, err)
	assert.Equal(t, record.Cgroup.String(), "/no/such/cgroup/web")
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	_, host, err := w.pod.Stats(t.Context(), "web")
	assert.NilError(t, err)
	assert.Equal(t, host.Guest, uint64(1<<20))

	w.cgroup.oom.Store("killed by the kernel")
	w.driver.VMs()[0].Crash("signal: killed")
	assert.Error(t, <-w.ran, "VM ended: killed by the kernel")
	w.ran <- nil
	record, err = w.store.LoadPod("p")
	assert.NilError(t, err)
	assert.Equal(t, record.Failure, "VM ended: killed by the kernel")
	assert.Assert(t, !w.cgroup.removed.Load(), "it is there until the container is deleted")
}

func TestNoCgroupNoVM(t *testing.T) {
	w := newWorld(t)
	w.cgroup.create = errors.New("linux.cgroupsPath: busy")
	_, err := w.create("web", 1)
	assert.Error(t, err, "create web: linux.cgroupsPath: busy")
	t.Log("run:", <-w.ran) // nil if the pod was stopped before it failed
	w.ran <- nil
	assert.Equal(t, len(w.driver.VMs()), 0)
	assert.Assert(t, w.cgroup.removed.Load(), "what was made of it")
}

// An update beyond the VM's size makes it grow; what cannot be had is told.
func TestUpdateGrowsTheVM(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	asked := make(chan *agentv1.OnlineRequest, 1)
	w.agent.online = func(r *agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
		asked <- r
		return &agentv1.OnlineResponse{Cpus: r.Cpus, PluggedBytes: r.PluggedBytes}, nil
	}
	recorded := func(vcpus int, memory int64) {
		t.Helper()
		record, err := w.store.LoadPod("p")
		assert.NilError(t, err)
		assert.Equal(t, record.VCPUs, vcpus)
		assert.Equal(t, record.MemoryBytes, memory)
	}
	update := func(resources string) pod.UpdateResult {
		t.Helper()
		res, err := w.pod.Update(t.Context(), "web", []byte(resources))
		assert.NilError(t, err)
		return res
	}
	res := update(`{"memory":{"limit":67108864},"cpu":{"quota":100000}}`)
	assert.Equal(t, res.MemoryBytes, int64(512<<20), "there is enough")
	res = update(`{"memory":{"limit":1073741824}}`)
	assert.Equal(t, res.MemoryBytes, int64(1024+1024/32+128)<<20)
	assert.Equal(t, res.VCPUs, 1)
	assert.Equal(t, len(res.Warnings), 0, "%q", res.Warnings)
	request := <-asked
	assert.Equal(t, request.PluggedBytes, uint64(672<<20))
	assert.Equal(t, request.Cpus, uint32(1))
	recorded(1, 1184<<20)

	// More CPUs than the host has the VM does not get. A refusal by the guest does not undo growth.
	most := runtime.NumCPU()
	w.agent.update = func(*agentv1.UpdateRequest) (*agentv1.UpdateResponse, error) {
		return nil, rpcerror.ToStatus(rpcerror.New(errdefs.ErrInvalidArgument, "cpu.quota: no"))
	}
	_, err = w.pod.Update(t.Context(), "web", []byte(`{"cpu":{"quota":1000000000}}`))
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	want := "cpu.quota: no"
	if most > 1 {
		want += fmt.Sprintf("; the limits are as they were, the VM has grown to %d vCPUs and 1184 MiB", most)
	}
	assert.Error(t, err, want)
	assert.Equal(t, w.cgroup.limited.Load(), int64(1184<<20))
	if most > 1 {
		<-asked
	}
	recorded(most, 1184<<20)
	w.agent.update = nil
	res = update(`{"cpu":{"quota":1000000000}}`)
	<-asked
	assert.Equal(t, res.VCPUs, most)
	assert.Equal(t, len(res.Warnings), 1)
	assert.Assert(t, cmp.Contains(res.Warnings[0], fmt.Sprintf("the VM has %d vCPUs and 1184 MiB, not the 10000 vCPUs and 1184 MiB", most)))
	assert.Equal(t, len(update(`{"cpu":{"quota":1000}}`).Warnings), 0)

	// What the guest does not take into use is told, in its words made safe.
	w.agent.online = func(r *agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
		return &agentv1.OnlineResponse{Cpus: r.Cpus, PluggedBytes: r.PluggedBytes - 128<<20, Problem: "no\x1b[2J"}, nil
	}
	res = update(`{"memory":{"limit":2147483648}}`)
	assert.Equal(t, len(res.Warnings), 1)
	assert.Assert(t, cmp.Contains(res.Warnings[0], "and lacks 128 MiB: no[2J"))
	w.agent.online = func(*agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
		return nil, rpcerror.ToStatus(rpcerror.New(errdefs.ErrInternal, "broken"))
	}
	res = update(`{"memory":{"limit":3221225472}}`)
	assert.Assert(t, cmp.Contains(res.Warnings[0], "may not use all of it: broken"))
}

// While threads of the guest wait for locks on the share, the pod asks the agent which of them have a signal, and lets the share end
// their waits.
func TestSignalsEndWaitsForLocks(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	for _, c := range []struct{ waiting, want []int }{{[]int{1, 2, 3, 4}, []int{2, 4}}, {[]int{5}, []int{}}, {[]int{6}, []int{6}}} {
		w.share.waits <- c.waiting
		assert.DeepEqual(t, <-w.share.interrupted, c.want)
	}
}
