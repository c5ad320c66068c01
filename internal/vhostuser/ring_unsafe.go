package vhostuser

import (
	"sync/atomic"
	"unsafe"
)

// The guest writes to a ring while this process reads it, so the indices are read and written by
// atomic operations, which also order what stands around them. Go has none for 16 bits: the 32-bit word around
// the field, which lies in the same page, stands in. A plain store of 16 bits by encoding/binary is one
// instruction on the processors that this runs on.

// load16 reads the field at an even offset of a ring's part, before all that is read later.
func load16(part []byte, at int) uint16 {
	_ = part[at+1]
	p := unsafe.Pointer(&part[at])
	shift := uintptr(p) & 2
	return uint16(atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(shift)))) >> (8 * shift))
}

// store32 writes the field at an offset of a ring's part that is aligned to 4: after all that was written before, and
// before all that is read later.
func store32(part []byte, at int, value uint32) {
	_ = part[at+3]
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&part[at])), value)
}

// aligned tells whether a part of a ring begins at a multiple of n.
func aligned(part []byte, n uintptr) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(part)))%n == 0
}
