package stdio_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/stdio"
)

func TestInputCopiesUntilEnd(t *testing.T) {
	p := pipeToRead(t)
	host, guest := net.Pipe()
	done := make(chan error, 1)
	in := stdio.NewInput(newSource(t, p.file), host)
	go func() { done <- in.Run(t.Context()) }()
	data := bytes.Repeat([]byte("0123456789"), 50_000)
	go func() {
		_, _ = p.peer.Write(data)
		_ = p.peer.Close()
	}()
	got, err := io.ReadAll(guest)
	assert.NilError(t, err)
	assert.Assert(t, bytes.Equal(got, data))
	assert.NilError(t, <-done)
}

func TestInputCloseDeliversWhatWasRead(t *testing.T) {
	p := pipeToRead(t)
	host, guest := net.Pipe()
	done := make(chan error, 1)
	in := stdio.NewInput(newSource(t, p.file), host)
	go func() { done <- in.Run(t.Context()) }()
	_, err := p.peer.WriteString("ab")
	assert.NilError(t, err)
	one := make([]byte, 1)
	_, err = io.ReadFull(guest, one) // so both were read from the pipe
	assert.NilError(t, err)
	assert.NilError(t, in.Close())
	got, err := io.ReadAll(guest)
	assert.NilError(t, err)
	assert.Equal(t, string(got), "b")
	assert.NilError(t, <-done)
}

func TestInputCancel(t *testing.T) {
	for name, typed := range map[string]string{"while reading": "", "while sending": "input"} {
		t.Run(name, func(t *testing.T) {
			p := pipeToRead(t)
			host, guest := net.Pipe()
			defer guest.Close()
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			in := stdio.NewInput(newSource(t, p.file), host)
			go func() { done <- in.Run(ctx) }()
			if typed != "" {
				_, err := p.peer.WriteString(typed)
				assert.NilError(t, err)
				_, err = io.ReadFull(guest, make([]byte, 1)) // it is in Write now
				assert.NilError(t, err)
			}
			cancel()
			assert.ErrorIs(t, <-done, context.Canceled)
		})
	}
}

func TestInputProcessGone(t *testing.T) {
	p := pipeToRead(t)
	host, guest := net.Pipe()
	assert.NilError(t, guest.Close())
	done := make(chan error, 1)
	in := stdio.NewInput(newSource(t, p.file), host)
	go func() { done <- in.Run(t.Context()) }()
	_, err := p.peer.WriteString("x")
	assert.NilError(t, err)
	assert.ErrorIs(t, <-done, io.ErrClosedPipe)
}
