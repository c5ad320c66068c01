package qemu

import (
	"math"
	"time"
)

const (
	tscInterval = time.Millisecond // between two looks, at least
	tscTries    = 8                // for a look that nothing interrupted
	tscError    = 0.002            // of the result, at most; Linux wants 0.01
)

// tscLook is one look at the clock and at the host's time stamp counter, which
// a TCG guest on the same architecture reads as its own.
type tscLook struct {
	at    time.Time
	ticks uint64
	width uint64 // in ticks: how far apart the two readings may be
}

// lookTSC keeps the look with the least between its two readings.
func lookTSC() tscLook {
	best := tscLook{width: math.MaxUint64}
	for range tscTries {
		before := readTSC()
		at := time.Now()
		width := readTSC() - before
		if width < best.width {
			best = tscLook{at, before + width/2, width}
		}
	}
	return best
}

// tscKHz tells how fast the counter has run since an earlier look, or 0 where that cannot
// be told. It waits until the looks are tscInterval apart.
func tscKHz(since tscLook) int {
	if since.ticks == 0 {
		return 0
	}
	if wait := tscInterval - time.Since(since.at); wait > 0 {
		<-time.After(wait)
	}
	now := lookTSC()
	ticks := float64(now.ticks - since.ticks)
	if float64(now.width+since.width) > tscError*ticks {
		return 0
	}
	return int(math.Round(ticks / now.at.Sub(since.at).Seconds() / 1000))
}
