package stdio_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/stdio"
)

var readable = map[string]func(*testing.T) pair{
	"pipe": pipeToRead, "socket": sockets, "terminal": terminal, "terminal master": terminalMaster,
}

var writable = map[string]func(*testing.T) pair{
	"pipe": pipeToWrite, "socket": sockets, "terminal": terminal, "terminal master": terminalMaster,
}

func newSource(t *testing.T, f *os.File) *stdio.Source {
	t.Helper()
	src, err := stdio.NewSource(f)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = src.Close() })
	return src
}

func newSink(t *testing.T, f *os.File) *stdio.Sink {
	t.Helper()
	sink, err := stdio.NewSink(f)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = sink.Close() })
	return sink
}

func TestSourceReads(t *testing.T) {
	for name, open := range readable {
		t.Run(name, func(t *testing.T) {
			p := open(t)
			before := p.kept.flags(t)
			src := newSource(t, p.file)

			_, err := p.peer.WriteString("hello")
			assert.NilError(t, err)
			buf := make([]byte, 64)
			n, err := src.Read(buf)
			assert.NilError(t, err)
			assert.Equal(t, string(buf[:n]), "hello")
			assert.Equal(t, p.kept.flags(t), before)

			assert.NilError(t, p.peer.Close())
			_, err = src.Read(buf)
			assert.Equal(t, err, io.EOF)
		})
	}
}

func TestSourceCloseInterrupts(t *testing.T) {
	for name, open := range readable {
		t.Run(name, func(t *testing.T) {
			p := open(t)
			src := newSource(t, p.file)
			got := make(chan error)
			go func() {
				_, err := src.Read(make([]byte, 64))
				got <- err
			}()
			assert.NilError(t, src.Close())
			assert.Equal(t, <-got, os.ErrClosed)
			_, err := src.Read(make([]byte, 1))
			assert.Equal(t, err, os.ErrClosed)
			assert.NilError(t, src.Close())

			// What is typed next is for whoever has the file still.
			_, err = p.peer.WriteString("next")
			assert.NilError(t, err)
			buf := make([]byte, 64)
			n, err := unix.Read(p.kept.fd, buf)
			assert.NilError(t, err)
			assert.Equal(t, string(buf[:n]), "next")
		})
	}
}

func TestSinkWritesAllToSlowReader(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<14) // 256 KiB: more than any buffer in between
	for name, open := range writable {
		t.Run(name, func(t *testing.T) {
			p := open(t)
			before := p.kept.flags(t)
			sink := newSink(t, p.file)
			wrote := make(chan error, 1)
			go func() {
				n, err := sink.Write(data)
				if n != len(data) && err == nil {
					err = io.ErrShortWrite
				}
				wrote <- err
			}()
			got := make([]byte, len(data))
			_, err := io.ReadFull(p.peer, got)
			assert.NilError(t, err)
			assert.NilError(t, <-wrote)
			assert.Assert(t, bytes.Equal(got, data))
			assert.Equal(t, p.kept.flags(t), before)
		})
	}
}

func TestSinkCloseInterrupts(t *testing.T) {
	for name, open := range writable {
		t.Run(name, func(t *testing.T) {
			p := open(t)
			sink := newSink(t, p.file)
			wrote := make(chan error)
			go func() {
				for {
					if _, err := sink.Write(make([]byte, 32<<10)); err != nil {
						wrote <- err
						return
					}
				}
			}()
			if name == "pipe" || name == "socket" { // a full pty may still call itself writable
				p.kept.waitFull(t)
			}
			assert.NilError(t, sink.Close())
			assert.Equal(t, <-wrote, os.ErrClosed)
			assert.NilError(t, sink.Close())
		})
	}
}

