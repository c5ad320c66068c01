// Package resolver carries DNS queries from the guest to a name server in the pod's network namespace
// on the host, and the answers back, over a stream of the agent channel. Docker's name server is such
// a one: it listens on a loopback address of the container's network namespace, which in the guest is
// another.
//
// Both ends use the package: the guest Serve, with sockets in the container's network namespace, the
// supervisor Relay. It does not look into messages but for the id that links an answer to its query.
//
// On the stream are frames: a byte for the protocol, a number that the guest has chosen, the length of
// the message and the message (RFC 1035), big endian. The host sends each frame back with the same
// number and the answer, or an empty message when there is none. What the guest sends is not trusted:
// a frame is at most maxFrame long, and a limited number of queries is asked at a time.
package resolver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// The protocols of queries.
const (
	overUDP byte = 1
	overTCP byte = 2
)

const (
	headerSize = 1 + 4 + 2
	maxFrame   = headerSize + math.MaxUint16
	idSize     = 2 // bytes of a message's id; shorter ones are none
)

// frame is a message on its way.
type frame struct {
	protocol byte
	number   uint32
	message  []byte // at most 65535 bytes; of the host: may be empty
}

func (f frame) encode() []byte {
	b := make([]byte, 0, headerSize+len(f.message))
	b = append(b, f.protocol)
	b = binary.BigEndian.AppendUint32(b, f.number)
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.message)))
	return append(b, f.message...)
}

var errProtocol = errors.New("frame of an unknown protocol")

func readFrame(r io.Reader) (frame, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	f := frame{protocol: head[0], number: binary.BigEndian.Uint32(head[1:])}
	if f.protocol != overUDP && f.protocol != overTCP {
		return frame{}, errProtocol
	}
	f.message = make([]byte, binary.BigEndian.Uint16(head[5:]))
	if _, err := io.ReadFull(r, f.message); err != nil {
		return frame{}, fmt.Errorf("frame is cut short: %w", err)
	}
	return f, nil
}

// readMessage reads a message as it travels over TCP.
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	m := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, m)
	return m, err
}

// tcpMessage is the message as it travels over TCP.
func tcpMessage(m []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(m)), uint16(len(m))), m...)
}

func sameID(a, b []byte) bool {
	return len(a) >= idSize && len(b) >= idSize && [idSize]byte(a) == [idSize]byte(b)
}
