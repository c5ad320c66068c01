package journal_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"runv/internal/journal"
)

func open(t *testing.T) (*journal.Journal, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "events.log")
	j, err := journal.Open(path)
	assert.NilError(t, err)
	t.Cleanup(func() { j.Close() })
	return j, path
}

func TestFollowTellsOldAndNewUntilClosed(t *testing.T) {
	j, _ := open(t)
	assert.NilError(t, j.Append(journal.Event{Type: journal.Create, Container: "a"}))
	assert.NilError(t, j.Append(journal.Event{Type: journal.Start, Container: "a"}))
	got := make(chan journal.Event, 10)
	ended := make(chan error)
	go func() {
		ended <- j.Follow(t.Context(), 1, true, func(ev journal.Event) error { got <- ev; return nil })
	}()
	assert.Equal(t, (<-got).Type, journal.Start)
	assert.NilError(t, j.Append(journal.Event{Type: journal.Exit, Container: "a", Status: 137}))
	ev := <-got
	assert.Equal(t, ev.Seq, uint64(3))
	assert.Equal(t, ev.Status, uint32(137))
	assert.NilError(t, j.Close())
	assert.NilError(t, <-ended)
	assert.ErrorIs(t, j.Append(journal.Event{}), os.ErrClosed)
}

func TestFollowEndsWithContextAndWithReader(t *testing.T) {
	j, _ := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	err := j.Follow(ctx, 0, true, func(journal.Event) error { return nil })
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.NilError(t, j.Append(journal.Event{Type: journal.Create}))
	gone := errors.New("reader gone")
	assert.ErrorIs(t, j.Follow(t.Context(), 0, true, func(journal.Event) error { return gone }), gone)
	assert.NilError(t, j.Follow(t.Context(), 0, false, func(journal.Event) error { return nil }))
	assert.NilError(t, j.Follow(t.Context(), 99, false, func(journal.Event) error { return gone }))
}

func TestSlowSubscriberIsToldWhatItLost(t *testing.T) {
	j, path := open(t)
	const n = 10000
	for range n {
		assert.NilError(t, j.Append(journal.Event{Type: journal.OOM}))
	}
	var lost, told, last uint64
	err := j.Follow(t.Context(), 10, false, func(ev journal.Event) error {
		if ev.Type == journal.Lost {
			lost += ev.Lost
			return nil
		}
		if told > 0 {
			assert.Equal(t, ev.Seq, last+1)
		}
		told++
		last = ev.Seq
		return nil
	})
	assert.NilError(t, err)
	assert.Assert(t, lost > 0)
	assert.Equal(t, lost+told, uint64(n-10))
	assert.Equal(t, last, uint64(n))
	events, err := journal.Read(path, 10)
	assert.NilError(t, err)
	assert.Equal(t, len(events), n-10, "the file has them all")
}

func TestReadLeavesOutACutOffLine(t *testing.T) {
	j, path := open(t)
	assert.NilError(t, j.Append(journal.Event{Type: journal.Create, Container: "a"}))
	assert.NilError(t, j.Close())
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	assert.NilError(t, err)
	_, err = f.WriteString(`{"seq":2,"ty`)
	assert.NilError(t, err)
	events, err := journal.Read(path, 0)
	assert.NilError(t, err)
	assert.Equal(t, len(events), 1)
	_, err = f.WriteString("pe\x00\n{}\n")
	assert.NilError(t, err)
	_, err = journal.Read(path, 0)
	assert.ErrorContains(t, err, "line 2")
	assert.NilError(t, f.Close())
	events, err = journal.Read(filepath.Join(t.TempDir(), "none"), 0)
	assert.NilError(t, err)
	assert.Equal(t, len(events), 0)
}
