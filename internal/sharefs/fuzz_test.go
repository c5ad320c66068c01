package sharefs_test

import (
	"encoding/binary"
	"io"
	"log"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/sharefs"
)

// FuzzRequests sends what a hostile guest can: requests with any content, in any order. Nothing may panic, and nothing may
// reach a file beside the served directory. Each request of the input is its length in a byte, then so many bytes from
// the header's operation code on.
func FuzzRequests(f *testing.F) {
	request := func(opcode uint32, node uint64, rest ...byte) []byte {
		b := make([]byte, 36) // the header without its length
		binary.LittleEndian.PutUint32(b, opcode)
		binary.LittleEndian.PutUint64(b[12:], node)
		b = append(b, rest...)
		return append([]byte{byte(len(b))}, b...)
	}
	const lookup, unlink, mkdir, open, rename, link = 1, 10, 9, 14, 12, 13
	f.Add(append(request(lookup, 1, []byte("file\x00")...), request(open, 2, make([]byte, 8)...)...))
	f.Add(append(request(lookup, 1, []byte("..\x00")...), request(unlink, 1, []byte("../beside\x00")...)...))
	f.Add(append(request(lookup, 1, []byte("link\x00")...), request(lookup, 2, []byte("beside\x00")...)...))
	f.Add(request(mkdir, 1, []byte("\x00\x00\x00\x00\x00\x00\x00\x00../made\x00")...))
	f.Add(request(rename, 1, []byte("\x01\x00\x00\x00\x00\x00\x00\x00file\x00../moved\x00")...))
	f.Add(request(link, 1, []byte("\x02\x00\x00\x00\x00\x00\x00\x00a/b\x00")...))
	f.Fuzz(func(t *testing.T, input []byte) {
		if os.Geteuid() != 0 {
			t.Skip("needs root, as the server does")
		}
		outside := t.TempDir()
		beside := filepath.Join(outside, "beside")
		assert.NilError(t, os.WriteFile(beside, []byte("untouched"), 0o600))
		dir := filepath.Join(outside, "served")
		assert.NilError(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o755))
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644))
		assert.NilError(t, os.Symlink("..", filepath.Join(dir, "link")))
		root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		assert.NilError(t, err)
		defer unix.Close(root)
		fs, err := sharefs.New(sharefs.Config{Root: root, Proc: "/proc/self/fd/", Limits: few()})
		assert.NilError(t, err)
		defer fs.Close()
		opts := sharefs.Options()
		opts.Logger = log.New(io.Discard, "", 0)
		opts.PanicHandler = func(v any) fuse.Status { panic(v) }
		server := fuse.NewProtocolServer(fs, opts)
		out := make([]byte, 64<<10)
		for requests := 0; len(input) > 0 && requests < 32; requests++ {
			n := min(int(input[0]), len(input)-1)
			in := binary.LittleEndian.AppendUint32(nil, uint32(n+4))
			in = append(in, input[1:1+n]...)
			input = input[1+n:]
			if len(in) >= 8 && binary.LittleEndian.Uint32(in[4:]) == 33 {
				continue // it may wait for a lock
			}
			server.HandleRequest([][]byte{in}, [][]byte{out})
		}
		data, err := os.ReadFile(beside)
		assert.NilError(t, err)
		assert.Equal(t, string(data), "untouched")
		entries, err := os.ReadDir(outside)
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 2)
	})
}
