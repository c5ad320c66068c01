package vhostuser

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A region is a piece of the guest's memory that is mapped here. It is unmapped when the last memory
// that it is part of is released.
type region struct {
	regionInfo

	data    []byte // size bytes
	mapping []byte // what to unmap
	tables  atomic.Int64
}

// mapRegion maps a region of an open file, which stays the caller's.
//
// Whoever shrinks a file takes memory from those that have mapped it: the next access kills them with SIGBUS.
// So the file must be one that cannot shrink (memfd_create(2), F_SEAL_SHRINK), which is what QEMU makes, and large
// enough now. A fault that the kernel raises in spite of that, for want of memory, becomes a panic on the
// goroutines of this package (debug.SetPanicOnFault), which end with an error.
func mapRegion(info regionInfo, fd int) (*region, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("region %s: its file can be truncated", info)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("region %s: stat file: %w", info, err)
	}
	if info.offset+info.size > uint64(st.Size) {
		return nil, fmt.Errorf("region %s: its file has %#x bytes", info, st.Size)
	}
	// The file's size is below 2^63, and so are all sums now.
	slack := info.offset % uint64(os.Getpagesize())
	if info.size > math.MaxInt-slack {
		return nil, fmt.Errorf("region %s: too large", info)
	}
	mapping, err := unix.Mmap(fd, int64(info.offset-slack), int(slack+info.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("region %s: map: %w", info, err)
	}
	return &region{regionInfo: info, mapping: mapping, data: mapping[slack:]}, nil
}

func (r *region) unmap() {
	if r.mapping != nil {
		_ = unix.Munmap(r.mapping) // it cannot fail for what Mmap returned
	}
}

// A memory is what the guest's memory consisted of at some time. It never changes.
type memory struct {
	regions []*region    // by the guest's address
	users   atomic.Int64 // that hold it: the session, queues, requests
}

var errOverlap = errors.New("regions overlap")

// newMemory makes a memory with one user of regions that may be part of other ones, too. After an error
// the regions are as before.
func newMemory(regions []*region) (*memory, error) {
	if len(regions) > maxSlots {
		return nil, fmt.Errorf("%d regions: at most %d are taken", len(regions), maxSlots)
	}
	byUser := slices.SortedFunc(slices.Values(regions), func(a, b *region) int { return cmp.Compare(a.user, b.user) })
	byGuest := slices.SortedFunc(slices.Values(regions), func(a, b *region) int { return cmp.Compare(a.guest, b.guest) })
	for i := 1; i < len(regions); i++ {
		if byUser[i-1].user+byUser[i-1].size > byUser[i].user || byGuest[i-1].guest+byGuest[i-1].size > byGuest[i].guest {
			return nil, errOverlap
		}
	}
	m := &memory{regions: byGuest}
	m.users.Store(1)
	for _, r := range regions {
		r.tables.Add(1)
	}
	return m, nil
}

func (m *memory) retain() *memory {
	m.users.Add(1)
	return m
}

func (m *memory) release() {
	if m.users.Add(-1) > 0 {
		return
	}
	for _, r := range m.regions {
		if r.tables.Add(-1) == 0 {
			r.unmap()
		}
	}
}

// at returns the memory from an address of the guest on, up to n bytes or the region's end, or nil where there is
// none.
func (m *memory) at(guest, n uint64) []byte {
	low, high := 0, len(m.regions)
	for low < high {
		mid := (low + high) / 2
		if m.regions[mid].guest+m.regions[mid].size > guest { // the first that ends behind the address
			high = mid
		} else {
			low = mid + 1
		}
	}
	if low == len(m.regions) || m.regions[low].guest > guest {
		return nil
	}
	r := m.regions[low]
	from := guest - r.guest
	return r.data[from : from+min(n, r.size-from)]
}

// atUser returns n bytes from an address of the VMM on, or nil if they are not in one region.
func (m *memory) atUser(user, n uint64) []byte {
	for _, r := range m.regions {
		if from := user - r.user; user >= r.user && from < r.size {
			if n > r.size-from {
				return nil
			}
			return r.data[from : from+n]
		}
	}
	return nil
}

// find returns the region that a message describes.
func (m *memory) find(info regionInfo) *region {
	for _, r := range m.regions {
		if r.guest == info.guest && r.size == info.size && r.user == info.user {
			return r
		}
	}
	return nil
}
