package pod_test

import (
	"io"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// The process meets the end of its input, though its caller keeps the file open.
func TestCloseStdinEndsTheInput(t *testing.T) {
	w := newWorld(t)
	c, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	_, err = io.WriteString(c.stdin, "typed")
	assert.NilError(t, err)
	input := w.agent.stdin["web/"]
	_, err = io.ReadFull(input, make([]byte, 5))
	assert.NilError(t, err)

	assert.NilError(t, w.pod.CloseStdin(t.Context(), "web", ""))
	rest, err := io.ReadAll(input)
	assert.NilError(t, err)
	assert.Equal(t, string(rest), "")
	assert.NilError(t, w.pod.CloseStdin(t.Context(), "web", ""), "idempotent")
	assert.ErrorIs(t, w.pod.CloseStdin(t.Context(), "web", "none"), errdefs.ErrNotFound)

	w.agent.exit("web", "", "", 0)
	assert.NilError(t, <-w.ran)
	w.ran <- nil
}
