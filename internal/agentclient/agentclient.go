// Package agentclient is the host's end of the agent API: the conversation with
// runv-agent in the guest, over the agent channel that a hypervisor.VM gives.
//
// The factory makes clients, the pod uses them. The package translates nothing: its
// requests are those of api/agent/v1. What it adds is that every call has a deadline,
// that the guest's answers are bounded, and that errors have containerd errdefs kinds
// and a text fit for the user.
package agentclient

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	agentv1 "runv/api/agent/v1"
	"runv/internal/rpcerror"
	"runv/internal/transport"
)

// callTimeout bounds all calls. Calls wait for one fork and exec in the guest at
// most, slow as that may be under load. Users wait a little longer for the supervisor, so
// that they hear who it was that did not answer.
const callTimeout = 45 * time.Second

// Client talks to one agent. It is safe for concurrent use.
type Client struct {
	session *transport.Session
	rpc     *ttrpc.Client

	Guest      agentv1.GuestClient
	Containers agentv1.ContainersService
	Processes  agentv1.ProcessesService
	Networks   agentv1.NetworksService
	Mirrors    agentv1.MirrorsService
}

// Connect shakes hands with the agent at the other end of conn, which may have to
// boot first: ctx bounds the wait. The client owns conn from then on.
func Connect(ctx context.Context, conn net.Conn) (*Client, error) {
	s, err := transport.Host(ctx, conn)
	if err != nil {
		return nil, err
	}
	rpc := ttrpc.NewClient(s.Control(), ttrpc.WithUnaryClientInterceptor(boundCall))
	return &Client{
		session:    s,
		rpc:        rpc,
		Guest:      agentv1.NewGuestClient(rpc),
		Containers: agentv1.NewContainersClient(rpc),
		Processes:  agentv1.NewProcessesClient(rpc),
		Networks:   agentv1.NewNetworksClient(rpc),
		Mirrors:    agentv1.NewMirrorsClient(rpc),
	}, nil
}

// OpenStream opens a stdio stream; its StreamID goes into the request's Stdio.
// The caller closes it.
func (c *Client) OpenStream() (Stream, error) { return c.session.Open() }

// Stream is one stdio stream of a process. Close ends only the writing
// direction for the other side; a stream that the other side has closed reads EOF.
type Stream interface {
	net.Conn
	StreamID() uint32
}

// Done is closed when the conversation has ended.
func (c *Client) Done() <-chan struct{} { return c.session.Done() }

// Close ends the conversation and the channel under it. Calls in flight fail.
func (c *Client) Close() error {
	return errors.Join(c.rpc.Close(), c.session.Close())
}

// boundCall gives calls a deadline and their errors a kind and a bounded text. The
// guest's own errors are in the answer, where ttrpc would take them from only later.
func boundCall(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := invoke(ctx, req, resp)
	if err == nil && resp.Status != nil {
		err = status.ErrorProto(resp.Status) // nil for the code OK
	}
	return Error(err)
}

// Error turns an error of a call or a stream of answers into one with an errdefs
// kind and a bounded text. The errors of the services' unary calls are so already.
func Error(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return rpcerror.New(errdefs.ErrUnavailable, "agent: connection lost")
	}
	err = rpcerror.FromStatus(err)
	if errors.Is(err, context.DeadlineExceeded) {
		return rpcerror.New(context.DeadlineExceeded, "agent: no answer in time: the guest hangs, or is overloaded")
	}
	return err
}
