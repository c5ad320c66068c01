package vhostuser_test

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/vhostuser"
)

const (
	guestBase = 0x1000_0000
	userBase  = 0x7f00_0000_0000
	memSize   = 1 << 20

	needReply = 1 << 3

	indirect, eventIdx, protocol, version1 = 1 << 28, 1 << 29, 1 << 30, 1 << 32

	patience = 20 * time.Second
)

// A vmm is the other side: a VMM, and a guest's driver.
type vmm struct {
	t    *testing.T
	conn *net.UnixConn
	mem  []byte
	fd   int // of mem
	done chan struct{}
	err  error
}

// serve starts a device in the background.
func serve(t *testing.T, cfg vhostuser.Config) *vmm {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ours, theirs := pair(t)
	if cfg.Queues == 0 {
		cfg.Queues = 2
	}
	if cfg.Workers == 0 {
		cfg.Workers = 2
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	fd, mem := memfd(t, memSize, unix.F_SEAL_SHRINK)
	v := &vmm{t: t, conn: ours, fd: fd, mem: mem, done: make(chan struct{})}
	go func() {
		defer close(v.done)
		v.err = vhostuser.Serve(ctx, theirs, cfg)
	}()
	t.Cleanup(func() {
		cancel()
		<-v.done
		_ = ours.Close()
		_ = theirs.Close()
	})
	return v
}

func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		assert.NilError(t, err)
		_ = f.Close()
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

func memfd(t *testing.T, size int64, seals int) (int, []byte) {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	assert.NilError(t, unix.Ftruncate(fd, size))
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	assert.NilError(t, err)
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	return fd, mem
}

func event(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func message(kind, flags uint32, payload []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, kind)
	b = binary.LittleEndian.AppendUint32(b, 1|flags)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
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

// send sends a message that needs no answer.
func (v *vmm) send(kind uint32, payload []byte, fds ...int) {
	v.t.Helper()
	v.raw(message(kind, 0, payload), fds...)
}

func (v *vmm) raw(b []byte, fds ...int) {
	v.t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := v.conn.WriteMsgUnix(b, oob, nil)
	assert.NilError(v.t, err)
}

// ask sends a message and returns the payload of the answer.
func (v *vmm) ask(kind, flags uint32, payload []byte, fds ...int) []byte {
	v.t.Helper()
	v.raw(message(kind, flags, payload), fds...)
	return v.answer(kind)
}

func (v *vmm) answer(kind uint32) []byte {
	v.t.Helper()
	assert.NilError(v.t, v.conn.SetReadDeadline(time.Now().Add(patience)))
	head := make([]byte, 12)
	_, err := io.ReadFull(v.conn, head)
	assert.NilError(v.t, err)
	assert.Equal(v.t, binary.LittleEndian.Uint32(head), kind)
	assert.Equal(v.t, binary.LittleEndian.Uint32(head[4:]), uint32(5))
	answer := make([]byte, binary.LittleEndian.Uint32(head[8:]))
	_, err = io.ReadFull(v.conn, answer)
	assert.NilError(v.t, err)
	return answer
}

// do sends a message whose success is acknowledged.
func (v *vmm) do(kind uint32, payload []byte, fds ...int) {
	v.t.Helper()
	assert.DeepEqual(v.t, v.ask(kind, needReply, payload, fds...), u64s(0))
}

// ended waits for the end of Serve.
func (v *vmm) ended() error {
	v.t.Helper()
	select {
	case <-v.done:
		return v.err
	case <-time.After(patience):
		v.t.Fatal("Serve does not return")
		return nil
	}
}

func region(guest, size, user, offset uint64) []byte { return u64s(guest, size, user, offset) }

// handshake does what QEMU does first.
func (v *vmm) handshake(features uint64) {
	v.t.Helper()
	assert.DeepEqual(v.t, v.ask(1, 0, nil), u64s(indirect|eventIdx|protocol|version1))
	assert.DeepEqual(v.t, v.ask(15, 0, nil), u64s(1<<0|1<<3|1<<13|1<<15))
	v.send(16, u64s(1<<0|1<<3|1<<15))
	assert.DeepEqual(v.t, v.ask(17, 0, nil), u64s(2))
	v.send(3, nil)
	v.do(2, u64s(features))
	v.do(37, append(u64s(0), region(guestBase, memSize, userBase, 0)...), v.fd)
}

// A ring is a driver's side of a queue.
type ring struct {
	v          *vmm
	index      uint32
	size       int
	at         int // offset in the memory
	event      bool
	kick, call int
	avail      uint16
	used       uint16
}

// ring places a queue at an offset of the memory and starts it.
func (v *vmm) ring(index uint32, size, at int, features uint64) *ring {
	v.t.Helper()
	r := &ring{v: v, index: index, size: size, at: at, event: features&eventIdx != 0, kick: event(v.t), call: event(v.t)}
	r.start(0)
	v.do(18, u32s(index, 1))
	return r
}

func (r *ring) availAt() int { return r.at + 16*r.size }
func (r *ring) usedAt() int  { return r.at + 16*r.size + 8 + 2*r.size }

func (r *ring) start(base uint32) {
	r.v.t.Helper()
	r.v.do(8, u32s(r.index, uint32(r.size)))
	r.v.do(10, u32s(r.index, base))
	r.v.do(9, append(u32s(r.index, 0), u64s(
		userBase+uint64(r.at), userBase+uint64(r.usedAt()), userBase+uint64(r.availAt()), 0)...))
	r.v.do(12, u64s(uint64(r.index)), r.kick)
	r.v.do(13, u64s(uint64(r.index)), r.call)
}

type desc struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

func (d desc) put(b []byte) {
	binary.LittleEndian.PutUint64(b, d.addr)
	binary.LittleEndian.PutUint32(b[8:], d.len)
	binary.LittleEndian.PutUint16(b[12:], d.flags)
	binary.LittleEndian.PutUint16(b[14:], d.next)
}

// describe writes a descriptor.
func (r *ring) describe(i int, d desc) { d.put(r.v.mem[r.at+16*i:]) }

func load16(b []byte, at int) uint16 {
	p := unsafe.Pointer(&b[at])
	shift := uintptr(p) & 2
	return uint16(atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(shift)))) >> (8 * shift))
}

