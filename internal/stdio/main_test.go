package stdio_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kept is a descriptor that shares its open file description with a file that was
// handed over, as a caller's own does.
type kept struct{ fd int }

// keep hands fd over as a file and keeps a duplicate of it until the test's end.
func keep(t *testing.T, fd int) (*os.File, kept) {
	t.Helper()
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = unix.Close(dup) })
	return os.NewFile(uintptr(fd), t.Name()), kept{dup}
}

// flags are the status flags of the open file description.
func (k kept) flags(t *testing.T) int {
	t.Helper()
	flags, err := unix.FcntlInt(uintptr(k.fd), unix.F_GETFL, 0)
	assert.NilError(t, err)
	return flags
}

// waitFull waits until a write would block.
func (k kept) waitFull(t *testing.T) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(k.fd), Events: unix.POLLOUT}}, 0)
		if err != nil && err != unix.EINTR {
			return poll.Error(err)
		}
		if n != 0 {
			return poll.Continue("still writable")
		}
		return poll.Success()
	}, poll.WithDelay(time.Millisecond))
}

// pair is the two ends of one kind of file: what is written to peer is read
// from file and the other way round, as far as the kind allows it.
type pair struct {
	file *os.File // to hand over
	kept kept     // duplicate of file
	peer *os.File // the other end, blocking; closed at the test's end
}

func peer(t *testing.T, fd int) *os.File {
	f := os.NewFile(uintptr(fd), "peer")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func pipeToRead(t *testing.T) pair {
	t.Helper()
	var p [2]int
	assert.NilError(t, unix.Pipe2(p[:], unix.O_CLOEXEC))
	f, k := keep(t, p[0])
	return pair{f, k, peer(t, p[1])}
}

func pipeToWrite(t *testing.T) pair {
	t.Helper()
	var p [2]int
	assert.NilError(t, unix.Pipe2(p[:], unix.O_CLOEXEC))
	f, k := keep(t, p[1])
	return pair{f, k, peer(t, p[0])}
}

func sockets(t *testing.T) pair {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	f, k := keep(t, p[0])
	return pair{f, k, peer(t, p[1])}
}

func terminal(t *testing.T) pair {
	t.Helper()
	master, slave := openPty(t)
	f, k := keep(t, slave)
	return pair{f, k, peer(t, master)}
}

func terminalMaster(t *testing.T) pair {
	t.Helper()
	master, slave := openPty(t)
	f, k := keep(t, master)
	return pair{f, k, peer(t, slave)}
}

// openPty returns a pty's two ends; the slave is in raw mode.
func openPty(t *testing.T) (master, slave int) {
	t.Helper()
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	assert.NilError(t, unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	assert.NilError(t, err)
	slave, err = unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	raw, err := unix.IoctlGetTermios(slave, unix.TCGETS)
	assert.NilError(t, err)
	raw.Lflag &^= unix.ICANON | unix.ECHO | unix.ISIG
	raw.Iflag, raw.Oflag = 0, 0
	assert.NilError(t, unix.IoctlSetTermios(slave, unix.TCSETS, raw))
	return master, slave
}
