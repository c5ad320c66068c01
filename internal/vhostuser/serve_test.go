package vhostuser_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/vhostuser"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	allFeatures = indirect | eventIdx | protocol | version1

	ringAt   = 0x1000
	bufferAt = 0x8000
)

// upper answers with what it gets, in upper case.
func upper(r *vhostuser.Request) {
	in := bytes.ToUpper(bytes.Join(r.In, nil))
	n := 0
	for _, part := range r.Out {
		n += copy(part, in[n:])
	}
	r.Complete(n)
}

// place writes text into the memory and returns the two descriptors of a request that asks with it.
func (v *vmm) place(at int, text string, room uint32) (in, out desc) {
	copy(v.mem[at:], text)
	return desc{addr: guestBase + uint64(at), len: uint32(len(text)), flags: 1},
		desc{addr: guestBase + uint64(at) + 0x400, len: room, flags: 2}
}

func (v *vmm) text(at int, n uint32) string { return string(v.mem[at+0x400 : at+0x400+int(n)]) }

func TestRequests(t *testing.T) {
	for name, features := range map[string]uint64{
		"event index":    allFeatures,
		"no event index": allFeatures &^ eventIdx,
	} {
		t.Run(name, func(t *testing.T) {
			v := serve(t, vhostuser.Config{Handle: upper})
			v.handshake(features)
			r := v.ring(1, 8, ringAt, features)
			for i := range 100_000 / 1000 * 3 { // the indices go around
				in, out := v.place(bufferAt, fmt.Sprintf("text %d", i), 100)
				if i%2 == 0 {
					in.next = 3
					r.describe(2, in)
					r.describe(3, out)
				} else { // the same in a table
					in.next = 1
					in.put(v.mem[0x4000:])
					out.put(v.mem[0x4010:])
					r.describe(2, desc{addr: guestBase + 0x4000, len: 32, flags: 4})
				}
				r.offer(2)
				head, n := r.result()
				assert.Equal(t, head, uint32(2))
				assert.Equal(t, v.text(bufferAt, n), fmt.Sprintf("TEXT %d", i))
			}
		})
	}
}

func TestManyRequestsAtOnce(t *testing.T) {
	for _, workers := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			v := serve(t, vhostuser.Config{Handle: upper, Workers: workers})
			v.handshake(allFeatures)
			const size = 64
			r := v.ring(0, size, ringAt, allFeatures)
			free := make([]uint16, 0, size/2)
			for i := range size / 2 {
				free = append(free, uint16(2*i))
				in, out := v.place(bufferAt+0x800*i, fmt.Sprintf("of %d", i), 100)
				in.next = uint16(2*i + 1)
				r.describe(2*i, in)
				r.describe(2*i+1, out)
			}
			for sent, got := 0, 0; got < 20_000; {
				for len(free) > 0 && sent < 20_000 {
					r.offer(free[len(free)-1])
					free = free[:len(free)-1]
					sent++
				}
				head, n := r.result()
				assert.Equal(t, v.text(bufferAt+0x800*int(head)/2, n), fmt.Sprintf("OF %d", head/2))
				free = append(free, uint16(head))
				got++
			}
		})
	}
}

// TestParallel shows that a request is taken while the handler of the one before it waits, whenever it comes.
func TestParallel(t *testing.T) {
	for name, together := range map[string]bool{"one after the other": false, "together": true} {
		t.Run(name, func(t *testing.T) {
			const n = 4
			var taken sync.WaitGroup
			taken.Add(n)
			v := serve(t, vhostuser.Config{Workers: n, Handle: func(r *vhostuser.Request) {
				taken.Done()
				taken.Wait()
				r.Complete(0)
			}})
			v.handshake(allFeatures)
			r := v.ring(1, 8, ringAt, allFeatures)
			r.describe(0, desc{addr: guestBase + bufferAt, len: 16})
			for range n {
				if together {
					continue
				}
				r.offer(0)
			}
			if together {
				for range n {
					binary.LittleEndian.PutUint16(v.mem[r.availAt()+4+2*int(r.avail):], 0)
					r.avail++
				}
				r.publish()
				r.ring()
			}
			for range n {
				r.result()
			}
		})
	}
}

