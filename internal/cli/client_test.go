package cli

import (
	"context"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"gotest.tools/v3/assert"

	"runv/internal/state"
	"runv/internal/unixsock"
)

// TestCallFails has each way in which a call fails other than by the supervisor's word.
func TestCallFails(t *testing.T) {
	dir := t.TempDir()
	l, err := unixsock.Listen(dir, state.SupervisorSocket, "unix")
	assert.NilError(t, err)
	defer l.Close()
	conn, err := grpc.NewClient("passthrough:///nobody", grpc.WithTransportCredentials(insecure.NewCredentials()))
	assert.NilError(t, err)
	defer conn.Close()
	expired, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		dir  string
		err  error
		want string
		kind error
	}{
		{"well", t.Context(), dir, nil, "", nil},
		{"nobody listens", t.Context(), t.TempDir(), status.Error(codes.Unavailable, "EOF"), "supervisor has gone", errdefs.ErrUnavailable},
		{"stopped", t.Context(), dir, status.Error(codes.Unavailable, "preface"), "supervisor does not answer: it is stopped, or hangs", errdefs.ErrUnavailable},
		{"too slow", expired, dir, status.Error(codes.DeadlineExceeded, "dead"), "supervisor did not answer in time", context.DeadlineExceeded},
		{"too slow, its own clock", t.Context(), dir, status.Error(codes.Canceled, "RST_STREAM"), "supervisor did not answer in time", context.DeadlineExceeded},
		{"its word", t.Context(), dir, status.Error(codes.DeadlineExceeded, "agent: no answer"), "agent: no answer", context.DeadlineExceeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := convertUnary(tc.dir)(tc.ctx, "/m", nil, nil, conn,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return tc.err })
			if tc.err == nil {
				assert.NilError(t, err)
				return
			}
			assert.Error(t, err, tc.want)
			assert.ErrorIs(t, err, tc.kind)
		})
	}
}
