package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

const (
	// DefaultLimit is how many bytes an Output holds for a slow reader.
	DefaultLimit = 512 << 10
	// liftedExtra is added to the limit by Lift: what can be on its way from a guest
	// that plays by the rules (the stream's window, the process's pipe) is less.
	liftedExtra = 1 << 20

	smallChunk = 4 << 10
	largeChunk = 64 << 10
)

// Output brings what a process writes from its stream to a caller's file.
// Between the two is a bounded queue, so a slow reader of the file blocks this one
// stream once the queue is full, and nothing else ever.
type Output struct {
	dst    io.WriteCloser
	broken chan struct{} // closed when dst cannot be written to

	mu       sync.Mutex
	changed  sync.Cond // of everything below
	limit    int
	chunks   []*chunk  // queue, oldest first; the reader may be filling the last
	spare    sync.Pool // of *chunk with largeChunk bytes
	received uint64
	queued   int   // received and not yet written nor discarded
	ended    bool  // nothing more will be received
	dstErr   error // why dst is broken
	stopped  bool  // ctx of Run has ended
}

// chunk holds queued bytes: data[r:w]. The reader alone touches data[w:].
type chunk struct {
	data []byte
	r, w int
}

// NewOutput makes an Output that Run drives. limit is in bytes; 0 means
// DefaultLimit. The Output owns dst and closes it at the end of Run.
func NewOutput(dst io.WriteCloser, limit int) *Output {
	if limit <= 0 {
		limit = DefaultLimit
	}
	o := &Output{dst: dst, limit: limit, broken: make(chan struct{})}
	o.changed.L = &o.mu
	return o
}

// Run copies from src until src ends and all was written, then closes
// dst. When dst breaks it goes on reading and throws away, so that the sender
// is not blocked for ever; see Broken. When ctx ends, Run interrupts src (which must have
// SetReadDeadline or Close) and dst, and what is queued is lost.
// The error is ctx's, or that of dst, or that of src, nil after io.EOF. Call it once.
func (o *Output) Run(ctx context.Context, src io.Reader) error {
	stop := context.AfterFunc(ctx, func() {
		o.mu.Lock()
		o.stopped = true
		o.changed.Broadcast()
		o.mu.Unlock()
		_ = o.dst.Close()
		interrupt(src)
	})
	defer stop()

	written := make(chan struct{})
	go func() {
		defer close(written)
		o.write()
	}()
	srcErr := o.read(src)
	o.mu.Lock()
	o.ended = true
	o.changed.Broadcast()
	o.mu.Unlock()
	<-written
	closeErr := o.dst.Close()

	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.stopped:
		return context.Cause(ctx)
	case o.dstErr != nil:
		return fmt.Errorf("write output: %w", o.dstErr)
	case srcErr != nil:
		return fmt.Errorf("receive output: %w", srcErr)
	case closeErr != nil:
		return fmt.Errorf("close output: %w", closeErr)
	}
	return nil
}

