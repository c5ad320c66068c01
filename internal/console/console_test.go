package console_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"gotest.tools/v3/assert"

	"runv/internal/console"
)

const (
	ringBytes = 64 << 10
	fileBytes = 4 << 20
	lineBytes = 512
)

func newLog(t *testing.T) (*console.Log, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "console.log")
	l, err := console.New(path)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, l.Close()) })
	return l, path
}

func write(t *testing.T, l *console.Log, text string) {
	t.Helper()
	n, err := l.Write([]byte(text))
	assert.NilError(t, err)
	assert.Equal(t, n, len(text))
}

func TestTail(t *testing.T) {
	long := strings.Repeat("x", 2*lineBytes)
	for _, c := range []struct {
		name, text string
		n          int
		want       []string
	}{
		{"nothing", "", 3, nil},
		{"no lines asked for", "a\n", 0, nil},
		{"newest lines, oldest first", "a\nb\nc\n", 2, []string{"b", "c"}},
		{"fewer than asked for", "a\r\nb\r\n", 5, []string{"a", "b"}},
		{"a line without end", "a\nb", 5, []string{"a", "b"}},
		{"blank lines do not count", "a\n\n \t\n\r\nb\n\n", 2, []string{"a", "b"}},
		{"control characters", "\x1b[31mred\x1b[0m\x00\x07\ttab\n", 1, []string{"[31mred[0m tab"}},
		{"C1 controls and DEL", "a\u009b31mb\x7f\n", 1, []string{"a31mb"}},
		{"reordering and hidden characters", "a\u202eb\u200bc\ufeff\n", 1, []string{"abc"}},
		{"not UTF-8", "a\xff\xfe\x9bb\n", 1, []string{"ab"}},
		{"umlauts stay", "Grüße\n", 1, []string{"Grüße"}},
		{"long line", long + "\n", 1, []string{long[:lineBytes] + "..."}},
		{"long line cut between characters", strings.Repeat("ü", lineBytes) + "x\n", 1, []string{strings.Repeat("ü", lineBytes/2) + "..."}},
		{"long line cut inside a character", "x" + strings.Repeat("ü", lineBytes) + "\n", 1, []string{"x" + strings.Repeat("ü", lineBytes/2-1) + "..."}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, path := newLog(t)
			write(t, l, c.text)
			assert.DeepEqual(t, l.Tail(c.n), c.want)
			text, err := os.ReadFile(path)
			assert.NilError(t, err)
			assert.Equal(t, string(text), c.text)
		})
	}
}

// A line's copy in memory is cut only by the ring.
func TestRing(t *testing.T) {
	l, _ := newLog(t)
	for i := range 10_000 {
		write(t, l, fmt.Sprintf("line %d\n", i))
	}
	all := l.Tail(1 << 30)
	assert.Equal(t, all[len(all)-1], "line 9999")
	assert.Equal(t, all[len(all)-5000], "line 5000")
	assert.Assert(t, len(all) < 2*ringBytes/len("line 1000\n")+10)
	write(t, l, strings.Repeat("y", 3*ringBytes)) // one write larger than the ring
	assert.Equal(t, len(l.Tail(10)), 1)
}

func TestFileIsBounded(t *testing.T) {
	l, path := newLog(t)
	chunk := bytes.Repeat([]byte("0123456789abcde\n"), 1<<12)
	for range 3 * fileBytes / len(chunk) {
		n, err := l.Write(chunk)
		assert.NilError(t, err)
		assert.Equal(t, n, len(chunk))
	}
	write(t, l, "the end\n")
	assert.DeepEqual(t, l.Tail(1), []string{"the end"}) // memory goes on
	text, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Assert(t, len(text) > fileBytes && len(text) < fileBytes+200, "%d", len(text))
	assert.Equal(t, strings.Count(string(text), "is full"), 1)
}

// The console is the guest's, so the file must not be readable by all.
func TestFileMode(t *testing.T) {
	_, path := newLog(t)
	info, err := os.Stat(path)
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o600))
}

func TestBrokenFile(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip(err)
	}
	l, err := console.New("/dev/full")
	assert.NilError(t, err)
	defer l.Close()
	for range 3 {
		write(t, l, "goes on\n")
	}
	assert.Equal(t, len(l.Tail(5)), 3)
}

func TestNoFile(t *testing.T) {
	_, err := console.New(filepath.Join(t.TempDir(), "missing", "console.log"))
	assert.ErrorIs(t, err, os.ErrNotExist)
	l, err := console.New("")
	assert.NilError(t, err)
	write(t, l, "a\n")
	assert.DeepEqual(t, l.Tail(1), []string{"a"})
	assert.NilError(t, l.Close())
}

func TestClose(t *testing.T) {
	l, path := newLog(t)
	write(t, l, "before\n")
	assert.NilError(t, l.Close())
	assert.NilError(t, l.Close())
	write(t, l, "after\n")
	assert.DeepEqual(t, l.Tail(2), []string{"before", "after"})
	text, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, string(text), "before\n")
}

func TestConcurrentUse(t *testing.T) {
	l, _ := newLog(t)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 200 {
				_, _ = l.Write([]byte("a line\n"))
				l.Tail(3)
			}
		})
	}
	all.Wait()
	for _, line := range l.Tail(800) {
		assert.Equal(t, line, "a line")
	}
}

func FuzzTail(f *testing.F) {
	f.Add([]byte("a\nb\r\n\x1b[2J\xff\n"))
	f.Add([]byte(strings.Repeat("ü", 600)))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := console.New("")
		assert.NilError(t, err)
		_, _ = l.Write(text)
		for _, line := range l.Tail(10) {
			assert.Assert(t, line != "" && len(line) <= lineBytes+len("...") && utf8.ValidString(line), "%q", line)
			for _, r := range line {
				assert.Assert(t, r >= ' ' && r != 0x7f && (r < 0x80 || r >= 0xa0), "%q", line)
			}
		}
	})
}
