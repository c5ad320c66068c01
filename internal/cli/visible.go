package cli

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// visible makes control characters and bytes that are no UTF-8 readable, as
// cat -v does: what a guest or a container says must not drive the terminal
// of whoever looks at it.
func visible(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		writeVisible(&b, r, s[:size])
		s = s[size:]
	}
	return b.String()
}

func writeVisible(b *strings.Builder, r rune, raw string) {
	switch {
	case r == utf8.RuneError && len(raw) == 1:
		fmt.Fprintf(b, `\x%02x`, raw[0])
	case r < ' ':
		b.WriteByte('^')
		b.WriteByte(byte(r) + '@')
	case r == 0x7f:
		b.WriteString("^?")
	case r >= 0x80 && r < 0xa0:
		fmt.Fprintf(b, `\x%02x`, r)
	default:
		b.WriteString(raw)
	}
}

// visibleWriter writes text with visible control characters; new lines and tabs
// stay, and a carriage return before a new line goes.
type visibleWriter struct {
	w    io.Writer
	rest []byte // the start of a rune or of a line's end, whose rest has not come
}

func (v *visibleWriter) Write(p []byte) (int, error) {
	data := append(v.rest, p...)
	v.rest = nil
	var b strings.Builder
	for len(data) > 0 {
		if !utf8.FullRune(data) || (data[0] == '\r' && len(data) == 1) {
			v.rest = append([]byte(nil), data...)
			break
		}
		r, size := utf8.DecodeRune(data)
		switch {
		case r == '\r' && data[1] == '\n':
		case r == '\n' || r == '\t':
			b.WriteByte(byte(r))
		default:
			writeVisible(&b, r, string(data[:size]))
		}
		data = data[size:]
	}
	if _, err := io.WriteString(v.w, b.String()); err != nil {
		return 0, err
	}
	return len(p), nil
}

// flush writes what Write has held back. Call it at the end.
func (v *visibleWriter) flush() error {
	_, err := io.WriteString(v.w, visible(string(v.rest)))
	v.rest = nil
	return err
}
