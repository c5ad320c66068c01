package eventlog_test

import (
	"context"
	"testing"

	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/eventlog"
)

func fill(l *eventlog.Log, n int) {
	for range n {
		l.Append(&agentv1.Event{})
	}
}

func TestAfter(t *testing.T) {
	for _, tc := range []struct {
		name        string
		appended    int
		after       uint64
		first, last uint64
	}{
		{"all", 3, 0, 1, 3},
		{"some", 3, 1, 2, 3},
		{"full", eventlog.Size, 0, 1, eventlog.Size},
		{"overwritten", eventlog.Size + 10, 0, 11, eventlog.Size + 10},
		{"overwritten, some", eventlog.Size + 10, 20, 21, eventlog.Size + 10},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := eventlog.New()
			fill(l, tc.appended)
			events, err := l.After(t.Context(), tc.after)
			assert.NilError(t, err)
			for i, ev := range events {
				assert.Equal(t, ev.Seq, tc.first+uint64(i))
				assert.Assert(t, ev.TimeUnixNano > 0)
			}
			assert.Equal(t, events[len(events)-1].Seq, tc.last)
		})
	}
}

func TestAfterWaits(t *testing.T) {
	l := eventlog.New()
	fill(l, 1)
	got := make(chan uint64)
	go func() {
		events, err := l.After(context.Background(), 1)
		if assert.Check(t, err) {
			got <- events[0].Seq
		}
	}()
	fill(l, 1)
	assert.Equal(t, <-got, uint64(2))
}

func TestAfterEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, after := range []uint64{0, 5, ^uint64(0)} {
		_, err := eventlog.New().After(ctx, after)
		assert.ErrorIs(t, err, context.Canceled)
	}
}