func TestEnd(t *testing.T) {
	t.Run("the VMM hangs up", func(t *testing.T) {
		v := serve(t, vhostuser.Config{Handle: upper})
		v.handshake(allFeatures)
		assert.NilError(t, v.conn.Close())
		assert.NilError(t, v.ended())
	})
	t.Run("the VMM hangs up within a message", func(t *testing.T) {
		v := serve(t, vhostuser.Config{})
		v.raw(message(2, 0, u64s(0))[:15])
		assert.NilError(t, v.conn.Close())
		assert.Error(t, v.ended(), "serve vhost-user: SET_FEATURES: the end of the message is missing: unexpected EOF")
	})
	t.Run("the context ends", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		_, theirs := pair(t)
		defer theirs.Close()
		cancel(io.ErrNoProgress)
		err := vhostuser.Serve(ctx, theirs, vhostuser.Config{Queues: 1, Workers: 1, Log: slog.New(slog.DiscardHandler)})
		assert.ErrorIs(t, err, io.ErrNoProgress)
	})
}

// TestStop shows that the device is quiet when it has answered to GET_VRING_BASE, and that the guest finds what it
// left when it goes on.
func TestStop(t *testing.T) {
	requests := make(chan *vhostuser.Request, 2)
	v := serve(t, vhostuser.Config{Handle: func(r *vhostuser.Request) { requests <- r }})
	v.handshake(allFeatures)
	r := v.ring(1, 8, ringAt, allFeatures)
	in, out := v.place(bufferAt, "slow", 4)
	in.next = 1
	r.describe(0, in)
	r.describe(1, out)

	r.offer(0)
	slow := <-requests
	v.send(11, u32s(1, 0)) // GET_VRING_BASE
	answered := make(chan []byte)
	go func() { answered <- v.answer(11) }()
	select {
	case <-answered:
		t.Fatal("answered while a request has the guest's memory")
	case <-time.After(50 * time.Millisecond):
	}
	copy(slow.Out[0], "done")
	slow.Complete(4)
	assert.DeepEqual(t, <-answered, u32s(1, 1))
	_, n := r.result()
	assert.Equal(t, v.text(bufferAt, n), "done")

	// It is stopped.
	r.offer(0)
	r.ring()
	v.send(1, nil)
	v.answer(1)
	assert.Equal(t, len(requests), 0)

	r.start(1)
	again := <-requests
	again.Complete(0)
	r.result()
}

func TestParked(t *testing.T) {
	requests := make(chan *vhostuser.Request, 1)
	v := serve(t, vhostuser.Config{Handle: func(r *vhostuser.Request) { requests <- r }})
	v.handshake(allFeatures)
	r := v.ring(1, 8, ringAt, allFeatures)
	in, out := v.place(bufferAt, "lock", 4)
	in.next = 1
	r.describe(0, in)
	r.describe(1, out)
	park := func() *vhostuser.Request {
		r.offer(0)
		q := <-requests
		assert.Equal(t, string(q.Park()), "lock")
		return q
	}

	parked := park()
	parked.Respond([]byte("have it")) // more than there is room for
	_, n := r.result()
	assert.Equal(t, v.text(bufferAt, n), "have")
	parked.Respond([]byte("again"))
	parked.Complete(1)

	// While the guest is paused it is not written to, and it gets its answer when it goes on.
	for _, early := range []bool{true, false} {
		parked = park()
		copy(v.mem[bufferAt+0x400:], "none")
		base := v.ask(11, 0, u32s(1, 0))
		if early {
			parked.Respond([]byte("late"))
			assert.Equal(t, v.text(bufferAt, 4), "none")
		}
		r.start(binary.LittleEndian.Uint32(base[4:]))
		if !early {
			parked.Respond([]byte("late"))
		}
		_, n = r.result()
		assert.Equal(t, v.text(bufferAt, n), "late")
	}

	// A guest that has begun anew is never written to.
	parked = park()
	v.ask(11, 0, u32s(1, 0))
	clear(v.mem[ringAt : ringAt+0x800])
	r.avail, r.used = 0, 0
	copy(v.mem[bufferAt+0x400:], "none")
	r.start(0)
	parked.Respond([]byte("late"))
	r.describe(0, in)
	r.describe(1, out)
	r.offer(0)
	(<-requests).Complete(0)
	r.result()
	assert.Equal(t, v.text(bufferAt, 4), "none")

	// The device's end does not wait for it.
	parked = park()
	assert.NilError(t, v.conn.Close())
	assert.NilError(t, v.ended())
	parked.Respond([]byte("late"))
	assert.Equal(t, v.text(bufferAt, 4), "none")
}

