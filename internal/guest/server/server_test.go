package server_test

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/container"
	"runv/internal/guest/eventlog"
	"runv/internal/guest/fault"
	"runv/internal/guest/reaper"
	"runv/internal/guest/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// machine is one that does nothing but power off.
type machine struct {
	configureErr error
	off          chan struct{}
	once         sync.Once
}

func (m *machine) Info() (*agentv1.InfoResponse, error) {
	return &agentv1.InfoResponse{AgentVersion: "test"}, nil
}

func (m *machine) Signalled(threads []int32) []int32 { return threads }

func (m *machine) Online(_ context.Context, r *agentv1.OnlineRequest) *agentv1.OnlineResponse {
	return &agentv1.OnlineResponse{Cpus: r.Cpus, PluggedBytes: r.PluggedBytes}
}

func (m *machine) Configure(_ context.Context, r *agentv1.ConfigureRequest) error {
	if r.Hostname == "panic" {
		panic(r.Hostname)
	}
	return m.configureErr
}

func (m *machine) Shutdown(context.Context) error { return nil }
func (m *machine) PowerOff()                      { m.once.Do(func() { close(m.off) }) }

// serve serves m, and returns a client and the log that the server reads from.
func serve(t *testing.T, m *machine) (*ttrpc.Client, *eventlog.Log) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	events := eventlog.New()
	set, err := container.NewSet(container.Config{Reaper: reaper.New(log), Events: events, Log: log})
	assert.NilError(t, err)
	m.off = make(chan struct{})
	srv := &server.Server{Containers: set, Events: events, Machine: m, Log: log}
	host, guest := net.Pipe()
	claim := func(context.Context, uint32) (net.Conn, error) {
		return nil, fault.New(errdefs.ErrNotFound, "no such stream")
	}
	var wg sync.WaitGroup
	wg.Go(func() { assert.Check(t, srv.Serve(context.Background(), guest, claim)) })
	client := ttrpc.NewClient(host)
	t.Cleanup(func() {
		assert.Check(t, client.Close())
		wg.Wait()
	})
	return client, events
}

func TestErrorsHaveCodes(t *testing.T) {
	m := &machine{configureErr: fault.New(errdefs.ErrFailedPrecondition, "mount share: is mounted")}
	client, _ := serve(t, m)
	guest, containers := agentv1.NewGuestClient(client), agentv1.NewContainersClient(client)

	info, err := guest.Info(t.Context(), &agentv1.InfoRequest{})
	assert.NilError(t, err)
	assert.Equal(t, info.AgentVersion, "test")
	_, err = guest.Configure(t.Context(), &agentv1.ConfigureRequest{})
	assert.Equal(t, status.Code(err), codes.FailedPrecondition)
	assert.Equal(t, status.Convert(err).Message(), "mount share: is mounted")
	_, err = containers.Start(t.Context(), &agentv1.StartRequest{Id: "none"})
	assert.Equal(t, status.Code(err), codes.NotFound)
	_, err = containers.Create(t.Context(), &agentv1.CreateRequest{Id: "a"})
	assert.Equal(t, status.Code(err), codes.InvalidArgument)
	_, err = containers.Create(t.Context(), &agentv1.CreateRequest{Id: "a", Stdio: &agentv1.Stdio{Stdin: 9}})
	assert.Equal(t, status.Convert(err).Message(), "no such stream")
	_, err = containers.Delete(t.Context(), &agentv1.DeleteRequest{Id: "none"})
	assert.NilError(t, err)
}

func TestEvents(t *testing.T) {
	client, events := serve(t, &machine{})
	events.Append(&agentv1.Event{ContainerId: "a"})
	events.Append(&agentv1.Event{ContainerId: "b"})
	stream, err := agentv1.NewGuestClient(client).Events(t.Context(), &agentv1.EventsRequest{After: 1})
	assert.NilError(t, err)
	ev, err := stream.Recv()
	assert.NilError(t, err)
	assert.Equal(t, ev.ContainerId, "b")
	events.Append(&agentv1.Event{ContainerId: "c"})
	ev, err = stream.Recv()
	assert.NilError(t, err)
	assert.Equal(t, ev.Seq, uint64(3))
}

func TestShutdownAnswersFirst(t *testing.T) {
	m := &machine{}
	client, _ := serve(t, m)
	_, err := agentv1.NewGuestClient(client).Shutdown(t.Context(), &agentv1.ShutdownRequest{})
	assert.NilError(t, err)
	<-m.off
}

func TestPanicPowersOff(t *testing.T) {
	m := &machine{}
	client, _ := serve(t, m)
	_, _ = agentv1.NewGuestClient(client).Configure(t.Context(), &agentv1.ConfigureRequest{Hostname: "panic"})
	<-m.off
}