// offer makes a request available and kicks the device if that wants to be.
func (r *ring) offer(head uint16) {
	mem := r.v.mem
	binary.LittleEndian.PutUint16(mem[r.availAt()+4+2*(int(r.avail)%r.size):], head)
	r.avail++
	r.publish()
	if !r.event || load16(mem, r.usedAt()+4+8*r.size) == r.avail-1 {
		r.ring()
	}
}

func (r *ring) publish() {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&r.v.mem[r.availAt()])), uint32(r.avail)<<16)
}

func (r *ring) ring() {
	_, err := unix.Write(r.kick, u64s(1))
	assert.NilError(r.v.t, err)
}

// result waits for the next request that is done.
func (r *ring) result() (head, written uint32) {
	r.v.t.Helper()
	for !r.ready() {
		if !r.wait(patience) {
			if r.ready() {
				r.v.t.Fatal("a request is done, and no interrupt came")
			}
			r.v.t.Fatal("no request is done")
		}
	}
	e := r.v.mem[r.usedAt()+4+8*(int(r.used)%r.size):]
	r.used++
	return binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:])
}

var order atomic.Uint32

// ready looks for a request that is done; if there is none it asks for an interrupt.
func (r *ring) ready() bool {
	if load16(r.v.mem, r.usedAt()+2) != r.used {
		return true
	}
	binary.LittleEndian.PutUint16(r.v.mem[r.availAt()+4+2*r.size:], r.used)
	order.Add(1)
	return load16(r.v.mem, r.usedAt()+2) != r.used
}

// wait waits for an interrupt.
func (r *ring) wait(timeout time.Duration) bool {
	r.v.t.Helper()
	for deadline := time.Now().Add(timeout); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(r.call), Events: unix.POLLIN}}, int(max(time.Until(deadline), 0).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		assert.NilError(r.v.t, err)
		if n == 0 {
			return false
		}
		_, err = unix.Read(r.call, make([]byte, 8))
		assert.NilError(r.v.t, err)
		return true
	}
}
