package stdio_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/stdio"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is an IO with the host's ends of its streams.
type fixture struct {
	io      *stdio.IO
	host    [3]net.Conn
	out     [3]bytes.Buffer
	copying sync.WaitGroup
}

func newFixture(t *testing.T, terminal bool) *fixture {
	t.Helper()
	f := &fixture{}
	var guest stdio.Streams
	for fd := range 3 {
		if terminal && fd == 2 {
			continue
		}
		f.host[fd], guest[fd] = net.Pipe()
	}
	var err error
	f.io, err = stdio.New(guest, stdio.Options{Terminal: terminal})
	assert.NilError(t, err)
	for fd := 1; fd <= 2; fd++ {
		if f.host[fd] != nil {
			f.copying.Go(func() { _, _ = io.Copy(&f.out[fd], f.host[fd]) })
		}
	}
	t.Cleanup(func() {
		f.io.CloseChild()
		f.io.Close()
		f.copying.Wait()
	})
	return f
}

func write(t *testing.T, f *os.File, p []byte) {
	t.Helper()
	_, err := f.Write(p)
	assert.NilError(t, err)
}

func TestDrainedCountsWhatWasWritten(t *testing.T) {
	f := newFixture(t, false)
	child := f.io.Child()
	f.io.Start()
	write(t, child[1], bytes.Repeat([]byte("x"), 1<<20))
	write(t, child[2], []byte("error"))
	f.io.Exited() // while the pipes are open, as if other processes had them
	stdout, stderr := f.io.Drained()
	assert.Equal(t, stdout, uint64(1<<20))
	assert.Equal(t, stderr, uint64(5))
	write(t, child[1], []byte("later"))
	f.io.CloseChild()
	f.copying.Wait()
	assert.Equal(t, f.out[1].Len(), 1<<20+5)
	assert.Equal(t, f.out[2].String(), "error")
}

func TestExitBeforeStart(t *testing.T) {
	f := newFixture(t, false)
	write(t, f.io.Child()[1], []byte("out"))
	f.io.CloseChild()
	f.io.Exited()
	f.io.Start()
	stdout, _ := f.io.Drained()
	assert.Equal(t, stdout, uint64(3))
	f.copying.Wait()
	assert.Equal(t, f.out[1].String(), "out")
}

func TestInputEnds(t *testing.T) {
	f := newFixture(t, false)
	f.io.Start()
	go func() {
		_, _ = f.host[0].Write([]byte("in"))
		_ = f.host[0].Close()
	}()
	got, err := io.ReadAll(f.io.Child()[0])
	assert.NilError(t, err)
	assert.Equal(t, string(got), "in")
}

// The host must not wait for a process that reads no more.
func TestUnreadInputIsRefused(t *testing.T) {
	f := newFixture(t, false)
	f.io.Start()
	assert.NilError(t, f.io.Child()[0].Close())
	_, err := io.Copy(f.host[0], zeros{})
	assert.ErrorIs(t, err, io.ErrClosedPipe)
}

// A process whose reader is gone must notice, as with a pipe.
func TestClosedOutputBreaksThePipe(t *testing.T) {
	f := newFixture(t, false)
	child := f.io.Child()
	assert.NilError(t, f.host[1].Close())
	f.io.Start()
	_, err := io.Copy(child[1], zeros{})
	assert.ErrorIs(t, err, unix.EPIPE)
	f.io.Exited()
	stdout, _ := f.io.Drained()
	assert.Equal(t, stdout, uint64(0))
}

// The host tells that it wants no more output by closing its end of the stream.
func TestRefusedOutputBreaksThePipe(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		conn, err := net.FileConn(f)
		assert.NilError(t, err)
		assert.NilError(t, f.Close())
		ends[i] = conn.(*net.UnixConn)
		defer conn.Close()
	}
	s, err := stdio.New(stdio.Streams{1: ends[1]}, stdio.Options{})
	assert.NilError(t, err)
	defer s.Close()
	child := s.Child()[1]
	s.Start()
	assert.NilError(t, ends[0].CloseWrite())
	go func() { _, _ = io.Copy(io.Discard, ends[0]) }()
	_, err = io.Copy(child, zeros{})
	assert.ErrorIs(t, err, unix.EPIPE)
	s.CloseChild()
}

func TestCloseEndsAll(t *testing.T) {
	f := newFixture(t, false)
	f.io.Start()
	f.io.Close() // nothing was written, read or closed; goleak does the rest
	f.io.Close()
}

func TestTerminal(t *testing.T) {
	f := newFixture(t, true)
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	assert.NilError(t, unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0))
	slave, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
	assert.Equal(t, int(errno), 0)
	tty := os.NewFile(slave, "tty")
	assert.NilError(t, f.io.SetTerminal(master))
	f.io.Start()

	write(t, tty, []byte("before\n"))
	assert.NilError(t, tty.Close()) // as a program may that opens /dev/tty later
	assert.NilError(t, f.io.Resize(120, 40))
	_, err = f.host[0].Write([]byte("in\n"))
	assert.NilError(t, err)
	f.io.Exited()
	stdout, _ := f.io.Drained()
	f.copying.Wait()
	assert.Equal(t, f.out[1].String()[:8], "before\r\n")
	assert.Equal(t, int(stdout), f.out[1].Len())
}

func TestFaultyDescriptors(t *testing.T) {
	s, err := stdio.New(stdio.Streams{}, stdio.Options{Faulty: 1<<0 | 1<<2})
	assert.NilError(t, err)
	defer s.Close()
	defer s.CloseChild()
	_, err = s.Child()[0].Read(make([]byte, 1))
	assert.ErrorIs(t, err, unix.EBADF)
	write(t, s.Child()[1], []byte("lost"))
	_, err = s.Child()[2].Write([]byte("x"))
	assert.ErrorIs(t, err, unix.EBADF)
}

func TestClaim(t *testing.T) {
	host, guest := net.Pipe()
	claim := func(_ context.Context, id uint32) (net.Conn, error) {
		if id == 1 {
			return guest, nil
		}
		return nil, errors.New("no such stream")
	}
	streams, err := stdio.Claim(t.Context(), claim, stdio.Numbers{1: 1})
	assert.NilError(t, err)
	assert.Equal(t, streams, stdio.Streams{1: guest})
	_, err = stdio.New(stdio.Streams{2: guest}, stdio.Options{Terminal: true})
	assert.ErrorContains(t, err, "stderr")
	_, err = stdio.Claim(t.Context(), claim, stdio.Numbers{1, 2})
	assert.Error(t, err, "no such stream")
	_, err = host.Read(make([]byte, 1)) // what was claimed is closed
	assert.ErrorIs(t, err, io.EOF)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
