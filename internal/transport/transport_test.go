package transport

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a unix socket pair, as the host and QEMU use it.
func pair(t *testing.T) (host, guest net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "channel")
		ends[i], err = net.FileConn(f)
		assert.NilError(t, err)
		assert.NilError(t, f.Close())
	}
	t.Cleanup(func() { ends[0].Close(); ends[1].Close() })
	return ends[0], ends[1]
}

func sessions(t *testing.T) (host, guest *Session) {
	t.Helper()
	h, g := pair(t)
	type result struct {
		s   *Session
		err error
	}
	ch := make(chan result)
	go func() {
		s, err := Guest(g)
		ch <- result{s, err}
	}()
	host, err := Host(t.Context(), h)
	assert.NilError(t, err)
	r := <-ch
	assert.NilError(t, r.err)
	t.Cleanup(func() { host.Close(); r.s.Close(); <-r.s.done })
	return host, r.s
}

func TestStreamsReachTheirClaim(t *testing.T) {
	host, guest := sessions(t)
	early, err := host.Open()
	assert.NilError(t, err)
	late := make(chan net.Conn, 1)
	go func() {
		c, err := guest.Claim(t.Context(), early.StreamID()+2)
		assert.Check(t, err)
		late <- c
	}()
	c, err := guest.Claim(t.Context(), early.StreamID())
	assert.NilError(t, err)
	second, err := host.Open()
	assert.NilError(t, err)
	assert.Equal(t, second.StreamID(), early.StreamID()+2)
	<-late
	_, err = early.Write([]byte("hello"))
	assert.NilError(t, err)
	assert.NilError(t, early.Close())
	got, err := io.ReadAll(c)
	assert.NilError(t, err)
	assert.Equal(t, string(got), "hello")
}

func TestStalledStreamStallsNoOther(t *testing.T) {
	host, guest := sessions(t)
	stalled, err := host.Open()
	assert.NilError(t, err)
	toStalled, err := guest.Claim(t.Context(), stalled.StreamID())
	assert.NilError(t, err)
	writing := make(chan error, 1)
	go func() {
		_, err := toStalled.Write(make([]byte, 4<<20)) // nobody reads it
		writing <- err
	}()
	data := make([]byte, 8<<20)
	rand.Read(data)
	st, err := host.Open()
	assert.NilError(t, err)
	go func() {
		c, err := guest.Claim(t.Context(), st.StreamID())
		assert.Check(t, err)
		_, err = c.Write(data)
		assert.Check(t, err)
		assert.Check(t, c.Close())
	}()
	sum := sha256.New()
	_, err = io.Copy(sum, st)
	assert.NilError(t, err)
	assert.Equal(t, [32]byte(sum.Sum(nil)), sha256.Sum256(data))
	host.Close()
	assert.Assert(t, <-writing != nil)
}

func TestClaimEnds(t *testing.T) {
	host, guest := sessions(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := guest.Claim(ctx, 99)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	errs := make(chan error)
	go func() {
		_, err := guest.Claim(t.Context(), 99)
		errs <- err
	}()
	host.Close()
	assert.Assert(t, <-errs != nil)
	<-guest.Done()
}

func TestHostSkipsStaleBytes(t *testing.T) {
	nonce := [nonceSize]byte{42}
	stale := appendHello([]byte("login: \x00run\x00runv\x01\xff"), Version, [nonceSize]byte{1})
	stale = append(stale, magic[:3]...)
	stale = append(stale, magic[:5]...)
	r := bytes.NewReader(append(appendHello(stale, Version, nonce), "rest"...))
	v, got, err := readHello(r, &nonce)
	assert.NilError(t, err)
	assert.Equal(t, v, uint16(Version))
	assert.Equal(t, got, nonce)
	rest, _ := io.ReadAll(r)
	assert.Equal(t, string(rest), "rest", "reads no byte beyond the hello")
}

func TestGarbageIsNoHello(t *testing.T) {
	nonce := [nonceSize]byte{42}
	_, _, err := readHello(io.LimitReader(zeros{}, 8<<20), &nonce)
	assert.ErrorIs(t, err, ErrNoHello)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestVersionMismatchIsTold(t *testing.T) {
	h, g := pair(t)
	go func() {
		_, nonce, err := readHello(g, nil)
		assert.Check(t, err)
		_, err = g.Write(appendHello(nil, Version+1, nonce))
		assert.Check(t, err)
	}()
	_, err := Host(t.Context(), h)
	var ve *VersionError
	assert.Assert(t, errors.As(err, &ve), "%v", err)
	assert.Equal(t, ve.Theirs, uint16(Version+1))
}

func TestHostGivesUpAtDeadline(t *testing.T) {
	h, _ := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := Host(ctx, h)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestGarbageAfterHandshakeEndsSession(t *testing.T) {
	h, g := pair(t)
	go func() {
		assert.Check(t, guestHandshake(g))
		_, _ = g.Write(bytes.Repeat([]byte{0xff}, 1<<16)) // the host may hang up meanwhile
	}()
	s, err := Host(t.Context(), h)
	if err != nil {
		return // the garbage came before the control stream was open
	}
	<-s.Done()
	_, err = s.Open()
	assert.Assert(t, err != nil)
}

func TestStreamOfTheGuestEndsSession(t *testing.T) {
	host, guest := sessions(t)
	_, _ = guest.mux.Open() // the host may end the session before this returns
	<-host.Done()
	<-guest.Done()
}

func FuzzReadHello(f *testing.F) {
	f.Add(appendHello(nil, Version, [nonceSize]byte{42}))
	f.Add(appendHello([]byte(magic[:7]), Version, [nonceSize]byte{42}))
	f.Add([]byte(magic + magic))
	nonce := [nonceSize]byte{42}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		_, got, err := readHello(r, &nonce)
		at := bytes.Index(data, append([]byte(magic), 0, 0)[:len(magic)])
		if err == nil {
			assert.Equal(t, got, nonce)
			assert.Assert(t, at >= 0)
		}
		// What follows any prefix is still found.
		_, got, err = readHello(bytes.NewReader(appendHello(data, 7, nonce)), &nonce)
		assert.NilError(t, err)
		assert.Equal(t, got, nonce)
	})
}
