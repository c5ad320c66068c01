package unixsock_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/unixsock"
)

func TestListenAndDial(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		for name, dir := range map[string]string{
			"short": t.TempDir(),
			"long":  filepath.Join(t.TempDir(), strings.Repeat("d", 200)),
		} {
			t.Run(network+"/"+name, func(t *testing.T) {
				assert.NilError(t, os.MkdirAll(dir, 0o700))
				l, err := unixsock.Listen(dir, "a.sock", network)
				assert.NilError(t, err)
				defer l.Close()

				fi, err := os.Stat(filepath.Join(dir, "a.sock"))
				assert.NilError(t, err)
				assert.Equal(t, fi.Mode(), os.ModeSocket|0o600)

				_, err = unixsock.Listen(dir, "a.sock", network)
				assert.Assert(t, errors.Is(err, syscall.EADDRINUSE), "%v", err)

				conn, err := unixsock.Dial(t.Context(), dir, "a.sock", network)
				assert.NilError(t, err)
				defer conn.Close()
				_, err = conn.Write([]byte("hello"))
				assert.NilError(t, err)
				peer, err := l.Accept()
				assert.NilError(t, err)
				defer peer.Close()
				buf := make([]byte, 5)
				_, err = io.ReadFull(peer, buf)
				assert.NilError(t, err)
				assert.Equal(t, string(buf), "hello")

				assert.NilError(t, l.Close())
				_, err = unixsock.Dial(t.Context(), dir, "a.sock", network)
				assert.Assert(t, errors.Is(err, syscall.ECONNREFUSED), "%v", err)
				assert.NilError(t, os.Remove(filepath.Join(dir, "a.sock")))
				_, err = unixsock.Dial(t.Context(), dir, "a.sock", network)
				assert.Assert(t, errors.Is(err, syscall.ENOENT), "%v", err)
			})
		}
	}
}

func TestRefusesNamesThatAreNot(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"", ".", "..", "a/b", "a\x00", strings.Repeat("n", 200)} {
		l, err := unixsock.Listen(dir, name, "unix")
		assert.Assert(t, err != nil && l == nil, "%q", name)
	}
	_, err := unixsock.Listen(dir, "a", "tcp")
	assert.Assert(t, errors.As(err, new(net.UnknownNetworkError)))
}