// read fills the queue until src ends, or Run is stopped.
func (o *Output) read(src io.Reader) error {
	size := smallChunk
	for {
		c, ok := o.space(size)
		if !ok {
			return nil
		}
		free := c.data[c.w:]
		n, err := src.Read(free)
		// A reader that filled its chunk has more to come.
		if n == len(free) {
			size = largeChunk
		} else if n < smallChunk {
			size = smallChunk
		}
		o.mu.Lock()
		o.received += uint64(n)
		if o.dstErr == nil {
			c.w += n
			o.queued += n
		}
		o.changed.Broadcast()
		o.mu.Unlock()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// space waits until the queue is below its limit and returns a chunk with room,
// a new one of the given size if there is none. False when Run is stopped.
func (o *Output) space(size int) (*chunk, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.queued >= o.limit && !o.stopped && o.dstErr == nil {
		o.changed.Wait()
	}
	if o.stopped {
		return nil, false
	}
	if n := len(o.chunks); n > 0 {
		last := o.chunks[n-1]
		if last.r == last.w && o.dstErr == nil { // all written: from the start again
			last.r, last.w = 0, 0
			if len(last.data) < size {
				last.data = make([]byte, size)
			}
		}
		if len(last.data)-last.w >= smallChunk/4 {
			return last, true
		}
	}
	var c *chunk
	if size == largeChunk {
		c, _ = o.spare.Get().(*chunk)
	}
	if c == nil {
		c = &chunk{data: make([]byte, size)}
	}
	o.chunks = append(o.chunks, c)
	return c, true
}

// write empties the queue into dst until all is written, dst breaks or Run is stopped.
func (o *Output) write() {
	for {
		data := o.next()
		if data == nil {
			return
		}
		n, err := o.dst.Write(data)
		if err == nil && n < len(data) {
			err = io.ErrShortWrite
		}
		o.mu.Lock()
		switch {
		case err == nil:
			o.taken(n)
		case !o.stopped:
			o.dstErr = err
			o.chunks, o.queued = nil, 0
			close(o.broken)
		}
		o.changed.Broadcast()
		o.mu.Unlock()
	}
}

// next waits for queued bytes and returns the oldest that lie together; nil when
// there will be none.
func (o *Output) next() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.queued == 0 && !o.ended && !o.stopped && o.dstErr == nil {
		o.changed.Wait()
	}
	if o.queued == 0 || o.stopped {
		return nil
	}
	// Only the last chunk is ever left empty in the queue, for the reader may be
	// filling it: free the empty ones before it here.
	for c := o.chunks[0]; c.r == c.w; c = o.chunks[0] {
		o.chunks[0] = nil
		o.chunks = o.chunks[1:]
		if len(c.data) == largeChunk {
			c.r, c.w = 0, 0
			o.spare.Put(c)
		}
	}
	c := o.chunks[0]
	return c.data[c.r:c.w]
}

// taken counts n bytes of the oldest chunk as written. mu is held.
func (o *Output) taken(n int) {
	o.chunks[0].r += n
	o.queued -= n
}

// Lift tells that the process has exited: what is still on its way is let in
// even if the reader of the file is slow, up to another MiB. Call it once.
func (o *Output) Lift() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.limit += liftedExtra
	o.changed.Broadcast()
}

// Received is the number of bytes that came from the stream so far.
func (o *Output) Received() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.received
}

// WaitReceived blocks until n bytes have come from the stream. It returns
// io.ErrUnexpectedEOF when the stream ended before that.
func (o *Output) WaitReceived(ctx context.Context, n uint64) error {
	return o.await(ctx, func() (bool, error) {
		switch {
		case o.received >= n:
			return true, nil
		case o.ended:
			return true, fmt.Errorf("output ended after %d of %d bytes: %w", o.received, n, io.ErrUnexpectedEOF)
		}
		return false, nil
	})
}

// Flushed blocks until everything received so far is written to the file. It
// returns the error that broke the file, if it is broken: then there is nothing to
// wait for any more.
func (o *Output) Flushed(ctx context.Context) error {
	return o.await(ctx, func() (bool, error) {
		switch {
		case o.dstErr != nil:
			return true, fmt.Errorf("write output: %w", o.dstErr)
		case o.stopped && o.queued > 0:
			return true, fmt.Errorf("write output: stopped with %d bytes left: %w", o.queued, os.ErrClosed)
		}
		return o.queued == 0, nil
	})
}

// Broken is closed when the file cannot be written to any more (unix.EPIPE: its reader has gone).
// A process on the host would get SIGPIPE now: whoever runs the Output should
// break the stream, so that the guest's process meets a broken pipe, too.
func (o *Output) Broken() <-chan struct{} { return o.broken }

// await blocks until done, which is called with mu held, says so or ctx ends.
func (o *Output) await(ctx context.Context, done func() (bool, error)) error {
	stop := context.AfterFunc(ctx, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.changed.Broadcast()
	})
	defer stop()
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		o.changed.Wait()
	}
}

// interrupt ends a Read or Write of stream that waits.
func interrupt(stream any) {
	past := time.Unix(1, 0)
	switch s := stream.(type) {
	case interface{ SetDeadline(time.Time) error }:
		if s.SetDeadline(past) == nil {
			return
		}
	case interface{ SetReadDeadline(time.Time) error }:
		if s.SetReadDeadline(past) == nil {
			return
		}
	}
	if c, ok := stream.(io.Closer); ok {
		_ = c.Close()
	}
}
