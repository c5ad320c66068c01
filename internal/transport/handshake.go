package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A hello is magic, version, nonce. Both ends send one form; the guest's answer
// repeats the host's nonce and carries the version that will be spoken.
const (
	magic     = "\x00runv\x01\xffH" // has bytes that no console text has
	nonceSize = 16
	helloSize = len(magic) + 2 + nonceSize

	// Version is the version of the conversation: handshake, mux and API.
	Version = 1

	// maxSkip bounds what is skipped while looking for a hello.
	maxSkip = 1 << 20
)

// ErrNoHello says that the other end sent something else than a hello.
var ErrNoHello = errors.New("no hello found in the data received")

// VersionError says that the ends speak different versions.
type VersionError struct{ Ours, Theirs uint16 }

// Error tells both versions.
func (e *VersionError) Error() string {
	return fmt.Sprintf("version mismatch: the other end speaks version %d, this one %d; host and guest files must be of one build", e.Theirs, e.Ours)
}

func appendHello(b []byte, version uint16, nonce [nonceSize]byte) []byte {
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint16(b, version)
	return append(b, nonce[:]...)
}

// readHello skips what precedes a hello and reads it. With want set it skips hellos
// with another nonce, too: they belong to an earlier conversation. It reads
// no byte beyond the hello.
func readHello(r io.Reader, want *[nonceSize]byte) (version uint16, nonce [nonceSize]byte, err error) {
	buf := make([]byte, 0, helloSize)
	skipped := 0
	for {
		// Read only what completes a hello, should buf be the start of one.
		n := len(buf)
		if _, err := io.ReadFull(r, buf[n:helloSize]); err != nil {
			return 0, nonce, err
		}
		buf = buf[:helloSize]
		if string(buf[:len(magic)]) == magic {
			version = binary.BigEndian.Uint16(buf[len(magic):])
			copy(nonce[:], buf[len(magic)+2:])
			if want == nil || nonce == *want {
				return version, nonce, nil
			}
		}
		drop := nextMagic(buf[1:]) + 1
		if skipped += drop; skipped > maxSkip {
			return 0, nonce, ErrNoHello
		}
		buf = buf[:copy(buf, buf[drop:])]
	}
}

// nextMagic returns the first index at which b may begin a hello: where magic
// or, at b's end, a beginning of magic stands.
func nextMagic(b []byte) int {
	for i := range b {
		if bytes.HasPrefix(b[i:], []byte(magic)) || bytes.HasPrefix([]byte(magic), b[i:]) {
			return i
		}
	}
	return len(b)
}

func hostHandshake(rw io.ReadWriter, nonce [nonceSize]byte) error {
	if _, err := rw.Write(appendHello(nil, Version, nonce)); err != nil {
		return fmt.Errorf("send hello: %w", err)
	}
	theirs, _, err := readHello(rw, &nonce)
	if err != nil {
		return fmt.Errorf("read hello: %w", err)
	}
	if theirs != Version {
		return &VersionError{Ours: Version, Theirs: theirs}
	}
	return nil
}

func guestHandshake(rw io.ReadWriter) error {
	theirs, nonce, err := readHello(rw, nil)
	if err != nil {
		return fmt.Errorf("read hello: %w", err)
	}
	// The answer goes out even when the versions differ: the host tells its
	// user about it, the guest has nobody to tell.
	if _, err := rw.Write(appendHello(nil, Version, nonce)); err != nil {
		return fmt.Errorf("send hello: %w", err)
	}
	if theirs != Version {
		return &VersionError{Ours: Version, Theirs: theirs}
	}
	return nil
}
