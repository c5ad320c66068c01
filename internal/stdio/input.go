package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// Input brings what a caller writes into its file to a process's stream.
type Input struct {
	src io.ReadCloser
	dst io.WriteCloser
}

// NewInput makes an Input that Run drives. It owns both ends: src, usually a
// Source, and dst, the stream, whose Close tells the process the end of its input.
func NewInput(src io.ReadCloser, dst io.WriteCloser) *Input {
	return &Input{src: src, dst: dst}
}

// Run copies until src ends or Close is called, then closes the stream after what was
// read. It also returns when the stream breaks, and when ctx ends; then it interrupts both ends
// (dst must have SetDeadline or a Close that interrupts). At the end both are closed.
// The error is ctx's, or that of dst, or that of src, nil after io.EOF and Close. Call it once.
func (i *Input) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		_ = i.src.Close()
		interrupt(i.dst)
	})
	defer stop()
	srcErr, dstErr := i.copy()
	_ = i.src.Close() // a caller who goes on writing learns that nobody reads
	closeErr := i.dst.Close()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case dstErr != nil:
		return fmt.Errorf("send input: %w", dstErr)
	case srcErr != nil && !errors.Is(srcErr, os.ErrClosed):
		return fmt.Errorf("read input: %w", srcErr)
	case closeErr != nil:
		return fmt.Errorf("close input: %w", closeErr)
	}
	return nil
}

// Close ends the input: what was read from the caller is still delivered, then the
// stream is closed. It does not wait for that; Run returning tells.
func (i *Input) Close() error { return i.src.Close() }

func (i *Input) copy() (srcErr, dstErr error) {
	// Most processes never read a byte: start small, grow with the need.
	buf := make([]byte, smallChunk)
	for {
		n, err := i.src.Read(buf)
		if n > 0 {
			if _, dstErr := i.dst.Write(buf[:n]); dstErr != nil {
				return nil, dstErr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
		if n == len(buf) && n < largeChunk {
			buf = make([]byte, largeChunk)
		}
	}
}
