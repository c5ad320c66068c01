package stdio_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/stdio"
)

// running is an Output whose Run has been called.
type running struct {
	*stdio.Output
	guest  net.Conn // writes the process's output; Close ends it
	cancel context.CancelFunc
	done   chan error
}

// runOutput runs an Output to f. It ends with the test.
func runOutput(t *testing.T, f *os.File, limit int) running {
	t.Helper()
	guest, host := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	r := running{stdio.NewOutput(newSink(t, f), limit), guest, cancel, make(chan error, 1)}
	var wg sync.WaitGroup
	wg.Go(func() { r.done <- r.Run(ctx, host) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		_ = guest.Close()
		_ = host.Close()
	})
	return r
}

func TestOutputDeliversAll(t *testing.T) {
	const chunks, size = 1000, 10_007
	p := pipeToWrite(t)
	o := runOutput(t, p.file, 0)
	sent := sha256.New()
	go func() {
		buf := make([]byte, size)
		for i := range chunks {
			for j := range buf {
				buf[j] = byte(i * j)
			}
			sent.Write(buf)
			_, _ = o.guest.Write(buf[:size/3])
			_, _ = o.guest.Write(buf[size/3:])
		}
		_ = o.guest.Close()
	}()
	assert.NilError(t, unix.Close(p.kept.fd)) // or else there is no end
	got := sha256.New()
	n, err := io.Copy(got, p.peer)
	assert.NilError(t, err)
	assert.Equal(t, n, int64(chunks*size))
	assert.NilError(t, <-o.done)
	assert.Equal(t, o.Received(), uint64(chunks*size))
	assert.Assert(t, bytes.Equal(sent.Sum(nil), got.Sum(nil)))
	assert.NilError(t, o.WaitReceived(t.Context(), chunks*size))
	assert.NilError(t, o.Flushed(t.Context()))
	assert.ErrorIs(t, o.WaitReceived(t.Context(), chunks*size+1), io.ErrUnexpectedEOF)
}

func TestOutputSlowReader(t *testing.T) {
	const limit = 64 << 10
	const held = 64 << 10 // the pipe
	p := pipeToWrite(t)
	o := runOutput(t, p.file, limit)
	data := bytes.Repeat([]byte("x"), 2<<20)
	go func() {
		_, _ = o.guest.Write(data)
		_ = o.guest.Close()
	}()
	// Nobody reads: what the queue and the pipe hold comes, and no more.
	p.kept.waitFull(t)
	assert.NilError(t, o.WaitReceived(t.Context(), limit))
	assert.Assert(t, o.Received() <= limit+held+64<<10, "received %d", o.Received())

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, o.Flushed(canceled), context.Canceled)
	assert.ErrorIs(t, o.WaitReceived(canceled, 2<<20), context.Canceled)

	o.Lift()
	assert.NilError(t, o.WaitReceived(t.Context(), limit+1<<20))

	got := make([]byte, len(data))
	_, err := io.ReadFull(p.peer, got)
	assert.NilError(t, err)
	assert.NilError(t, o.Flushed(t.Context()))
	assert.NilError(t, <-o.done)
}

func TestOutputReaderGone(t *testing.T) {
	p := pipeToWrite(t)
	o := runOutput(t, p.file, 4<<10)
	assert.NilError(t, p.peer.Close())
	// The process is not blocked, however much it writes.
	_, err := o.guest.Write(make([]byte, 1<<20))
	assert.NilError(t, err)
	<-o.Broken()
	assert.ErrorIs(t, o.Flushed(t.Context()), unix.EPIPE)
	assert.NilError(t, o.guest.Close())
	assert.ErrorIs(t, <-o.done, unix.EPIPE)
	assert.Equal(t, o.Received(), uint64(1<<20))
}

func TestOutputCancel(t *testing.T) {
	t.Run("while receiving", func(t *testing.T) {
		o := runOutput(t, pipeToWrite(t).file, 0)
		o.cancel()
		assert.ErrorIs(t, <-o.done, context.Canceled)
	})
	t.Run("while writing and full", func(t *testing.T) {
		p := pipeToWrite(t)
		o := runOutput(t, p.file, 4<<10)
		go func() { _, _ = o.guest.Write(make([]byte, 1<<20)) }()
		p.kept.waitFull(t)
		o.cancel()
		assert.ErrorIs(t, <-o.done, context.Canceled)
		assert.ErrorIs(t, o.Flushed(t.Context()), os.ErrClosed)
		select {
		case <-o.Broken():
			t.Error("a canceled output is not a broken one")
		default:
		}
	})
}

func TestOutputStreamError(t *testing.T) {
	want := errors.New("stream reset")
	p := pipeToWrite(t)
	o := stdio.NewOutput(newSink(t, p.file), 0)
	err := o.Run(t.Context(), io.MultiReader(bytes.NewReader([]byte("last words")), failing{want}))
	assert.ErrorIs(t, err, want)
	buf := make([]byte, 64)
	n, err := p.peer.Read(buf)
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:n]), "last words")
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func BenchmarkOutput(b *testing.B) {
	var fds [2]int
	assert.NilError(b, unix.Pipe2(fds[:], unix.O_CLOEXEC))
	out, err := stdio.NewSink(os.NewFile(uintptr(fds[1]), "out"))
	assert.NilError(b, err)
	end := os.NewFile(uintptr(fds[0]), "end")
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			if _, err := end.Read(buf); err != nil {
				return
			}
		}
	})
	b.SetBytes(64 << 10)
	b.ReportAllocs()
	src := &zeros{left: int64(b.N) * 64 << 10}
	assert.NilError(b, stdio.NewOutput(out, 0).Run(b.Context(), src))
	wg.Wait()
	assert.NilError(b, end.Close())
}

// zeros is that many zero bytes.
type zeros struct{ left int64 }

func (z *zeros) Read(p []byte) (int, error) {
	n := min(int64(len(p)), z.left)
	z.left -= n
	if n == 0 {
		return 0, io.EOF
	}
	return int(n), nil
}