func TestMemoryComesAndGoes(t *testing.T) {
	requests := make(chan *vhostuser.Request, 1)
	v := serve(t, vhostuser.Config{Handle: func(r *vhostuser.Request) { requests <- r }})
	v.handshake(allFeatures)
	r := v.ring(1, 8, ringAt, allFeatures)
	fd, mem := memfd(t, 0x3000, unix.F_SEAL_SHRINK)
	info := append(u64s(0), region(guestBase+memSize, 0x2000, 0x1000, 0x1000)...)
	v.do(37, info, fd)

	// A buffer may cross the border of two regions.
	r.describe(0, desc{addr: guestBase + memSize - 0x10, len: 0x30, flags: 2})
	r.offer(0)
	q := <-requests
	assert.Equal(t, len(q.Out), 2)
	assert.Equal(t, len(q.Out[0]), 0x10)
	assert.Equal(t, len(q.Out[1]), 0x20)

	// What a request uses stays.
	v.do(38, info)
	q.Out[1][0] = 42
	assert.Equal(t, mem[0x1000], byte(42))
	q.Complete(0x30)
	_, n := r.result()
	assert.Equal(t, n, uint32(0x30))

	// The ring is where it was also in a table that is set anew.
	v.do(5, append(u32s(1, 0), region(guestBase, memSize, userBase, 0)...), v.fd)
	r.describe(0, desc{addr: guestBase + bufferAt, len: 1, flags: 2})
	r.offer(0)
	(<-requests).Complete(1)
	r.result()

	// A ring that has gone is not used.
	v.do(5, u32s(0, 0))
	r.ring()
	v.send(1, nil)
	v.answer(1)
	assert.Equal(t, len(requests), 0)
}

// TestMappingsEnd shows that memory is unmapped when the last request is done that uses it.
func TestMappingsEnd(t *testing.T) {
	requests := make(chan *vhostuser.Request, 1)
	v := serve(t, vhostuser.Config{Handle: func(r *vhostuser.Request) { requests <- r }})
	before := mappings(t)
	v.handshake(allFeatures)
	r := v.ring(1, 8, ringAt, allFeatures)
	r.describe(0, desc{addr: guestBase + bufferAt, len: 1})
	r.offer(0)
	q := <-requests
	v.do(5, u32s(0, 0))
	assert.Equal(t, mappings(t), before+1)
	q.Complete(0)
	assert.Equal(t, mappings(t), before)
}

func mappings(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/maps")
	assert.NilError(t, err)
	return strings.Count(string(data), "/memfd:guest")
}

func TestReset(t *testing.T) {
	for kind, name := range map[uint32]string{4: "owner", 34: "device"} {
		t.Run(name, func(t *testing.T) {
			v := serve(t, vhostuser.Config{Handle: upper})
			v.handshake(allFeatures)
			v.ring(1, 8, ringAt, allFeatures)
			v.do(kind, nil)
			clear(v.mem[ringAt : ringAt+0x800])
			r := v.ring(1, 8, ringAt, allFeatures)
			in, out := v.place(bufferAt, "text", 4)
			in.next = 1
			r.describe(0, in)
			r.describe(1, out)
			r.offer(0)
			_, n := r.result()
			assert.Equal(t, v.text(bufferAt, n), "TEXT")
		})
	}
}

