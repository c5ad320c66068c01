package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// A queue is one virtqueue. The session sets it up and stops it, workers take requests from it, and whoever
// handles these completes them.
//
// A queue runs while the VMM has given it an eventfd for kicks and enabled it, unless the guest broke it.
type queue struct {
	index int
	pool  *pool
	log   *slog.Logger

	mu sync.Mutex
	// quiet is told of when busy becomes 0.
	quiet *sync.Cond

	// What the VMM has set.
	size     uint16
	address  address
	placed   bool // address was set
	enabled  bool
	eventIdx bool
	kick     int // an eventfd; -1: the queue is stopped
	call     int // an eventfd or -1

	ring   *ring // nil: not mapped
	broken bool
	next   uint16 // index of the next request in the available ring
	done   uint16 // index of the next element of the used ring
	epoch  uint64 // requests of another one are not the guest's any more
	busy   int    // requests whose buffers may be in use
	parked map[*Request]struct{}
	walker walker
}

func newQueue(index int, p *pool, log *slog.Logger) *queue {
	q := &queue{
		index: index, pool: p, log: log.With("queue", index),
		kick: -1, call: -1, parked: make(map[*Request]struct{}),
	}
	q.quiet = sync.NewCond(&q.mu)
	return q
}

// runs tells whether requests may be taken. mu is held.
func (q *queue) runs() bool { return q.kick >= 0 && q.enabled && q.ring != nil && !q.broken }

// fail stops the queue for something impossible in it. mu is held.
func (q *queue) fail(err error) {
	if q.broken {
		return
	}
	q.broken = true
	q.log.Warn("the guest broke a queue, which is stopped until the device is reset", "error", err)
}

// take takes the next request. It returns nil when there is none; the worker that called counts as idle from then on.
func (q *queue) take() *Request {
	q.mu.Lock()
	defer q.mu.Unlock()
	r, left, err := q.pop()
	if err != nil {
		q.fail(err)
	}
	if r == nil {
		// Counted while mu is held: whoever makes or finds a request after this wakes somebody.
		q.pool.idle.Add(1)
		return nil
	}
	if left && q.pool.idle.Load() > 0 {
		q.pool.wake(q.index)
	}
	return r
}

// pop returns the next request, and whether there are more.
func (q *queue) pop() (r *Request, left bool, err error) {
	if !q.runs() {
		return nil, false, nil
	}
	n, err := q.ring.available(q.next)
	if err != nil || n == 0 {
		// The guest was asked for a kick when the last request was taken, or when the queue began.
		return nil, false, err
	}
	head := q.ring.head(q.next)
	r = &Request{Queue: q.index, queue: q, head: head, epoch: q.epoch}
	if err := q.walker.walk(q.ring, head); err != nil {
		return nil, false, fmt.Errorf("request at descriptor %d: %w", head, err)
	}
	r.In = append(r.buffers[0][:0], q.walker.in...)
	r.Out = append(r.buffers[1][:0], q.walker.out...)
	q.next++
	if n == 1 {
		// This worker may be busy for long. Another one waits for the kick.
		q.ring.wantKick(q.next)
		if n, err = q.ring.available(q.next); err != nil {
			return nil, false, err
		}
		left = n > 0
	} else {
		left = true
	}
	r.mem = q.ring.mem.retain()
	q.busy++
	return r, left, nil
}

func (q *queue) complete(r *Request, n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	defer q.leave(r)
	q.push(r, min(max(n, 0), r.room()))
}

func (q *queue) drop(r *Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.leave(r)
}

// leave counts a request that was active. mu is held.
func (q *queue) leave(r *Request) {
	r.mem.release()
	if q.busy--; q.busy == 0 {
		q.quiet.Broadcast()
	}
}

func (q *queue) park(r *Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r.epoch == q.epoch {
		q.parked[r] = struct{}{}
		r.mem.retain() // while it is parked
	}
	q.leave(r)
}

func (q *queue) respond(r *Request, answer []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r.epoch != q.epoch {
		return
	}
	r.answer, r.answered = answer, true
	if q.kick < 0 { // until it is known whether the guest goes on
		return
	}
	q.finish(r)
}

// finish gives back a parked request that has its answer. mu is held.
func (q *queue) finish(r *Request) {
	delete(q.parked, r)
	q.push(r, r.fill(r.answer))
	r.mem.release()
}

// forget drops the parked requests, for the guest has. mu is held.
func (q *queue) forget() {
	q.epoch++
	for r := range q.parked {
		r.mem.release()
	}
	clear(q.parked)
}

// push writes to the used ring. mu is held.
func (q *queue) push(r *Request, written int) {
	if r.epoch != q.epoch || q.ring == nil || q.broken {
		return
	}
	interrupt := q.ring.push(q.done, r.head, uint32(written))
	q.done++
	if interrupt {
		q.interrupt()
	}
}

