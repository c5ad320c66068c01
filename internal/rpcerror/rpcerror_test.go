package rpcerror_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/internal/rpcerror"
)

func TestKindAndTextCrossTheWire(t *testing.T) {
	for _, kind := range []error{
		errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrPermissionDenied,
		errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrAborted, errdefs.ErrNotImplemented,
		errdefs.ErrUnavailable, errdefs.ErrInternal, context.DeadlineExceeded, context.Canceled,
	} {
		err := fmt.Errorf("create web: %w", rpcerror.New(kind, "process.args: must not be empty"))
		got := rpcerror.FromStatus(rpcerror.ToStatus(err))
		assert.ErrorIs(t, got, kind)
		assert.Equal(t, got.Error(), "create web: process.args: must not be empty")
	}
	got := rpcerror.FromStatus(rpcerror.ToStatus(errors.New("odd")))
	assert.ErrorIs(t, got, errdefs.ErrUnknown)
	assert.Equal(t, got.Error(), "odd")
	assert.NilError(t, rpcerror.FromStatus(rpcerror.ToStatus(nil)))
}

func TestPeerTextIsBounded(t *testing.T) {
	got := rpcerror.FromStatus(rpcerror.ToStatus(errors.New(strings.Repeat("é", 1<<20))))
	assert.Assert(t, len(got.Error()) < 17<<10)
}

func TestPeerTextDrivesNoTerminal(t *testing.T) {
	got := rpcerror.FromStatus(rpcerror.ToStatus(errors.New("exec: \"é\":\tno\n\x1b[2J\u009b1m\u202egnp.exe\x7f")))
	assert.Equal(t, got.Error(), "exec: \"é\":\tno\n?[2J?1m?gnp.exe?")
}