// TestBrokenQueue gives the device what no driver may, and shows that only that queue is stopped for it, and for no
// longer than until it is started again.
func TestBrokenQueue(t *testing.T) {
	const there = guestBase + bufferAt
	for name, test := range map[string]struct {
		table []desc // of descriptors, from 0 on
		other []desc // of an indirect table
		avail func(r *ring)
		want  string
	}{
		"loop":                 {table: []desc{{there, 1, 1, 1}, {there, 1, 1, 0}}, want: "a loop"},
		"next beyond":          {table: []desc{{there, 1, 1, 8}}, want: "descriptor 8 of 8"},
		"head beyond":          {avail: func(r *ring) { r.offer(8) }, want: "descriptor 8 of 8"},
		"too many":             {avail: func(r *ring) { r.avail += 9; r.publish(); r.ring() }, want: "9 requests are available in a queue of 8"},
		"back":                 {avail: func(r *ring) { r.avail--; r.publish(); r.ring() }, want: "65535 requests are available in a queue of 8"},
		"no memory":            {table: []desc{{guestBase + memSize, 1, 0, 0}}, want: "where there is no memory"},
		"before memory":        {table: []desc{{guestBase - 1, 2, 0, 0}}, want: "where there is no memory"},
		"end of memory":        {table: []desc{{guestBase + memSize - 1, 2, 0, 0}}, want: "where there is no memory"},
		"end of addresses":     {table: []desc{{1<<64 - 1, 1<<32 - 1, 0, 0}}, want: "more than 8388608 bytes"},
		"end of all addresses": {table: []desc{{1<<64 - 1, 2, 0, 0}}, want: "where there is no memory"},
		"too large":            {table: []desc{{there, 8<<20 + 1, 0, 0}}, want: "more than 8388608 bytes"},
		"write before read":    {table: []desc{{there, 1, 3, 1}, {there, 1, 0, 0}}, want: "behind one to write to"},
		"empty table":          {table: []desc{{there, 0, 4, 0}}, want: "an indirect table of 0 bytes"},
		"odd table":            {table: []desc{{there, 17, 4, 0}}, want: "an indirect table of 17 bytes"},
		"large table":          {table: []desc{{there, 16 * 1025, 4, 0}}, want: "an indirect table of 16400 bytes"},
		"table elsewhere":      {table: []desc{{1, 16, 4, 0}}, want: "where there is no memory"},
		"table and next":       {table: []desc{{0x1000 + there, 16, 5, 1}}, want: "before others"},
		"table in table":       {table: []desc{{0x1000 + there, 16, 4, 0}}, other: []desc{{there, 16, 4, 0}}, want: "in an indirect table"},
		"next beyond table":    {table: []desc{{0x1000 + there, 16, 4, 0}}, other: []desc{{there, 1, 1, 1}}, want: "descriptor 1 of 1"},
		"loop in table":        {table: []desc{{0x1000 + there, 16, 4, 0}}, other: []desc{{there, 1, 1, 0}}, want: "a loop"},
	} {
		t.Run(name, func(t *testing.T) {
			log := newLog()
			v := serve(t, vhostuser.Config{Handle: upper, Log: slog.New(slog.NewTextHandler(log, nil))})
			v.handshake(allFeatures)
			healthy := v.ring(0, 8, 0x3000, allFeatures)
			r := v.ring(1, 8, ringAt, allFeatures)
			for i, d := range test.table {
				r.describe(i, d)
			}
			for i, d := range test.other {
				d.put(v.mem[bufferAt+0x1000+16*i:])
			}
			if test.avail != nil {
				test.avail(r)
			} else {
				r.offer(0)
			}
			assert.Assert(t, strings.Contains(log.wait(t, "the guest broke a queue"), test.want), "%s", log)

			ask := func(r *ring) {
				t.Helper()
				in, out := v.place(bufferAt, "text", 4)
				in.next = 1
				r.describe(0, in)
				r.describe(1, out)
				r.offer(0)
				_, n := r.result()
				assert.Equal(t, v.text(bufferAt, n), "TEXT")
			}
			ask(healthy)

			v.ask(11, 0, u32s(1, 0))
			clear(v.mem[ringAt : ringAt+0x800])
			r.avail = 0
			r.start(0)
			ask(r)
		})
	}
}

