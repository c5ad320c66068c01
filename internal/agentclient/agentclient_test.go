package agentclient_test

import (
	"context"
	"net"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/agentclient"
	"runv/internal/transport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agent is a guest whose answers are as it likes.
type agent struct {
	agentv1.GuestService
	configure error
	events    error
	called    chan struct{} // by Info, which does not answer
}

func (a *agent) Signalled(context.Context, *agentv1.SignalledRequest) (*agentv1.SignalledResponse, error) {
	return &agentv1.SignalledResponse{}, nil
}

func (a *agent) Online(context.Context, *agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
	return &agentv1.OnlineResponse{}, nil
}

func (a *agent) Configure(context.Context, *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	return &agentv1.ConfigureResponse{}, a.configure
}

func (a *agent) Info(ctx context.Context, _ *agentv1.InfoRequest) (*agentv1.InfoResponse, error) {
	close(a.called)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (a *agent) Events(context.Context, *agentv1.EventsRequest, agentv1.Guest_EventsServer) error {
	return a.events
}

// connect makes a client that talks to a.
func connect(t *testing.T, a *agent) *agentclient.Client {
	t.Helper()
	host, guest := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		session, err := transport.Guest(guest)
		if !assert.Check(t, err) {
			return
		}
		server, err := ttrpc.NewServer()
		if !assert.Check(t, err) {
			return
		}
		agentv1.RegisterGuestService(server, a)
		l := &oneConn{conn: session.Control(), done: session.Done()}
		_ = server.Serve(context.Background(), l)
		_ = server.Close()
		_ = session.Close()
	}()
	client, err := agentclient.Connect(t.Context(), host)
	assert.NilError(t, err)
	t.Cleanup(func() {
		_ = client.Close()
		<-served
	})
	return client
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn net.Conn
	done <-chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if conn := l.conn; conn != nil {
		l.conn = nil
		return conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// The guest's errors have a kind, and a text that is bounded and harmless.
func TestGuestsErrors(t *testing.T) {
	hostile := status.Error(codes.NotFound, "no \x1b[2Jsuch "+strings.Repeat("x", 1<<20))
	client := connect(t, &agent{configure: hostile, events: hostile})
	_, unary := client.Guest.Configure(t.Context(), &agentv1.ConfigureRequest{})
	stream, err := client.Guest.Events(t.Context(), &agentv1.EventsRequest{})
	assert.NilError(t, err)
	_, streamed := stream.Recv()
	for _, err := range []error{unary, agentclient.Error(streamed)} {
		assert.Assert(t, errdefs.IsNotFound(err), "%.100v", err)
		assert.Assert(t, strings.HasPrefix(err.Error(), "no ?[2Jsuch xxx"), "%.100q", err)
		assert.Assert(t, len(err.Error()) < 32<<10)
	}
}

func TestSuccessIsNoError(t *testing.T) {
	client := connect(t, &agent{})
	_, err := client.Guest.Configure(t.Context(), &agentv1.ConfigureRequest{})
	assert.NilError(t, err)
	assert.NilError(t, agentclient.Error(nil))
}

func TestCallInFlightLearnsOfTheEnd(t *testing.T) {
	a := &agent{called: make(chan struct{})}
	client := connect(t, a)
	failed := make(chan error, 1)
	go func() {
		_, err := client.Guest.Info(t.Context(), &agentv1.InfoRequest{})
		failed <- err
	}()
	<-a.called
	assert.NilError(t, client.Close())
	err := <-failed
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	<-client.Done()
}
