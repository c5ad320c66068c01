package standin

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Every message is one packet of at most maxMessage bytes: a byte that tells
// its kind, then fields of fixed size, big endian.
//
//	client to server
//	  'H' version u8, token [16], flags u8, present u8, width u16, height u16
//	      with the present ones of stdin, stdout and stderr as SCM_RIGHTS; first and once
//	  'S' signal u8
//	  'R' width u16, height u16
//	server to client
//	  'O'                 a request with the token has come
//	  'E' text            refused; the connection ends
//	  'X' status u8       the process has exited; the connection ends
const (
	version    = 1
	maxMessage = 512

	kindHello  = 'H'
	kindSignal = 'S'
	kindResize = 'R'
	kindOK     = 'O'
	kindError  = 'E'
	kindExit   = 'X'

	flagTerminal   = 1 << 0
	flagForeground = 1 << 1

	maxSignal = 64
	maxFiles  = 3
)

// Bits of hello.present, in the order in which the files travel.
const (
	presentStdin = 1 << iota
	presentStdout
	presentStderr
)

// Token links a connection to the request that names it. It is a secret of runv's
// processes: random, never reused.
type Token [16]byte

// hello is what a client says first.
type hello struct {
	token         Token
	flags         uint8
	present       uint8
	width, height uint16 // 0 if unknown
}

const helloSize = 1 + 1 + len(Token{}) + 1 + 1 + 2 + 2

func (h hello) encode() []byte {
	b := make([]byte, 0, helloSize)
	b = append(b, kindHello, version)
	b = append(b, h.token[:]...)
	b = append(b, h.flags, h.present)
	b = binary.BigEndian.AppendUint16(b, h.width)
	return binary.BigEndian.AppendUint16(b, h.height)
}

func decodeHello(b []byte) (hello, error) {
	var h hello
	if len(b) < 2 || b[0] != kindHello {
		return h, fmt.Errorf("decode hello: not a hello message")
	}
	if b[1] != version {
		return h, fmt.Errorf("decode hello: version %d, want %d", b[1], version)
	}
	if len(b) != helloSize {
		return h, fmt.Errorf("decode hello: %d bytes, want %d", len(b), helloSize)
	}
	rest := b[2+copy(h.token[:], b[2:]):]
	h.flags = rest[0]
	if h.flags&^(flagTerminal|flagForeground) != 0 {
		return h, fmt.Errorf("decode hello: unknown flags %#x", h.flags)
	}
	h.present = rest[1]
	if h.present >= 1<<maxFiles {
		return h, fmt.Errorf("decode hello: unknown files %#x", h.present)
	}
	if h.flags&flagTerminal != 0 && h.present != presentStdin|presentStdout {
		return h, fmt.Errorf("decode hello: files %#x with a terminal", h.present)
	}
	h.width = binary.BigEndian.Uint16(rest[2:])
	h.height = binary.BigEndian.Uint16(rest[4:])
	return h, nil
}

// request is a signal, or a resize when signal is 0.
type request struct {
	signal        uint8 // 1 to maxSignal
	width, height uint16
}

func (r request) encode() []byte {
	if r.signal != 0 {
		return []byte{kindSignal, r.signal}
	}
	b := binary.BigEndian.AppendUint16([]byte{kindResize}, r.width)
	return binary.BigEndian.AppendUint16(b, r.height)
}

func decodeRequest(b []byte) (request, error) {
	switch {
	case len(b) == 2 && b[0] == kindSignal:
		if b[1] == 0 || b[1] > maxSignal {
			return request{}, fmt.Errorf("decode request: signal %d", b[1])
		}
		return request{signal: b[1]}, nil
	case len(b) == 5 && b[0] == kindResize:
		return request{width: binary.BigEndian.Uint16(b[1:]), height: binary.BigEndian.Uint16(b[3:])}, nil
	case len(b) == 0:
		return request{}, fmt.Errorf("decode request: empty")
	}
	return request{}, fmt.Errorf("decode request: kind %q with %d bytes", b[0], len(b))
}

// reply is what the server says.
type reply struct {
	kind   byte
	text   string // of kindError
	status uint8  // of kindExit
}

func (r reply) encode() []byte {
	switch r.kind {
	case kindError:
		text := printable(r.text)
		if len(text) >= maxMessage {
			text = strings.ToValidUTF8(text[:maxMessage-1], "")
		}
		return append([]byte{kindError}, text...)
	case kindExit:
		return []byte{kindExit, r.status}
	}
	return []byte{r.kind}
}

func decodeReply(b []byte) (reply, error) {
	switch {
	case len(b) == 1 && b[0] == kindOK:
		return reply{kind: kindOK}, nil
	case len(b) == 2 && b[0] == kindExit:
		return reply{kind: kindExit, status: b[1]}, nil
	case len(b) > 1 && len(b) <= maxMessage && b[0] == kindError && utf8.Valid(b[1:]):
		return reply{kind: kindError, text: printable(string(b[1:]))}, nil
	case len(b) == 0:
		return reply{}, fmt.Errorf("decode reply: empty")
	}
	return reply{}, fmt.Errorf("decode reply: kind %q with %d bytes", b[0], len(b))
}

// printable replaces what could disturb a terminal or a log line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
