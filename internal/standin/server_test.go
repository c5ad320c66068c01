package standin_test

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"runv/internal/standin"
	"runv/internal/unixsock"
)

func listen(t *testing.T) (*standin.Listener, string) {
	t.Helper()
	dir := t.TempDir()
	l, err := standin.Listen(dir)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, l.Close()) })
	return l, dir
}

// connect connects a client in this process.
func connect(t *testing.T, dir string, token standin.Token, stdio standin.Stdio) *standin.Client {
	t.Helper()
	c, err := standin.Connect(t.Context(), dir, token, stdio)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func await(t *testing.T, l *standin.Listener, token standin.Token) *standin.Peer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	p, err := l.Await(ctx, token)
	assert.NilError(t, err)
	t.Cleanup(func() {
		p.CloseStdio()
		_ = p.Close()
	})
	return p
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	assert.NilError(t, err)
	t.Cleanup(func() {
		_ = r.Close()
		_ = w.Close()
	})
	return r, w
}

func TestPeer(t *testing.T) {
	l, dir := listen(t)
	info, err := os.Stat(filepath.Join(dir, standin.SocketName))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o600))

	r, w := pipe(t)
	token := newToken()
	c := connect(t, dir, token, standin.Stdio{Stdout: w})
	p := await(t, l, token)
	assert.Equal(t, p.PID, os.Getpid())
	assert.Assert(t, p.Stdin == nil && p.Stderr == nil && !p.Terminal)

	// The file that came is the one that was sent.
	_, err = p.Stdout.WriteString("hello")
	assert.NilError(t, err)
	p.CloseStdio()
	assert.NilError(t, w.Close())
	got, err := io.ReadAll(r)
	assert.NilError(t, err)
	assert.Equal(t, string(got), "hello")

	var wg sync.WaitGroup
	defer wg.Wait()
	heard := make(chan int)
	wg.Go(func() {
		err := p.Serve(t.Context(), func(n int) { heard <- n }, nil)
		if err != nil {
			t.Error(err)
		}
	})
	for _, n := range []int{1, 15, 64} {
		assert.NilError(t, c.Signal(n))
		assert.Equal(t, <-heard, n)
	}
	assert.Assert(t, errdefs.IsInvalidArgument(c.Signal(0)))
	assert.Assert(t, errdefs.IsInvalidArgument(c.Signal(65)))

	assert.Assert(t, errdefs.IsInvalidArgument(p.Exit(256)))
	assert.NilError(t, p.Exit(7))
	status, err := c.Wait(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(7))
	assert.NilError(t, c.Close())
}

func TestTerminalPeer(t *testing.T) {
	l, dir := listen(t)
	master, slave := openPty(t)
	assert.NilError(t, unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: 100, Row: 30}))
	token := newToken()
	c := connect(t, dir, token, standin.Stdio{Stdin: slave, Terminal: true})
	p := await(t, l, token)
	assert.Assert(t, p.Terminal && p.Stdin != nil && p.Stdout != nil && p.Stderr == nil)
	assert.Equal(t, p.Width, uint32(100))
	assert.Equal(t, p.Height, uint32(30))

	assert.NilError(t, c.Resize(81, 26))
	assert.Assert(t, errdefs.IsInvalidArgument(c.Resize(1<<16, 1)))
	assert.NilError(t, c.Close())
	var sizes []uint32
	assert.NilError(t, p.Serve(t.Context(), nil, func(w, h uint32) { sizes = append(sizes, w, h) }))
	assert.DeepEqual(t, sizes, []uint32{81, 26})
}

func TestAwaitBeforeConnect(t *testing.T) {
	l, dir := listen(t)
	token := newToken()
	var wg sync.WaitGroup
	defer wg.Wait()
	come := make(chan *standin.Peer, 1)
	wg.Go(func() {
		p, err := l.Await(t.Context(), token)
		if err != nil {
			t.Error(err)
		}
		come <- p
	})
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if l.Awaiting() == 0 {
			return poll.Continue("not awaited yet")
		}
		return poll.Success()
	}, poll.WithDelay(time.Millisecond))
	_, err := l.Await(t.Context(), token)
	assert.Assert(t, errdefs.IsAlreadyExists(err), "%v", err)
	connect(t, dir, newToken(), standin.Stdio{}) // somebody else
	connect(t, dir, token, standin.Stdio{})
	p := <-come
	assert.Equal(t, p.PID, os.Getpid())
	assert.NilError(t, p.Close())
}

func TestAwaitEnds(t *testing.T) {
	dir := t.TempDir()
	l, err := standin.Listen(dir)
	assert.NilError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = l.Await(ctx, newToken())
	assert.ErrorIs(t, err, context.Canceled)

	unclaimed := connect(t, dir, newToken(), standin.Stdio{})
	ended := make(chan error)
	go func() {
		_, err := l.Await(t.Context(), newToken())
		ended <- err
	}()
	assert.NilError(t, l.Close())
	assert.ErrorIs(t, <-ended, net.ErrClosed)
	_, err = unclaimed.Wait(t.Context())
	assert.Assert(t, err != nil)
	_, err = l.Await(t.Context(), newToken())
	assert.ErrorIs(t, err, net.ErrClosed)
	assert.NilError(t, l.Close())
}

