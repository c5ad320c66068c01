// Package server answers the host's requests: the services of api/agent/v1 over
// ttrpc on the control stream. internal/guest calls it for each conversation with a
// host. It decides nothing: containers are internal/guest/container's, the
// machine is the Machine's, networks internal/guest/network's, mirrors internal/guest/mirror's.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/container"
	"runv/internal/guest/eventlog"
	"runv/internal/guest/mirror"
	"runv/internal/guest/network"
)

// Machine is the guest as a whole.
type Machine interface {
	Info() (*agentv1.InfoResponse, error)
	Configure(context.Context, *agentv1.ConfigureRequest) error
	Online(context.Context, *agentv1.OnlineRequest) *agentv1.OnlineResponse
	// Signalled returns those of the threads that have a reason to stop waiting.
	Signalled(threads []int32) []int32
	// Shutdown ends all containers and leaves the file systems clean.
	Shutdown(context.Context) error
	// PowerOff ends the virtual machine. It does not return.
	PowerOff()
}

// Server answers requests. It is safe for concurrent use.
type Server struct {
	Containers *container.Set
	Networks   *network.Set
	Mirrors    *mirror.Set
	Events     *eventlog.Log
	Machine    Machine
	Log        *slog.Logger
}

// Serve answers the requests that come over conn until it ends. claim takes stdio
// streams by their numbers.
func (s *Server) Serve(ctx context.Context, conn net.Conn, claim func(context.Context, uint32) (net.Conn, error)) error {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(s.intercept))
	if err != nil {
		return fmt.Errorf("make server: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := &watchedConn{Conn: conn, closed: make(chan struct{}), written: make(chan struct{}, 1)}
	agentv1.RegisterGuestService(srv, &guest{Server: s, conn: watched})
	agentv1.RegisterContainersService(srv, &containers{Server: s, claim: claim})
	agentv1.RegisterProcessesService(srv, &processes{Server: s, claim: claim})
	agentv1.RegisterNetworksService(srv, &networks{Server: s, claim: claim})
	agentv1.RegisterMirrorsService(srv, &mirrors{Server: s})
	err = srv.Serve(ctx, &listener{conn: watched})
	if errors.Is(err, net.ErrClosed) || errors.Is(err, ttrpc.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, srv.Close())
}

// intercept gives errors their codes. A panic in a handler ends the machine as any other
// panic of the agent does, whatever the library would make of it.
func (s *Server) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	defer func() {
		if r := recover(); r != nil {
			s.Log.Error("panic", "method", info.FullMethod, "reason", r, "stack", string(debug.Stack()))
			s.Machine.PowerOff()
		}
	}()
	resp, err := method(ctx, unmarshal)
	if err != nil {
		s.Log.Debug("request failed", "method", info.FullMethod, "error", err)
		return nil, toStatus(err)
	}
	return resp, nil
}

// codeOf are the codes of the kinds of errors.
var codeOf = []struct {
	kind error
	code codes.Code
}{
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

func toStatus(err error) error {
	for _, c := range codeOf {
		if errors.Is(err, c.kind) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// listener accepts the one connection there is.
type listener struct {
	conn *watchedConn
	once sync.Once
}

// Accept returns the connection, and blocks until its end when called again.
func (l *listener) Accept() (net.Conn, error) {
	var conn net.Conn
	l.once.Do(func() { conn = l.conn })
	if conn != nil {
		return conn, nil
	}
	<-l.conn.closed
	return nil, net.ErrClosed
}

// Close closes the connection.
func (l *listener) Close() error { return l.conn.Close() }

// Addr is the connection's.
func (l *listener) Addr() net.Addr { return l.conn.LocalAddr() }

// watchedConn tells of its end and of what is written to it.
type watchedConn struct {
	net.Conn
	once    sync.Once
	closed  chan struct{}
	written chan struct{} // holds one value after a write
}

// Write writes and tells of it.
func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	select {
	case c.written <- struct{}{}:
	default:
	}
	return n, err
}

// Close closes the connection and tells of it.
func (c *watchedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
