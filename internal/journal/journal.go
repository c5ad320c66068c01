// Package journal keeps a pod's events: numbered without gaps, in the order in which they
// happened, in a file that outlives the supervisor, and for subscribers that follow.
//
// The pod writes to it; the supervisor's API and the command line read. A slow
// subscriber is told how many events it missed and never blocks the writer.
package journal

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

const (
	keep      = 4096     // events in memory, for replay
	fileBytes = 16 << 20 // of one file; the one before it is kept as path.1
	lineBytes = 64 << 10 // longest line that Read accepts
)

// Event types.
const (
	Create      = "create"
	Start       = "start"
	ExecAdded   = "exec-added"
	ExecStarted = "exec-started"
	Exit        = "exit"
	OOM         = "oom"
	Paused      = "paused"
	Resumed     = "resumed"
	Delete      = "delete"
	Lost        = "lost" // to one subscriber only, not in the journal
)

// Event is one entry. Seq counts from 1.
type Event struct {
	Seq       uint64    `json:"seq"`
	Time      time.Time `json:"time"`
	Type      string    `json:"type"`
	Container string    `json:"container,omitempty"`
	Exec      string    `json:"exec,omitempty"`
	PID       int       `json:"pid,omitempty"`    // of the stand-in, on the host
	Status    uint32    `json:"status,omitempty"` // of exit
	Lost      uint64    `json:"lost,omitempty"`   // of lost: how many events
}

// Journal is the writer's and the followers' end. It is safe for concurrent use.
type Journal struct {
	path string

	mu      sync.Mutex
	file    *os.File
	size    int64
	events  []Event // the newest, at most keep
	next    uint64
	changed chan struct{} // closed and replaced at each event
	closed  bool
}

// Open makes the journal of a new pod with its file at path. The caller closes it.
func Open(path string) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	return &Journal{path: path, file: f, next: 1, changed: make(chan struct{})}, nil
}

// Append numbers ev, stamps it when it has no time, and records it. When the
// file cannot be written the event still reaches followers, and the error is told.
func (j *Journal) Append(ev Event) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return os.ErrClosed
	}
	ev.Seq = j.next
	j.next++
	if ev.Time.IsZero() {
		ev.Time = time.Now()
	}
	if len(j.events) == keep {
		j.events = append(j.events[:0], j.events[keep/2:]...)
	}
	j.events = append(j.events, ev)
	close(j.changed)
	j.changed = make(chan struct{})
	return j.write(ev)
}

func (j *Journal) write(ev Event) error {
	line, err := json.Marshal(ev)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	line = append(line, '\n')
	if j.size+int64(len(line)) > fileBytes {
		if err := j.rotate(); err != nil {
			return err
		}
	}
	n, err := j.file.Write(line)
	j.size += int64(n)
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}

func (j *Journal) rotate() error {
	if err := os.Rename(j.path, j.path+".1"); err != nil {
		return fmt.Errorf("rotate journal: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("rotate journal: %w", err)
	}
	_ = j.file.Close()
	j.file, j.size = f, 0
	return nil
}

// Follow calls fn with each event after number `after`, in order, until ctx ends,
// fn fails, or the journal is closed and all were told; with wait unset it ends
// after the newest event. Events that are no longer in memory are told as one
// Lost event. fn may block: nobody waits for it.
func (j *Journal) Follow(ctx context.Context, after uint64, wait bool, fn func(Event) error) error {
	for {
		j.mu.Lock()
		batch, lost := j.since(after)
		changed, closed := j.changed, j.closed
		j.mu.Unlock()
		if lost > 0 {
			if err := fn(Event{Type: Lost, Time: time.Now(), Lost: lost}); err != nil {
				return err
			}
			after += lost
		}
		for _, ev := range batch {
			if err := fn(ev); err != nil {
				return err
			}
			after = ev.Seq
		}
		if len(batch) > 0 {
			continue
		}
		if closed || !wait {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// since returns a copy of the events after a number and how many of them are gone.
func (j *Journal) since(after uint64) (batch []Event, lost uint64) {
	if len(j.events) == 0 || after+1 >= j.next {
		return nil, 0
	}
	first := j.events[0].Seq
	if after+1 < first {
		lost = first - 1 - after
		after = first - 1
	}
	return append(batch, j.events[after+1-first:]...), lost
}

// Close closes the file and lets followers end. Idempotent.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return nil
	}
	j.closed = true
	close(j.changed)
	j.changed = make(chan struct{})
	return j.file.Close()
}

// Read returns the events after a number from the file of a journal, whether or not
// it is still being written. A last line that is cut off is left out.
func Read(path string, after uint64) ([]Event, error) {
	var events []Event
	for _, p := range []string{path + ".1", path} {
		f, err := os.Open(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		events, err = decode(f, after, events)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("read journal %s: %w", p, err)
		}
	}
	return events, nil
}

func decode(r io.Reader, after uint64, events []Event) ([]Event, error) {
	scanner := bufio.NewScanner(io.LimitReader(r, 2*fileBytes))
	scanner.Buffer(nil, lineBytes)
	for n := 1; scanner.Scan(); n++ {
		var ev Event
		if err := json.Unmarshal(scanner.Bytes(), &ev); err != nil {
			if !scanner.Scan() {
				break // cut off
			}
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if ev.Seq > after {
			events = append(events, ev)
		}
	}
	return events, scanner.Err()
}
