// Package eventlog keeps the newest events of the guest, numbered without gaps,
// for subscribers that come late or come back. internal/guest/container appends,
// internal/guest/server reads. Appending never blocks.
package eventlog

import (
	"context"
	"sync"
	"time"

	agentv1 "runv/api/agent/v1"
)

// Size is how many events are kept.
const Size = 4096

// Log is a ring of events. It is safe for concurrent use.
type Log struct {
	mu    sync.Mutex
	ring  [Size]*agentv1.Event // event with number n at n % Size
	last  uint64               // number of the newest event; 0: none
	fresh chan struct{}        // closed by the next Append
}

// New makes an empty log.
func New() *Log { return &Log{fresh: make(chan struct{})} }

// Append numbers and stamps ev and adds it. ev must not be changed afterwards.
func (l *Log) Append(ev *agentv1.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	ev.Seq = l.last
	ev.TimeUnixNano = time.Now().UnixNano()
	l.ring[l.last%Size] = ev
	close(l.fresh)
	l.fresh = make(chan struct{})
}

// After returns all kept events with a number above after, oldest first. It
// waits until there is one or ctx ends.
func (l *Log) After(ctx context.Context, after uint64) ([]*agentv1.Event, error) {
	for {
		events, fresh := l.since(after)
		if len(events) > 0 {
			return events, nil
		}
		select {
		case <-fresh:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (l *Log) since(after uint64) ([]*agentv1.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := after + 1
	if l.last >= Size {
		first = max(first, l.last-Size+1)
	}
	var events []*agentv1.Event
	for n := first; n > after && n <= l.last; n++ {
		events = append(events, l.ring[n%Size])
	}
	return events, l.fresh
}