func TestHandlerPanics(t *testing.T) {
	log := newLog()
	v := serve(t, vhostuser.Config{
		Handle: func(*vhostuser.Request) { panic("oh no") },
		Log:    slog.New(slog.NewTextHandler(log, nil)),
	})
	v.handshake(allFeatures)
	r := v.ring(1, 8, ringAt, allFeatures)
	r.describe(0, desc{addr: guestBase + bufferAt, len: 1})
	r.offer(0)
	assert.Assert(t, strings.Contains(log.wait(t, "the guest broke a queue"), "oh no"))
	assert.DeepEqual(t, v.ask(11, 0, u32s(1, 0)), u32s(1, 1))
}

func TestBadMessages(t *testing.T) {
	pipe := func(t *testing.T) int {
		t.Helper()
		r, w, err := os.Pipe()
		assert.NilError(t, err)
		t.Cleanup(func() { _, _ = r.Close(), w.Close() })
		return int(w.Fd())
	}
	one := func(r []byte) []byte { return append(u64s(0), r...) }
	good := one(region(0, 0x1000, 0, 0))
	for name, test := range map[string]struct {
		send func(t *testing.T, v *vmm)
		want string
	}{
		"unknown":        {func(_ *testing.T, v *vmm) { v.send(99, nil) }, "message of kind 99"},
		"not offered":    {func(_ *testing.T, v *vmm) { v.send(6, u64s(0, 0)) }, "message of kind 6"},
		"version":        {func(_ *testing.T, v *vmm) { v.raw(u32s(1, 2, 0)) }, "GET_FEATURES: version 2"},
		"answer":         {func(_ *testing.T, v *vmm) { v.raw(u32s(1, 5, 0)) }, "GET_FEATURES: is an answer"},
		"short":          {func(_ *testing.T, v *vmm) { v.send(2, u32s(1)) }, "SET_FEATURES: payload of 4 bytes instead of 8"},
		"long":           {func(_ *testing.T, v *vmm) { v.raw(u32s(1, 1, 1<<31)) }, "GET_FEATURES: payload of 2147483648 bytes"},
		"features":       {func(_ *testing.T, v *vmm) { v.send(2, u64s(1<<34)) }, "SET_FEATURES: features 0x400000000: not offered"},
		"protocol":       {func(_ *testing.T, v *vmm) { v.send(16, u64s(1<<9)) }, "SET_PROTOCOL_FEATURES: features 0x200: not offered"},
		"stray fd":       {func(t *testing.T, v *vmm) { v.send(3, nil, event(t)) }, "SET_OWNER: 1 descriptors"},
		"many fds":       {func(t *testing.T, v *vmm) { v.send(5, u32s(0, 0), many(event(t), 40)...) }, "more than 8 descriptors"},
		"queue":          {func(_ *testing.T, v *vmm) { v.send(8, u32s(2, 8)) }, "SET_VRING_NUM: queue 2 of 2"},
		"large queue":    {func(_ *testing.T, v *vmm) { v.send(11, u32s(1<<31, 8)) }, "GET_VRING_BASE: queue 2147483648 of 2"},
		"size 0":         {func(_ *testing.T, v *vmm) { v.send(8, u32s(0, 0)) }, "SET_VRING_NUM: size 0"},
		"size 7":         {func(_ *testing.T, v *vmm) { v.send(8, u32s(0, 7)) }, "SET_VRING_NUM: size 7"},
		"size 2048":      {func(_ *testing.T, v *vmm) { v.send(8, u32s(0, 2048)) }, "SET_VRING_NUM: size 2048"},
		"base":           {func(_ *testing.T, v *vmm) { v.send(10, u32s(0, 1<<16)) }, "SET_VRING_BASE: index 65536"},
		"enable":         {func(_ *testing.T, v *vmm) { v.send(18, u32s(0, 2)) }, "SET_VRING_ENABLE: state 2"},
		"logged ring":    {func(_ *testing.T, v *vmm) { v.send(9, append(u32s(0, 1), u64s(0, 0, 0, 0)...)) }, "SET_VRING_ADDR: flags 0x1"},
		"no ring":        {func(t *testing.T, v *vmm) { v.send(12, u64s(0), event(t)) }, "SET_VRING_KICK: the address is not set"},
		"ring elsewhere": {func(t *testing.T, v *vmm) { v.start(t, address{0x10, 0x10, 0x10}) }, "SET_VRING_KICK: descriptors at 0x10"},
		"ring at the end": {
			func(t *testing.T, v *vmm) { v.start(t, address{userBase, userBase + memSize - 4, userBase}) },
			"SET_VRING_KICK: used ring at 0x7f00000ffffc",
		},
		"odd ring":     {func(t *testing.T, v *vmm) { v.start(t, address{userBase + 8, userBase, userBase}) }, "descriptors at 0x7f0000000008"},
		"odd used":     {func(t *testing.T, v *vmm) { v.start(t, address{userBase, userBase + 2, userBase}) }, "used ring at"},
		"odd avail":    {func(t *testing.T, v *vmm) { v.start(t, address{userBase, userBase, userBase + 1}) }, "available ring at"},
		"no kick":      {func(_ *testing.T, v *vmm) { v.send(12, u64s(0)) }, "SET_VRING_KICK: a descriptor is missing"},
		"poll":         {func(_ *testing.T, v *vmm) { v.send(12, u64s(1<<8)) }, "SET_VRING_KICK: the queue would have to be polled"},
		"event bits":   {func(t *testing.T, v *vmm) { v.send(13, u64s(1<<9), event(t)) }, "SET_VRING_CALL: payload 0x200"},
		"two truths":   {func(t *testing.T, v *vmm) { v.send(13, u64s(1<<8), event(t)) }, "SET_VRING_CALL: a descriptor is missing, or"},
		"pipe to call": {func(t *testing.T, v *vmm) { v.send(13, u64s(0), pipe(t)) }, "SET_VRING_CALL: not an eventfd"},
		"no region":    {func(_ *testing.T, v *vmm) { v.send(37, good) }, "ADD_MEM_REG: the descriptor is missing"},
		"empty region": {func(_ *testing.T, v *vmm) { v.send(37, one(region(0, 0, 0, 0)), v.fd) }, "ADD_MEM_REG: region guest 0x0 size 0x0"},
		"wraps guest":  {func(_ *testing.T, v *vmm) { v.send(37, one(region(1<<64-0x1000, 0x2000, 0, 0)), v.fd) }, "beyond all addresses"},
		"wraps user":   {func(_ *testing.T, v *vmm) { v.send(37, one(region(0, 0x2000, 1<<64-0x1000, 0)), v.fd) }, "beyond all addresses"},
		"wraps offset": {func(_ *testing.T, v *vmm) { v.send(37, one(region(0, 0x2000, 0, 1<<64-0x1000)), v.fd) }, "beyond all addresses"},
		"beyond file":  {func(_ *testing.T, v *vmm) { v.send(37, one(region(0, memSize, 0, 1)), v.fd) }, "its file has 0x100000 bytes"},
		"huge":         {func(_ *testing.T, v *vmm) { v.send(37, one(region(0, 1<<62, 0, 1<<62)), v.fd) }, "its file has 0x100000 bytes"},
		"can shrink": {func(t *testing.T, v *vmm) {
			fd, _ := memfd(t, 0x1000, unix.F_SEAL_GROW)
			v.send(37, good, fd)
		}, "its file can be truncated"},
		"no file": {func(t *testing.T, v *vmm) { v.send(37, good, pipe(t)) }, "its file can be truncated"},
		"same twice": {func(_ *testing.T, v *vmm) {
			v.send(37, good, v.fd)
			v.send(37, good, v.fd)
		}, "ADD_MEM_REG: regions overlap"},
		"overlap in the VMM": {func(_ *testing.T, v *vmm) {
			v.send(37, good, v.fd)
			v.send(37, one(region(0x1000, 0x1000, 0xfff, 0)), v.fd)
		}, "ADD_MEM_REG: regions overlap"},
		"too many regions": {func(_ *testing.T, v *vmm) {
			for i := range uint64(65) {
				v.send(37, one(region(i<<12, 0x1000, i<<12, 0)), v.fd)
			}
		}, "ADD_MEM_REG: 65 regions"},
		"not there":      {func(_ *testing.T, v *vmm) { v.send(38, good) }, "REM_MEM_REG: region guest 0x0 size 0x1000 user 0x0 offset 0x0: there is none"},
		"table":          {func(_ *testing.T, v *vmm) { v.send(5, u32s(1<<31, 0)) }, "SET_MEM_TABLE: 2147483648 regions in a payload of 8 bytes"},
		"no table":       {func(_ *testing.T, v *vmm) { v.send(5, nil) }, "SET_MEM_TABLE: payload of 0 bytes"},
		"table, no fds":  {func(_ *testing.T, v *vmm) { v.send(5, append(u32s(1, 0), region(0, 1, 0, 0)...)) }, "0 descriptors for 1 regions"},
		"table, bad one": {func(t *testing.T, v *vmm) { v.send(5, append(u32s(2, 0), region(0, 1, 0, 0)...), v.fd) }, "SET_MEM_TABLE: 2 regions in"},
	} {
		t.Run(name, func(t *testing.T) {
			v := serve(t, vhostuser.Config{Handle: upper})
			test.send(t, v)
			assert.ErrorContains(t, v.ended(), test.want)
		})
	}

	t.Run("is told", func(t *testing.T) {
		v := serve(t, vhostuser.Config{})
		v.send(16, u64s(1<<3))
		assert.DeepEqual(t, v.ask(8, needReply, u32s(0, 7)), u64s(1))
		assert.ErrorContains(t, v.ended(), "SET_VRING_NUM: size 7")
	})
	t.Run("running", func(t *testing.T) {
		for _, kind := range []uint32{8, 10} {
			v := serve(t, vhostuser.Config{Handle: upper})
			v.handshake(allFeatures)
			v.ring(0, 8, ringAt, allFeatures)
			v.send(kind, u32s(0, 8))
			assert.ErrorContains(t, v.ended(), "the queue runs")
		}
	})
}

