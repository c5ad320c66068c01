package shareserver_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// A vmm is a VMM that has the server's device, with a guest whose driver knows a request queue. Each request that is on its way has a
// slot of the guest's memory.
type vmm struct {
	conn       *net.UnixConn
	mem        []byte
	kick, call int
	free       chan int           // slots
	done       [slots]chan uint32 // bytes of the answer, by slot

	mu    sync.Mutex
	avail uint16
	used  uint16
	wg    sync.WaitGroup
	ended chan struct{}
}

const (
	slots    = 32
	ringSize = 2 * slots
	slotSize = 1<<20 + 1<<16 // of what is sent, and of the answer
	slotsAt  = 0x10000
	availAt  = 16 * ringSize
	usedAt   = availAt + 8 + 2*ringSize
	memSize  = slotsAt + 2*slots*slotSize

	guestBase, userBase = 1 << 30, 1 << 40
)

func connect(t testing.TB, conn *net.UnixConn) *vmm {
	t.Helper()
	v := &vmm{conn: conn, free: make(chan int, slots), ended: make(chan struct{})}
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	assert.NilError(t, err)
	defer unix.Close(fd)
	assert.NilError(t, unix.Ftruncate(fd, memSize))
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	assert.NilError(t, err)
	v.mem, err = unix.Mmap(fd, 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	assert.NilError(t, err)
	for _, event := range []*int{&v.kick, &v.call} {
		*event, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
		assert.NilError(t, err)
	}
	for i := range slots {
		v.free <- i
		v.done[i] = make(chan uint32, 1)
	}
	const features = 1<<30 | 1<<32 // the protocol's, VERSION_1
	v.send(t, 2, u64s(features))
	v.send(t, 5, append(u32s(1, 0), u64s(guestBase, memSize, userBase, 0)...), fd)
	v.send(t, 8, u32s(1, ringSize))
	v.send(t, 10, u32s(1, 0))
	v.send(t, 9, append(u32s(1, 0), u64s(userBase, userBase+usedAt, userBase+availAt, 0)...))
	v.send(t, 12, u64s(1), v.kick)
	v.send(t, 13, u64s(1), v.call)
	v.send(t, 18, u32s(1, 1))
	v.send(t, 1, nil) // it answers when all has been done
	_, err = io.ReadFull(conn, make([]byte, 20))
	assert.NilError(t, err)
	v.wg.Go(v.collect)
	t.Cleanup(func() {
		close(v.ended)
		assert.NilError(t, signal(v.call))
		v.wg.Wait()
		_ = conn.Close()
		_ = unix.Munmap(v.mem)
		_ = unix.Close(v.kick)
		_ = unix.Close(v.call)
	})
	return v
}

func (v *vmm) send(t testing.TB, kind uint32, payload []byte, fds ...int) {
	t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := v.conn.WriteMsgUnix(append(u32s(kind, 1, uint32(len(payload))), payload...), oob, nil)
	assert.NilError(t, err)
}

func u32s(values ...uint32) (b []byte) {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

func u64s(values ...uint64) (b []byte) {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func signal(fd int) error {
	_, err := unix.Write(fd, u64s(1))
	return err
}

// in and out are the slot's memory.
func (v *vmm) in(slot int) []byte { return v.mem[slotsAt+2*slot*slotSize:][:slotSize] }

func (v *vmm) out(slot int) []byte { return v.mem[slotsAt+(2*slot+1)*slotSize:][:slotSize] }

// submit makes the request in a slot, of n bytes, and returns the size of the answer.
func (v *vmm) submit(slot, n, room int) (uint32, error) {
	v.mu.Lock()
	at := uint64(guestBase + slotsAt + 2*slot*slotSize)
	put := func(i int, addr uint64, size, flags, next int) {
		d := v.mem[16*i:]
		binary.LittleEndian.PutUint64(d, addr)
		binary.LittleEndian.PutUint32(d[8:], uint32(size))
		binary.LittleEndian.PutUint16(d[12:], uint16(flags))
		binary.LittleEndian.PutUint16(d[14:], uint16(next))
	}
	put(2*slot, at, n, 1, 2*slot+1)
	put(2*slot+1, at+slotSize, room, 2, 0)
	binary.LittleEndian.PutUint16(v.mem[availAt+4+2*(int(v.avail)%ringSize):], uint16(2*slot))
	v.avail++
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&v.mem[availAt])), uint32(v.avail)<<16)
	v.mu.Unlock()
	if err := signal(v.kick); err != nil {
		return 0, err
	}
	select {
	case n := <-v.done[slot]:
		return n, nil
	case <-v.ended:
		return 0, errors.New("the VMM has ended")
	case <-time.After(patience):
		return 0, errors.New("no answer")
	}
}

