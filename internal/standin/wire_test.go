package standin

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

func TestDecodeHello(t *testing.T) {
	good := hello{token: Token{1, 2, 3}, flags: flagTerminal | flagForeground, present: presentStdin | presentStdout, width: 80, height: 25}
	got, err := decodeHello(good.encode())
	assert.NilError(t, err)
	assert.Equal(t, got, good)

	change := func(i int, to byte) []byte {
		b := good.encode()
		b[i] = to
		return b
	}
	for name, test := range map[string]struct {
		message []byte
		want    string
	}{
		"empty":               {nil, "not a hello"},
		"another kind":        {change(0, 'S'), "not a hello"},
		"version":             {change(1, 2), "version 2, want 1"},
		"short":               {good.encode()[:helloSize-1], "23 bytes, want 24"},
		"long":                {append(good.encode(), 0), "25 bytes"},
		"flags":               {change(18, 4), "unknown flags"},
		"files":               {change(19, 8), "unknown files"},
		"terminal with error": {change(19, 7), "with a terminal"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := decodeHello(test.message)
			assert.ErrorContains(t, err, test.want)
		})
	}
}

func TestDecodeRequest(t *testing.T) {
	for _, r := range []request{{signal: 1}, {signal: 64}, {width: 80, height: 25}, {}} {
		got, err := decodeRequest(r.encode())
		assert.NilError(t, err)
		assert.Equal(t, got, r)
	}
	for _, bad := range []string{"", "S", "S\x00", "S\x41", "S\x01\x01", "R\x00\x00\x00", "X\x00", "H"} {
		_, err := decodeRequest([]byte(bad))
		assert.Assert(t, err != nil, "%q", bad)
	}
}

func TestDecodeReply(t *testing.T) {
	for _, r := range []reply{{kind: kindOK}, {kind: kindExit, status: 137}, {kind: kindError, text: "why"}} {
		got, err := decodeReply(r.encode())
		assert.NilError(t, err)
		assert.Equal(t, got, r)
	}
	long := reply{kind: kindError, text: strings.Repeat("ä\n", maxMessage)}
	got, err := decodeReply(long.encode())
	assert.NilError(t, err)
	assert.Assert(t, len(got.text) > maxMessage-8 && !strings.Contains(got.text, "\n"), "%q", got.text)
	for _, bad := range []string{"", "E", "X", "X\x00\x00", "O\x00", "E\xff", "S\x01", "E" + strings.Repeat("x", maxMessage)} {
		_, err := decodeReply([]byte(bad))
		assert.Assert(t, err != nil, "%q", bad)
	}
}

// FuzzDecode checks that no message crashes a decoder, and that what one accepts means just that.
func FuzzDecode(f *testing.F) {
	f.Add(hello{token: Token{1}, present: 7}.encode())
	f.Add(request{signal: 9}.encode())
	f.Add(request{width: 80, height: 25}.encode())
	f.Add(reply{kind: kindOK}.encode())
	f.Add(reply{kind: kindError, text: "why"}.encode())
	f.Add(reply{kind: kindExit, status: 1}.encode())
	f.Add(setup{flags: flagTerminal, present: 3}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHello(b); err == nil {
			assert.DeepEqual(t, h.encode(), b)
		}
		if r, err := decodeRequest(b); err == nil {
			assert.DeepEqual(t, r.encode(), b)
		}
		if r, err := decodeReply(b); err == nil {
			again, err := decodeReply(r.encode())
			assert.NilError(t, err)
			assert.Equal(t, again, r)
		}
		_, _ = decodeSetup(b)
	})
}