// TestDescriptorsEnd shows that no descriptor is left of a session, whatever end it takes.
func TestDescriptorsEnd(t *testing.T) {
	for name, end := range map[string]func(v *vmm){
		"well": func(v *vmm) { _ = v.conn.Close() },
		"bad":  func(v *vmm) { v.send(99, nil, v.fd) },
		"many": func(v *vmm) { v.send(5, u32s(0, 0), many(v.fd, 40)...) },
		"kick": func(v *vmm) { v.send(12, u64s(5), v.fd) },
		"call": func(v *vmm) { v.send(13, u64s(0), v.fd) },
	} {
		t.Run(name, func(t *testing.T) {
			v := serve(t, vhostuser.Config{Handle: upper})
			v.ask(1, 0, nil) // it has begun
			before := openFiles(t)
			v.handshake(allFeatures)
			v.ring(0, 8, ringAt, allFeatures)
			v.do(13, u64s(0), event(t))
			v.do(14, u64s(0), event(t))
			end(v)
			_ = v.ended()
			_ = v.conn.Close()
			const device, conn, events = 4, 1, 4 // an epoll, an eventfd, one for each queue
			assert.Equal(t, openFiles(t), before-device-conn+events)
		})
	}
}

func many(fd, n int) (fds []int) {
	for range n {
		fds = append(fds, fd)
	}
	return fds
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	return len(entries)
}

type address struct{ desc, used, avail uint64 }

// start starts queue 0 of size 8 at an address.
func (v *vmm) start(t *testing.T, a address) {
	t.Helper()
	v.handshake(allFeatures)
	v.do(8, u32s(0, 8))
	v.do(9, append(u32s(0, 0), u64s(a.desc, a.used, a.avail, 0)...))
	v.send(12, u64s(0), event(t))
}

// A logged is a log that can be waited for.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
	more chan struct{}
}

func newLog() *logged { return &logged{more: make(chan struct{}, 100)} }

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.more <- struct{}{}
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logged) wait(t *testing.T, want string) string {
	t.Helper()
	for timeout := time.After(patience); ; {
		if text := l.String(); strings.Contains(text, want) {
			return text
		}
		select {
		case <-l.more:
		case <-timeout:
			t.Fatalf("not logged: %s", want)
		}
	}
}