// collect takes the answers.
func (v *vmm) collect() {
	for {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(v.call), Events: unix.POLLIN}}, -1)
		_, _ = unix.Read(v.call, make([]byte, 8)) // it does not block: the device has seen to that
		select {
		case <-v.ended:
			return
		default:
		}
		for uint16(atomic.LoadUint32((*uint32)(unsafe.Pointer(&v.mem[usedAt])))>>16) != v.used {
			e := v.mem[usedAt+4+8*(int(v.used)%ringSize):]
			v.used++
			v.done[binary.LittleEndian.Uint32(e)/2] <- binary.LittleEndian.Uint32(e[4:])
		}
	}
}

// request makes a FUSE request and returns the answer behind its header.
func (v *vmm) request(opcode uint32, node uint64, body []byte) ([]byte, error) {
	slot := <-v.free
	defer func() { v.free <- slot }()
	in := v.in(slot)
	head := append(u32s(uint32(40+len(body)), opcode), u64s(uint64(slot)+1, node, 0, 0)...)
	n := copy(in, head[:40])
	n += copy(in[n:], body)
	got, err := v.submit(slot, n, slotSize)
	if err != nil {
		return nil, err
	}
	out := v.out(slot)[:got]
	if len(out) < 16 {
		return nil, fmt.Errorf("answer of %d bytes", len(out))
	}
	if errno := -int32(binary.LittleEndian.Uint32(out[4:])); errno != 0 {
		return nil, unix.Errno(errno)
	}
	return append([]byte{}, out[16:]...), nil
}

const (
	opLookup, opForget, opGetattr, opWrite, opRead, opOpen, opInit, opCreate = 1, 2, 3, 16, 15, 14, 26, 35
)

// initialize is what the guest says first.
func (v *vmm) initialize(t testing.TB) {
	t.Helper()
	_, err := v.request(opInit, 0, append(u32s(7, 38, 1<<20, 0xffffffff&^(1<<30)), make([]byte, 48)...))
	assert.NilError(t, err)
}

// mount serves the share at a directory of the host, through the kernel's own client, whose requests are passed on to the
// server.
func (v *vmm) mount(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	assert.NilError(t, os.Chmod(dir, 0o755))
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	assert.NilError(t, unix.Mount("share", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV,
		fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd)))
	var wg sync.WaitGroup
	for range slots {
		wg.Go(func() { v.forward(t, fd) })
	}
	t.Cleanup(func() {
		assert.NilError(t, unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH))
		wg.Wait()
		_ = unix.Close(fd)
	})
	return dir
}

// forward passes requests on until the file system is unmounted.
func (v *vmm) forward(t testing.TB, fd int) {
	slot := <-v.free
	defer func() { v.free <- slot }()
	for {
		n, err := unix.Read(fd, v.in(slot))
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) { // ENOENT: interrupted before it was read
			continue
		}
		if err != nil {
			return
		}
		answer := append(u32s(16, 0xfffffffb), v.in(slot)[8:16]...) // EIO
		if got, err := v.submit(slot, n, slotSize); err != nil {
			t.Error(err)
		} else if answer = v.out(slot)[:got]; got == 0 {
			continue
		}
		if _, err := unix.Write(fd, answer); err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: it was interrupted
			t.Errorf("answer to %x: %x: %v", v.in(slot)[:n], answer, err)
		}
	}
}
