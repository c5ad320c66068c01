package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/rpcerror"
	"runv/internal/state"
	"runv/internal/unixsock"
)

// callTimeout bounds a call of the supervisor that needs no VM to boot and no
// user's program to end. The supervisor's own calls of the agent may take as long.
const callTimeout = 60 * time.Second

// connectTimeout is how long a supervisor that listens may take for its first word.
const connectTimeout = 10 * time.Second

// supervisor is a connection to the process that owns a pod. Errors of its
// calls are converted: they have the text and the kind that the supervisor gave.
type supervisor struct {
	conn       *grpc.ClientConn
	pod        supervisorv1.PodClient
	containers supervisorv1.ContainersClient
	processes  supervisorv1.ProcessesClient
}

// dial connects to the supervisor of the pod with this directory.
// errdefs.ErrUnavailable when nobody listens there. The caller closes it.
func dial(ctx context.Context, podDir string) (*supervisor, error) {
	first, err := unixsock.Dial(ctx, podDir, state.SupervisorSocket, "unix")
	if err != nil {
		return nil, rpcerror.New(errdefs.ErrUnavailable, fmt.Sprintf("supervisor does not answer: %v", err))
	}
	// gRPC connects lazily; the connection that has proved that somebody listens
	// is its first one.
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		if conn := first; conn != nil {
			first = nil
			return conn, nil
		}
		return unixsock.Dial(ctx, podDir, state.SupervisorSocket, "unix")
	}
	conn, err := grpc.NewClient("passthrough:///supervisor",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dialer),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: connectTimeout}),
		grpc.WithUnaryInterceptor(convertUnary(podDir)),
		grpc.WithStreamInterceptor(convertStream),
	)
	if err != nil {
		first.Close()
		return nil, fmt.Errorf("connect to supervisor: %w", err)
	}
	return &supervisor{
		conn:       conn,
		pod:        supervisorv1.NewPodClient(conn),
		containers: supervisorv1.NewContainersClient(conn),
		processes:  supervisorv1.NewProcessesClient(conn),
	}, nil
}

func (s *supervisor) close() { _ = s.conn.Close() }

// convertUnary gives the errors of the pod's supervisor their kinds, and those of the way
// to it a text that says which of the two is to blame.
func convertUnary(podDir string) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := rpcerror.FromStatus(invoke(ctx, method, req, reply, conn, opts...))
		switch {
		case err == nil:
			return nil
		case errdefs.IsUnavailable(err) && conn.GetState() != connectivity.Ready:
			// Not the supervisor's word but the end of the connection, or of the patience for its
			// beginning.
			if listens(ctx, podDir) {
				return rpcerror.New(errdefs.ErrUnavailable, "supervisor does not answer: it is stopped, or hangs")
			}
			return rpcerror.New(errdefs.ErrUnavailable, "supervisor has gone")
		case errors.Is(ctx.Err(), context.DeadlineExceeded),
			ctx.Err() == nil && errors.Is(err, context.Canceled): // the deadline has come to the supervisor first
			return rpcerror.New(context.DeadlineExceeded, "supervisor did not answer in time")
		}
		return err
	}
}

// listens tells whether a supervisor holds its socket, though it may not serve it.
func listens(ctx context.Context, podDir string) bool {
	conn, err := unixsock.Dial(ctx, podDir, state.SupervisorSocket, "unix")
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

func convertStream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, conn, method, opts...)
	return stream, rpcerror.FromStatus(err)
}
