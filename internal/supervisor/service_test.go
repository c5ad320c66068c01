package supervisor

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"gotest.tools/v3/assert"

	"runv/internal/pod"
	"runv/internal/rpcerror"
)

// Callers take Unavailable for a supervisor that has gone; a guest must not be able to say so.
func TestOnlyAnEndedPodIsUnavailable(t *testing.T) {
	lost := fmt.Errorf("start VM: %w", rpcerror.New(errdefs.ErrUnavailable, "agent: connection lost"))
	assert.Equal(t, status.Code(toStatus(lost)), codes.Internal)
	assert.ErrorContains(t, toStatus(lost), "start VM: agent: connection lost")
	assert.Equal(t, status.Code(toStatus(fmt.Errorf("start: %w", pod.ErrEnded))), codes.Unavailable)
	assert.Equal(t, status.Code(toStatus(rpcerror.New(errdefs.ErrNotFound, "x"))), codes.NotFound)
	assert.NilError(t, toStatus(nil))
}
