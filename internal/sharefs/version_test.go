package sharefs

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// What the guest's kernel is told before a read differs from all that it was told before, as long as a change could hide behind
// equal times; newer kernels give each change a time of its own, so only made-up times show this on every machine.
func TestVersionChangesWhileAChangeCanHide(t *testing.T) {
	fs := &FS{}
	n := &node{kind: unix.S_IFREG, volume: newVolume("v" + CoherentSuffix)}
	stamp := func(at time.Time) unix.StatxTimestamp {
		return unix.StatxTimestamp{Sec: at.Unix(), Nsec: uint32(at.Nanosecond())}
	}
	file := func(modified, changed time.Time) *unix.Statx_t {
		return &unix.Statx_t{Mtime: stamp(modified), Ctime: stamp(changed)}
	}
	old := time.Now().Add(-time.Hour)

	// At rest the guest is told the true time, again and again.
	for range 3 {
		assert.Equal(t, fs.cacheVersion(n, file(old, old)), stamp(old).Nsec)
	}
	// Just changed: each answer is another, and none is the true one.
	now := time.Now()
	seen := map[uint32]bool{stamp(now).Nsec: true}
	for range 100 {
		told := fs.cacheVersion(n, file(now, now))
		assert.Assert(t, !seen[told])
		seen[told] = true
	}
	// At rest again, with the same times: one more made-up time, for what was read meanwhile, and then the true one.
	quiet := file(now.Add(-time.Hour), now.Add(-time.Hour))
	n.version.changed, n.version.told = quiet.Ctime, quiet.Mtime
	assert.Assert(t, fs.cacheVersion(n, quiet) != quiet.Mtime.Nsec)
	assert.Equal(t, fs.cacheVersion(n, quiet), quiet.Mtime.Nsec)
	// A stat(2) in an unsettled moment told the true time: a read later must not believe that nothing has changed since.
	fs.reported(n, file(now, now))
	n.version.changed, n.version.told = quiet.Ctime, quiet.Mtime
	assert.Assert(t, fs.cacheVersion(n, quiet) != quiet.Mtime.Nsec)
	assert.Equal(t, fs.cacheVersion(n, quiet), quiet.Mtime.Nsec)
	// The modification time was set back after a change.
	assert.Assert(t, fs.cacheVersion(n, file(now.Add(-time.Hour), old)) != quiet.Mtime.Nsec)
	// Other volumes are told nothing but the truth.
	plain := &node{kind: unix.S_IFREG, volume: newVolume("v")}
	assert.Equal(t, fs.cacheVersion(plain, file(now, now)), stamp(now).Nsec)
}