func TestSameTokenTwice(t *testing.T) {
	l, dir := listen(t)
	token := newToken()
	first := connect(t, dir, token, standin.Stdio{})
	second := connect(t, dir, token, standin.Stdio{})
	// One of them is refused; which is a matter of scheduling.
	refused := make(chan error, 2)
	for _, c := range []*standin.Client{first, second} {
		go func() {
			_, err := c.Wait(t.Context())
			refused <- err
		}()
	}
	assert.Error(t, <-refused, "stand-in refused: token in use")
	p := await(t, l, token)
	assert.NilError(t, p.Exit(0))
	assert.NilError(t, <-refused)
}

func TestServerGone(t *testing.T) {
	l, dir := listen(t)
	token := newToken()
	c := connect(t, dir, token, standin.Stdio{})
	p := await(t, l, token)
	assert.NilError(t, p.Close())
	assert.NilError(t, p.Close())
	_, err := c.Wait(t.Context())
	assert.ErrorIs(t, err, standin.ErrGone)

	_, err = standin.Connect(t.Context(), t.TempDir(), token, standin.Stdio{})
	assert.ErrorIs(t, err, unix.ENOENT)
}

// TestExitWithSignalUnread: the server may close without having read everything.
func TestExitWithSignalUnread(t *testing.T) {
	l, dir := listen(t)
	token := newToken()
	c := connect(t, dir, token, standin.Stdio{})
	p := await(t, l, token)
	assert.NilError(t, c.Signal(15))
	assert.NilError(t, p.Exit(143))
	assert.NilError(t, p.Close())
	status, err := c.Wait(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(143))
}

func TestWaitAndServeEndWithContext(t *testing.T) {
	l, dir := listen(t)
	token := newToken()
	c := connect(t, dir, token, standin.Stdio{})
	p := await(t, l, token)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- p.Serve(ctx, nil, nil) }()
	go func() {
		_, err := c.Wait(ctx)
		ended <- err
	}()
	cancel()
	assert.ErrorIs(t, <-ended, context.Canceled)
	assert.ErrorIs(t, <-ended, context.Canceled)
}

func TestBadClients(t *testing.T) {
	l, dir := listen(t)
	r, _ := pipe(t)
	good := append(append([]byte{'H', 1}, make([]byte, 16)...), 0, 0, 0, 0, 0, 0)
	withFile := append([]byte(nil), good...)
	withFile[19] = 1
	for name, test := range map[string]struct {
		message []byte
		files   []int
		want    string
	}{
		"garbage":        {[]byte("hello there"), nil, "not a hello"},
		"too long":       {make([]byte, 1000), nil, "too long"},
		"missing file":   {withFile, nil, "a file is missing"},
		"one file more":  {good, []int{int(r.Fd())}, "too many files"},
		"too many files": {withFile, []int{0, 0, 0, 0, 0, 0, 0, 0}, "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			before := openFiles(t)
			conn, err := unixsock.Dial(t.Context(), dir, standin.SocketName, "unixpacket")
			assert.NilError(t, err)
			defer conn.Close()
			_, _, err = conn.WriteMsgUnix(test.message, unix.UnixRights(test.files...), nil)
			assert.NilError(t, err)
			buf := make([]byte, 1024)
			n, err := conn.Read(buf)
			assert.NilError(t, err)
			assert.Equal(t, buf[0], byte('E'))
			assert.Assert(t, strings.Contains(string(buf[:n]), test.want), "%q", buf[:n])
			_, err = conn.Read(buf)
			assert.Equal(t, err, io.EOF)
			assert.NilError(t, conn.Close())
			poll.WaitOn(t, func(poll.LogT) poll.Result {
				if now := openFiles(t); now > before {
					return poll.Continue("%d files open, %d before", now, before)
				}
				return poll.Success()
			}, poll.WithDelay(time.Millisecond))
		})
	}

	// A client that goes bad later is an error of Serve.
	token := newToken()
	c := connect(t, dir, token, standin.Stdio{})
	p := await(t, l, token)
	assert.NilError(t, c.Resize(1, 1))
	assert.ErrorContains(t, p.Serve(t.Context(), nil, nil), "resize without a terminal")
}

func TestTooManyClients(t *testing.T) {
	_, dir := listen(t)
	for range 64 {
		connect(t, dir, newToken(), standin.Stdio{})
	}
	last := connect(t, dir, newToken(), standin.Stdio{})
	_, err := last.Wait(t.Context())
	assert.Error(t, err, "stand-in refused: too many stand-ins wait")
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	return len(entries)
}