// interrupt tells the guest that requests are done. mu is held.
func (q *queue) interrupt() {
	if q.call >= 0 {
		signal(q.call)
	}
}

// remap finds the ring in a memory, which stays the caller's. mu is held.
func (q *queue) remap(mem *memory) error {
	ring, err := mapRing(mem, q.size, q.address)
	if err != nil {
		return err
	}
	ring.eventIdx = q.eventIdx
	q.unmap()
	ring.mem.retain()
	q.ring = ring
	return nil
}

// unmap lets go of the ring. mu is held.
func (q *queue) unmap() {
	if q.ring != nil {
		q.ring.mem.release()
		q.ring = nil
	}
}

// setMemory tells the queue that the guest's memory has changed. A ring that is not in it any more is not used any more.
func (q *queue) setMemory(mem *memory) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ring == nil {
		return
	}
	if err := q.remap(mem); err != nil {
		q.unmap()
	}
}

func (q *queue) setEventIdx(on bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.eventIdx = on
}

func (q *queue) setSize(n uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n == 0 || n > maxQueueSize || n&(n-1) != 0 {
		return fmt.Errorf("size %d: not a power of two up to %d", n, maxQueueSize)
	}
	if q.kick >= 0 {
		return errRuns
	}
	q.size = uint16(n)
	return nil
}

func (q *queue) setBase(n uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n >= 1<<16 {
		return fmt.Errorf("index %d", n)
	}
	if q.kick >= 0 {
		return errRuns
	}
	if q.next != uint16(n) {
		q.forget()
	}
	q.next = uint16(n)
	return nil
}

// setAddress places the ring. The VMM may do so while the queue runs, in other words for the same place.
func (q *queue) setAddress(mem *memory, a address) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.address, q.placed = a, true
	if q.kick >= 0 {
		return q.remap(mem)
	}
	return nil
}

// start makes the queue run, as soon as it is enabled. The eventfd is the queue's from then on, also after an error.
func (q *queue) start(mem *memory, kick int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.begin(mem); err != nil {
		_ = unix.Close(kick)
		return err
	}
	q.closeKick()
	if err := q.pool.watch(q.index, kick); err != nil {
		_ = unix.Close(kick)
		return err
	}
	q.kick = kick
	for _, r := range slices.Collect(maps.Keys(q.parked)) {
		if r.answered {
			q.finish(r)
		}
	}
	q.pool.wake(q.index) // for what is available already
	return nil
}

// begin maps the ring and looks where it stands. mu is held.
func (q *queue) begin(mem *memory) error {
	if q.kick >= 0 { // another eventfd for the same ring
		return nil
	}
	if !q.placed {
		return errors.New("the address is not set")
	}
	if err := q.remap(mem); err != nil {
		return err
	}
	q.broken = false
	// A guest that was only paused goes on where it was. If requests are parked the indices differ by
	// their number, and those of a new ring are equal.
	if used := q.ring.usedIndex(); used != q.done {
		q.forget()
		q.done = used
	}
	q.ring.wantKick(q.next)
	return nil
}

// closeKick lets go of the eventfd for kicks. mu is held.
func (q *queue) closeKick() {
	if q.kick >= 0 {
		q.pool.unwatch(q.kick)
		_ = unix.Close(q.kick)
		q.kick = -1
	}
}

// stop stops the queue and returns the index of the next request when nobody uses the guest's memory any more for those that
// were taken, but for parked ones. It waits for their handlers until ctx ends.
func (q *queue) stop(ctx context.Context) (uint16, error) {
	wake := context.AfterFunc(ctx, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.quiet.Broadcast()
	})
	defer wake()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closeKick()
	for q.busy > 0 {
		if ctx.Err() != nil {
			return 0, fmt.Errorf("wait for %d requests: %w", q.busy, context.Cause(ctx))
		}
		q.quiet.Wait()
	}
	q.unmap()
	return q.next, nil
}

func (q *queue) setCall(fd int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.call >= 0 {
		_ = unix.Close(q.call)
	}
	q.call = fd
	if q.runs() { // the guest may have missed one by the former eventfd
		q.interrupt()
	}
}

func (q *queue) setEnabled(on bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.enabled = on
	if q.runs() {
		q.pool.wake(q.index)
	}
}

// close lets go of all that the queue has. It is called when no worker is left.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closeKick()
	q.forget()
	q.unmap()
	if q.call >= 0 {
		_ = unix.Close(q.call)
		q.call = -1
	}
}

var errRuns = errors.New("the queue runs")

// reset forgets what the VMM has set, of a stopped queue.
func (q *queue) reset() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forget()
	q.size, q.placed, q.enabled, q.next, q.done = 0, false, false, 0, 0
}
