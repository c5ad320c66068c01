package sharefs_test

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"
)

// A wait for a lock that another guest holds ends when the lock is released, or when the server is told that the waiting thread
// has a signal.
func TestLockWaits(t *testing.T) {
	host, guests := twoShares(t)
	_ = host
	first, err := os.OpenFile(filepath.Join(guests[0], "file"), os.O_RDWR|os.O_CREATE, 0o666)
	assert.NilError(t, err)
	defer first.Close()
	assert.NilError(t, unix.Flock(int(first.Fd()), unix.LOCK_EX))
	second, err := os.OpenFile(filepath.Join(guests[1], "file"), os.O_RDWR, 0)
	assert.NilError(t, err)
	defer second.Close()
	assert.ErrorIs(t, unix.Flock(int(second.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EAGAIN)
	got := make(chan error, 1)
	go func() { got <- unix.Flock(int(second.Fd()), unix.LOCK_EX) }()
	select {
	case err := <-got:
		t.Fatal("got the lock that is held: ", err)
	case <-time.After(50 * time.Millisecond):
	}
	assert.NilError(t, unix.Flock(int(first.Fd()), unix.LOCK_UN))
	assert.NilError(t, <-got)
}

func TestInterruptedWait(t *testing.T) {
	dir := t.TempDir()
	mounted, fs := share(t, dir, few())
	path := filepath.Join(mounted, "file")
	assert.NilError(t, os.WriteFile(path, nil, 0o666))
	held, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR, 0)
	assert.NilError(t, err)
	defer held.Close()
	assert.NilError(t, unix.Flock(int(held.Fd()), unix.LOCK_EX))

	f, err := os.OpenFile(path, os.O_RDWR, 0)
	assert.NilError(t, err)
	defer f.Close()
	type result struct{ err error }
	got := make(chan result, 1)
	thread := make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		_, _, errno := unix.Syscall(unix.SYS_FLOCK, f.Fd(), unix.LOCK_EX, 0)
		got <- result{errno}
	}()
	waiting := <-thread
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if threads := fs.Waiting(0); len(threads) == 1 && threads[0] == waiting {
			return poll.Success()
		}
		return poll.Continue("%v wait", fs.Waiting(0))
	}, poll.WithDelay(time.Millisecond))
	assert.Equal(t, len(fs.Waiting(time.Hour)), 0)
	fs.Interrupt([]int{waiting + 100000})
	assert.Equal(t, fs.Usage().Waits, 1)
	fs.Interrupt([]int{waiting})
	// Without a signal the kernel hands on its own word for "call again", which no program sees when there is one.
	r := <-got
	assert.Equal(t, r.err, unix.Errno(512)) // ERESTARTSYS
	assert.Equal(t, fs.Usage().Waits, 0)
}

// Record locks are the process's, and go when it closes any descriptor of the file.
func TestRecordLocks(t *testing.T) {
	host, guests := twoShares(t)
	path := filepath.Join(guests[0], "file")
	assert.NilError(t, os.WriteFile(path, make([]byte, 100), 0o666))
	mine, err := os.OpenFile(path, os.O_RDWR, 0)
	assert.NilError(t, err)
	defer mine.Close()
	set := func(f *os.File, kind int16, start, length int64) error {
		return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: kind, Start: start, Len: length})
	}
	ofd := func(f *os.File, cmd int, lk *unix.Flock_t) error { return unix.FcntlFlock(f.Fd(), cmd, lk) }
	assert.NilError(t, set(mine, unix.F_WRLCK, 10, 10))
	for _, place := range []string{host, guests[1]} {
		other, err := os.OpenFile(filepath.Join(place, "file"), os.O_RDWR, 0)
		assert.NilError(t, err)
		defer other.Close()
		assert.ErrorIs(t, ofd(other, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 15, Len: 1}), unix.EAGAIN)
		assert.NilError(t, ofd(other, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 20, Len: 1}))
		question := unix.Flock_t{Type: unix.F_RDLCK}
		assert.NilError(t, ofd(other, unix.F_OFD_GETLK, &question))
		assert.Equal(t, question.Type, int16(unix.F_WRLCK))
		assert.Equal(t, [2]int64{question.Start, question.Len}, [2]int64{10, 10})
		assert.NilError(t, ofd(other, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK}))
	}
	// Part of the lock is given up.
	assert.NilError(t, set(mine, unix.F_UNLCK, 15, 5))
	other, err := os.OpenFile(filepath.Join(host, "file"), os.O_RDWR, 0)
	assert.NilError(t, err)
	defer other.Close()
	assert.NilError(t, ofd(other, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 15}))
	assert.ErrorIs(t, ofd(other, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: 10, Len: 1}), unix.EAGAIN)
	// POSIX: closing another descriptor of the file releases all.
	again, err := os.Open(path)
	assert.NilError(t, err)
	assert.NilError(t, again.Close())
	assert.NilError(t, ofd(other, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: 10, Len: 1}))
}
