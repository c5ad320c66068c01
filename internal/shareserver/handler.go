package shareserver

import (
	"encoding/binary"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"

	"runv/internal/sharefs"
	"runv/internal/vhostuser"
)

// What is looked at here of FUSE's messages (linux/fuse.h): sizes of headers, and kinds of requests.
const (
	inHeader  = 40
	writeHead = 80 // with struct fuse_write_in
	outHeader = 16

	opWrite    = 16
	opSetlkw   = 33
	smallInput = 4096 // bytes of nearly all requests but writes
)

// A handler answers the guest's requests. Its methods may be called concurrently.
type handler struct {
	protocol *fuse.ProtocolServer
	inputs   sync.Pool // of *[]byte
}

func newHandler(fs *sharefs.FS) *handler {
	return &handler{
		protocol: fuse.NewProtocolServer(fs, sharefs.Options()),
		inputs:   sync.Pool{New: func() any { b := make([]byte, 0, smallInput); return &b }},
	}
}

// handle answers a request before it returns, but for one that waits for a lock: that is answered when it has it.
func (h *handler) handle(r *vhostuser.Request) {
	switch head := peek(r.In); head.opcode {
	case opSetlkw:
		in := r.Park()
		go func() {
			var out [outHeader]byte // such an answer has nothing else
			n := h.answer([][]byte{in}, [][]byte{out[:]}, head.unique)
			r.Respond(out[:n])
		}()
	case opWrite:
		// The data goes to the file straight from the guest's memory.
		r.Complete(h.answer(ownHead(r.In), r.Out, head.unique))
	default:
		// A copy, so that the guest cannot change a request that is being read.
		buf := h.inputs.Get().(*[]byte) //nolint:forcetypeassert // the pool holds nothing else
		in := (*buf)[:0]
		for _, part := range r.In {
			in = append(in, part...)
		}
		n := h.answer([][]byte{in}, r.Out, head.unique)
		if cap(in) <= smallInput {
			*buf = in[:0]
		}
		h.inputs.Put(buf)
		r.Complete(n)
	}
}

// answer handles a request and returns how many bytes of out are the answer. A request that is none, or that leaves no room for
// its answer, gets an error, for without it the guest would take what was there before for the answer.
func (h *handler) answer(in, out [][]byte, unique uint64) int {
	n, code := h.protocol.HandleRequest(in, out)
	if code == fuse.OK {
		return n
	}
	var head [outHeader]byte
	binary.LittleEndian.PutUint32(head[:], outHeader)
	binary.LittleEndian.PutUint32(head[4:], uint32(-int32(code)))
	binary.LittleEndian.PutUint64(head[8:], unique)
	n = 0
	for _, part := range out {
		n += copy(part, head[n:])
	}
	return n
}

// ownHead is a request to write whose head is a copy, so that the guest cannot make another request of it.
func ownHead(in [][]byte) [][]byte {
	head := make([]byte, 0, writeHead)
	parts := make([][]byte, 1, len(in)+1)
	for _, part := range in {
		n := min(len(part), writeHead-len(head))
		head = append(head, part[:n]...)
		if n < len(part) {
			parts = append(parts, part[n:])
		}
	}
	parts[0] = head
	return parts
}

type requestHead struct {
	opcode uint32
	unique uint64
}

// peek reads the beginning of a request, zero where it is cut off.
func peek(in [][]byte) requestHead {
	var b [inHeader]byte
	n := 0
	for _, part := range in {
		n += copy(b[n:], part)
	}
	return requestHead{opcode: binary.LittleEndian.Uint32(b[4:]), unique: binary.LittleEndian.Uint64(b[8:])}
}