func TestSinkWithoutReader(t *testing.T) {
	for name, when := range map[string]string{"before": "before", "after": "after"} {
		for kind, open := range map[string]func(*testing.T) pair{"pipe": pipeToWrite, "socket": sockets} {
			t.Run(kind+" "+name, func(t *testing.T) {
				p := open(t)
				if when == "before" {
					assert.NilError(t, p.peer.Close())
				}
				sink := newSink(t, p.file)
				if when == "after" {
					assert.NilError(t, p.peer.Close())
				}
				_, err := sink.Write([]byte("x"))
				assert.ErrorIs(t, err, unix.EPIPE)
			})
		}
	}
}

func TestRegularFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	assert.NilError(t, err)
	sink := newSink(t, f)
	for _, s := range []string{"one ", "two"} {
		_, err = sink.Write([]byte(s))
		assert.NilError(t, err)
	}
	assert.NilError(t, sink.Close())
	_, err = sink.Write([]byte("x"))
	assert.Equal(t, err, os.ErrClosed)

	f, err = os.Open(path)
	assert.NilError(t, err)
	got, err := io.ReadAll(newSource(t, f))
	assert.NilError(t, err)
	assert.Equal(t, string(got), "one two")
}

func TestDevNull(t *testing.T) {
	f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	assert.NilError(t, err)
	_, err = newSource(t, f).Read(make([]byte, 1))
	assert.Equal(t, err, io.EOF)

	f, err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
	assert.NilError(t, err)
	n, err := newSink(t, f).Write([]byte("gone"))
	assert.NilError(t, err)
	assert.Equal(t, n, 4)
}

func TestFaults(t *testing.T) {
	open := func(path string, flags int) *os.File {
		t.Helper()
		f, err := os.OpenFile(path, flags, 0)
		assert.NilError(t, err)
		return f
	}
	fd := func(fd int, err error) *os.File {
		t.Helper()
		assert.NilError(t, err)
		return os.NewFile(uintptr(fd), "fd")
	}
	deleted := filepath.Join(t.TempDir(), "file")
	assert.NilError(t, os.WriteFile(deleted, []byte("x"), 0o600))
	file := open(deleted, os.O_RDWR)
	assert.NilError(t, os.Remove(deleted))
	for name, test := range map[string]struct {
		file         *os.File
		source, sink error
	}{
		"reading end of a pipe":   {pipeToRead(t).file, nil, unix.EBADF},
		"writing end of a pipe":   {pipeToWrite(t).file, unix.EBADF, nil},
		"/dev/null to read":       {open(os.DevNull, os.O_RDONLY), nil, unix.EBADF},
		"/dev/null to write":      {open(os.DevNull, os.O_WRONLY), unix.EBADF, nil},
		"O_PATH":                  {open(os.DevNull, unix.O_PATH), unix.EBADF, unix.EBADF},
		"directory":               {open("/", os.O_RDONLY), unix.EISDIR, unix.EBADF},
		"deleted file":            {file, nil, nil},
		"epoll":                   {fd(unix.EpollCreate1(unix.EPOLL_CLOEXEC)), unix.EINVAL, unix.EINVAL},
		"eventfd":                 {fd(unix.Eventfd(0, unix.EFD_CLOEXEC)), nil, nil},
		"socket without a peer":   {fd(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)), unix.ENOTCONN, unix.ENOTCONN},
		"datagrams from anywhere": {fd(unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)), nil, unix.ENOTCONN},
	} {
		t.Run(name, func(t *testing.T) {
			again := fd(unix.FcntlInt(test.file.Fd(), unix.F_DUPFD_CLOEXEC, 0))
			src := newSource(t, test.file)
			assert.Equal(t, src.Fault(), test.source)
			if test.source != nil {
				_, err := src.Read(make([]byte, 1))
				assert.Equal(t, err, test.source)
			}
			sink := newSink(t, again)
			assert.Equal(t, sink.Fault(), test.sink)
			if test.sink != nil {
				_, err := sink.Write([]byte("x"))
				assert.Equal(t, err, test.sink)
			}
		})
	}
	f := pipeToRead(t).file
	assert.NilError(t, f.Close())
	_, err := stdio.NewSource(f)
	assert.Assert(t, errors.Is(err, os.ErrClosed), "%v", err)
}
