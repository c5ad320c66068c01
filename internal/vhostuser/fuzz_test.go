package vhostuser_test

import (
	"encoding/binary"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/vhostuser"
)

func FuzzDecode(f *testing.F) {
	f.Add(message(1, 0, nil))
	f.Add(message(2, needReply, u64s(allFeatures)))
	f.Add(message(5, 0, append(u32s(2, 0), append(region(0, 1, 0, 0), region(1<<63, 1<<63, 2, 3)...)...)))
	f.Add(message(9, 0, append(u32s(1, 0), u64s(1, 2, 3, 4)...)))
	f.Add(message(37, 0, append(u64s(0), region(guestBase, memSize, userBase, 0)...)))
	f.Fuzz(func(t *testing.T, b []byte) {
		name, err := vhostuser.Decode(b)
		assert.Check(t, err != nil || name != "")
	})
}

// FuzzQueue lets the guest's memory, a queue included, be anything.
func FuzzQueue(f *testing.F) {
	const size = 4
	seed := func(avail uint16, heads [size]uint16, table ...desc) []byte {
		mem := make([]byte, 0x200)
		for i, d := range table {
			d.put(mem[16*i:])
		}
		at := (16*size + 4 + 8*size + 2 + 3) &^ 3
		binary.LittleEndian.PutUint16(mem[at+2:], avail)
		for i, head := range heads {
			binary.LittleEndian.PutUint16(mem[at+4+2*i:], head)
		}
		return mem
	}
	f.Add(seed(1, [size]uint16{}, desc{0x1000, 0x200, 1, 1}, desc{0x1080, 4, 2, 0}), uint8(2), uint16(0))
	f.Add(seed(3, [size]uint16{2, 3, 4}, desc{0x1100, 4, 1, 2}, desc{}, desc{0x10f0, 32, 4, 0}), uint8(2), uint16(0))
	f.Add(seed(0xffff, [size]uint16{1}, desc{0x1000, 1, 1, 0}), uint8(2), uint16(0xfffe))
	f.Add(seed(9, [size]uint16{1}), uint8(0), uint16(8))
	f.Fuzz(func(t *testing.T, mem []byte, log uint8, last uint16) {
		log %= 11
		n, in, out, _ := vhostuser.Walk(mem, 1<<log, last)
		assert.Check(t, n <= 1<<log)
		for _, part := range append(in, out...) { // all of it is there
			part[0]++
			part[len(part)-1]++
		}
	})
}
