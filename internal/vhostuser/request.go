package vhostuser

import (
	"sync/atomic"
)

// inlineBuffers is how many buffers a request has room for without another allocation.
const inlineBuffers = 4

// A Request is what the guest asks of the device.
type Request struct {
	// Queue is the number of the queue, from 0 on.
	Queue int
	// In is what the guest sends, Out is where the answer goes. Both are memory of the guest, who may change it at
	// any time: what is read twice can be two things. They are valid until Complete or Park is called. Neither
	// has more than 8 MiB.
	In, Out [][]byte

	queue *queue
	mem   *memory
	head  uint16
	epoch uint64 // of the queue
	state atomic.Uint32

	// Of a parked request, while its queue is stopped. The queue's lock guards them.
	answer   []byte
	answered bool

	buffers [2][inlineBuffers][]byte
}

// States of a request.
const (
	active    = iota // its buffers may be in use
	parked           // nobody uses its buffers until Respond
	completed        // they are the guest's again
)

// Complete gives the request back to the guest; n bytes of Out, from its start on, were written to. It is called exactly once,
// unless Park is, from any goroutine. It does not block.
func (r *Request) Complete(n int) {
	if r.state.CompareAndSwap(active, completed) {
		r.queue.complete(r, n)
	}
}

// Park takes the request out of the guest's memory, for a handler that waits for something that may never come, as
// other requests' completion is waited for when the VMM stops the device. It returns a copy of In; after it
// neither In nor Out may be touched, and Respond takes the place of Complete. It does not block.
func (r *Request) Park() []byte {
	n := 0
	for _, part := range r.In {
		n += len(part)
	}
	in := make([]byte, 0, n)
	for _, part := range r.In {
		in = append(in, part...)
	}
	if r.state.CompareAndSwap(active, parked) {
		r.queue.park(r)
	}
	return in
}

// Respond copies an answer to Out, as much as fits, and gives a parked request back to the guest. If the device was stopped
// meanwhile that is done when it goes on, and if the guest has reset it nothing is done. Called from
// any goroutine; it does not block.
func (r *Request) Respond(answer []byte) {
	if r.state.CompareAndSwap(parked, completed) {
		r.queue.respond(r, answer)
	}
}

// drop ends a request that its handler did not bring to an end.
func (r *Request) drop() {
	if r.state.CompareAndSwap(active, completed) {
		r.queue.drop(r)
	}
}

// fill copies an answer to Out.
func (r *Request) fill(answer []byte) (n int) {
	for _, part := range r.Out {
		n += copy(part, answer[n:])
	}
	return n
}

// room is the size of Out.
func (r *Request) room() (n int) {
	for _, part := range r.Out {
		n += len(part)
	}
	return n
}
