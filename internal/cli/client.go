package cli

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
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
		grpc.WithUnaryInterceptor(convertUnary),
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

func convertUnary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := rpcerror.FromStatus(invoke(ctx, method, req, reply, conn, opts...))
	if errdefs.IsUnavailable(err) && conn.GetState() != connectivity.Ready {
		// Not the supervisor's word but the end of the connection.
		return rpcerror.New(errdefs.ErrUnavailable, "supervisor has gone")
	}
	return err
}

func convertStream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, conn, method, opts...)
	return stream, rpcerror.FromStatus(err)
}
