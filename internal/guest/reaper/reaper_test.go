package reaper_test

import (
	"context"
	"log/slog"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"gotest.tools/v3/assert"

	"runv/internal/guest/reaper"
)

func TestMain(m *testing.M) {
	// The signal package keeps its goroutine once it was used.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/signal.signal_recv"), goleak.IgnoreTopFunction("os/signal.loop"))
}

func running(t *testing.T) *reaper.Reaper {
	t.Helper()
	r := reaper.New(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { r.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return r
}

func shell(script string) func() (int, error) {
	return func() (int, error) {
		return syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{})
	}
}

func TestStatus(t *testing.T) {
	r := running(t)
	for script, want := range map[string]uint32{
		"exit 0":        0,
		"exit 7":        7,
		"kill -KILL $$": 137,
		"kill -TERM $$": 143,
	} {
		t.Run(script, func(t *testing.T) {
			status := make(chan uint32, 1)
			pid, err := r.Start(shell(script), func(s uint32) { status <- s })
			assert.NilError(t, err)
			assert.Assert(t, pid > 0)
			assert.Equal(t, <-status, want)
		})
	}
}

// Children that end at once must not be taken for orphans.
func TestManyAtOnce(t *testing.T) {
	r := running(t)
	const n = 50
	status := make(chan uint32, n)
	for range n {
		_, err := r.Start(shell("exit 1"), func(s uint32) { status <- s })
		assert.NilError(t, err)
	}
	for range n {
		assert.Equal(t, <-status, uint32(1))
	}
}

func TestFailedStartIsForgotten(t *testing.T) {
	r := running(t)
	_, err := r.Start(func() (int, error) {
		return syscall.ForkExec("/nonexistent", nil, &syscall.ProcAttr{})
	}, func(uint32) { t.Error("called") })
	assert.ErrorIs(t, err, syscall.ENOENT)
}
