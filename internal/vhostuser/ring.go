package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
)

const (
	maxQueueSize = 1024

	descSize = 16
	usedSize = 8 // of an element

	availIdx, availRing = 2, 4 // offsets
	usedRing            = 4
	noInterrupt         = 1 // in the available ring's flags

	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	// maxDescriptors bounds a request. The guest's kernel makes none with more than a queue has.
	maxDescriptors = maxQueueSize
	// maxRequest bounds a request's bytes in each direction. The largest of FUSE is a write of
	// as many pages as a queue has descriptors, with two headers.
	maxRequest = 8 << 20
)

// A ring is a mapped queue. Its methods read what the guest writes; the caller is alone with it.
type ring struct {
	mem      *memory
	size     uint16 // a power of two
	desc     []byte
	avail    []byte
	used     []byte
	eventIdx bool
	fence    atomic.Uint32
}

// mapRing finds the parts of a queue in the memory, which stays the caller's.
func mapRing(mem *memory, size uint16, a address) (*ring, error) {
	if size == 0 {
		return nil, errors.New("the size is not set")
	}
	n := uint64(size)
	r := &ring{
		mem: mem, size: size,
		desc:  mem.atUser(a.desc, descSize*n),
		avail: mem.atUser(a.avail, availRing+2*n+2),
		used:  mem.atUser(a.used, usedRing+usedSize*n+2),
	}
	for _, part := range []struct {
		name  string
		data  []byte
		align uintptr
		at    uint64
	}{{"descriptors", r.desc, descSize, a.desc}, {"available ring", r.avail, 2, a.avail}, {"used ring", r.used, 4, a.used}} {
		if part.data == nil || !aligned(part.data, part.align) {
			return nil, fmt.Errorf("%s at %#x: not aligned, or not in the memory", part.name, part.at)
		}
	}
	return r, nil
}

// available is how many requests the guest has made available behind last.
func (r *ring) available(last uint16) (uint16, error) {
	n := load16(r.avail, availIdx) - last
	if n > r.size {
		return 0, fmt.Errorf("%d requests are available in a queue of %d", n, r.size)
	}
	return n, nil
}

// head is the first descriptor of the request at an index of the available ring.
func (r *ring) head(index uint16) uint16 {
	return load16(r.avail, availRing+2*int(index&(r.size-1)))
}

// wantKick asks the guest for a kick when it makes the request at an index available. What it has made available
// before it sees that is to be looked at again. Without EVENT_IDX it always kicks.
func (r *ring) wantKick(index uint16) {
	if !r.eventIdx {
		return
	}
	binary.LittleEndian.PutUint16(r.used[usedRing+usedSize*int(r.size):], index)
	r.fence.Add(1) // the guest must see it before the index is read again
}

// usedIndex is the index of the next element of the used ring. It is the device's own, so that it is read only
// when the ring begins.
func (r *ring) usedIndex() uint16 { return load16(r.used, availIdx) }

// push tells the guest that a request is done, at the index of the used ring, and whether the guest is
// to be interrupted for it.
func (r *ring) push(index, head uint16, written uint32) (interrupt bool) {
	element := r.used[usedRing+usedSize*int(index&(r.size-1)):]
	binary.LittleEndian.PutUint32(element, uint32(head))
	binary.LittleEndian.PutUint32(element[4:], written)
	store32(r.used, 0, uint32(index+1)<<16) // with the flags, which are 0
	if r.eventIdx {
		return load16(r.avail, availRing+2*int(r.size)) == index
	}
	return load16(r.avail, 0)&noInterrupt == 0
}

type descriptor struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

// decodeDescriptor reads each field once: the guest may change them meanwhile.
func decodeDescriptor(b []byte) descriptor {
	return descriptor{
		addr:  binary.LittleEndian.Uint64(b),
		len:   binary.LittleEndian.Uint32(b[8:]),
		flags: binary.LittleEndian.Uint16(b[12:]),
		next:  binary.LittleEndian.Uint16(b[14:]),
	}
}

// A walker collects the buffers of one request after the other.
type walker struct {
	table   []byte // a copy of an indirect table: the guest cannot change it any more
	in, out [][]byte
}

// walk collects the buffers of the request that begins with a descriptor.
func (w *walker) walk(r *ring, head uint16) (err error) {
	w.in, w.out = w.in[:0], w.out[:0]
	table, index, indirect := r.desc, head, false
	var inSize, outSize uint64
	for range maxDescriptors + 1 { // one may point to a table
		at := int(index) * descSize
		if at >= len(table) {
			return fmt.Errorf("descriptor %d of %d", index, len(table)/descSize)
		}
		d := decodeDescriptor(table[at:])
		switch {
		case d.flags&descIndirect == 0:
		case indirect:
			return errors.New("an indirect descriptor in an indirect table")
		case d.flags&descNext != 0:
			return errors.New("an indirect descriptor before others")
		default:
			if table, err = w.indirect(r.mem, d); err != nil {
				return err
			}
			indirect, index = true, 0
			continue
		}
		list, size := &w.in, &inSize
		if d.flags&descWrite != 0 {
			list, size = &w.out, &outSize
		} else if len(w.out) > 0 {
			return errors.New("a buffer to read from behind one to write to")
		}
		if *size += uint64(d.len); *size > maxRequest {
			return fmt.Errorf("more than %d bytes", maxRequest)
		}
		if *list, err = appendBuffer(*list, r.mem, d.addr, uint64(d.len)); err != nil {
			return err
		}
		if d.flags&descNext == 0 {
			return nil
		}
		index = d.next
	}
	return fmt.Errorf("more than %d descriptors, or a loop of them", maxDescriptors)
}

// indirect copies the table that a descriptor points to.
func (w *walker) indirect(mem *memory, d descriptor) ([]byte, error) {
	if d.len == 0 || d.len%descSize != 0 || d.len > maxDescriptors*descSize {
		return nil, fmt.Errorf("an indirect table of %d bytes", d.len)
	}
	table := w.table[:0]
	for addr, left := d.addr, uint64(d.len); left > 0; {
		part := mem.at(addr, left)
		if part == nil {
			return nil, fmt.Errorf("an indirect table at %#x, where there is no memory", addr)
		}
		table = append(table, part...)
		addr, left = addr+uint64(len(part)), left-uint64(len(part))
	}
	w.table = table
	return table, nil
}

// appendBuffer appends the memory at an address of the guest, in as many pieces as there are regions.
func appendBuffer(list [][]byte, mem *memory, addr, size uint64) ([][]byte, error) {
	for size > 0 {
		part := mem.at(addr, size)
		if part == nil {
			return nil, fmt.Errorf("a buffer at %#x, where there is no memory", addr)
		}
		list = append(list, part)
		addr, size = addr+uint64(len(part)), size-uint64(len(part))
	}
	return list, nil
}
