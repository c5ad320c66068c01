package vhostuser

import (
	"bytes"
	"errors"
)

// Decode decodes a message as a session does, and returns its name.
func Decode(b []byte) (string, error) {
	if len(b) < headerSize {
		return "", errors.New("short")
	}
	h, err := decodeHeader(b)
	if err != nil {
		return "", err
	}
	payload := b[headerSize:]
	if len(payload) < int(h.payload) {
		return "", errors.New("short")
	}
	payload = payload[:h.payload]
	switch h.kind {
	case setMemTable:
		_, err = decodeTable(payload)
	case addMemReg, remMemReg:
		_, err = decodeRegion(payload[8:])
	case setVringAddr:
		_, _, err = decodeAddress(payload)
	case setVringNum, setVringBase, getVringBase, setVringEnable:
		_ = decodeState(payload)
	}
	return h.name, err
}

// Walk takes all requests of a queue that lies in the guest's memory at its start, and returns how many there were. The memory is in two
// regions, the second of which follows the first in the guest, but not here.
func Walk(mem []byte, size uint16, last uint16) (n int, in, out [][]byte, err error) {
	half := len(mem) / 2 &^ 15
	first := &region{regionInfo: regionInfo{guest: 0x1000, size: uint64(half), user: 0x5000_0000}, data: mem[:half]}
	second := &region{regionInfo: regionInfo{guest: 0x1000 + uint64(half), size: uint64(len(mem) - half), user: 0x1000_0000}, data: bytes.Clone(mem[half:])}
	m, err := newMemory([]*region{second, first})
	if err != nil {
		return 0, nil, nil, err
	}
	used := 0x5000_0000 + 16*uint64(size)
	avail := (used + 4 + 8*uint64(size) + 2 + 3) &^ 3
	r, err := mapRing(m, size, address{desc: 0x5000_0000, used: used, avail: avail})
	if err != nil {
		return 0, nil, nil, err
	}
	r.eventIdx = true
	var w walker
	for done := uint16(0); ; done++ {
		left, err := r.available(last)
		if err != nil || left == 0 {
			return n, in, out, err
		}
		head := r.head(last)
		if err := w.walk(r, head); err != nil {
			return n, in, out, err
		}
		in, out = append(in, w.in...), append(out, w.out...)
		last++
		n++
		r.wantKick(last)
		r.push(done, head, 1)
	}
}
