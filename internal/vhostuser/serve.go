package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// answerTimeout bounds how long the VMM may take to read an answer of a few bytes.
const answerTimeout = 10 * time.Second

// Config describes a device.
type Config struct {
	// Queues is the number of queues, at least 1.
	Queues int
	// Workers is the number of threads that take requests, at least 1.
	Workers int
	// Handle is called with each request, on a worker's thread. It may complete the request at once, or later from
	// another goroutine. It must not wait for what may never happen: Request.Park is for that. A panic stops the queue.
	Handle func(*Request)
	Log    *slog.Logger
}

// Serve is the device of a connected VMM until that hangs up, which gives nil, until the VMM breaks
// the protocol, which gives an error that names its message, or until ctx ends, which gives ctx's error. When it returns the workers
// have ended, so it waits for the requests in Handle. Those that were not completed then, or are parked, never reach the
// guest. The connection stays the caller's, and is of no use any more.
func Serve(ctx context.Context, conn *net.UnixConn, cfg Config) (err error) {
	p, err := newPool(cfg.Queues)
	if err != nil {
		return fmt.Errorf("serve vhost-user: %w", err)
	}
	defer p.close()
	s := &session{conn: conn, cfg: cfg, pool: p}
	if s.memory, err = newMemory(nil); err != nil {
		return fmt.Errorf("serve vhost-user: %w", err)
	}
	for i := range cfg.Queues {
		p.queues = append(p.queues, newQueue(i, p, cfg.Log))
	}
	p.start(cfg)
	defer s.close()
	interrupt := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer interrupt()
	err = s.run(ctx)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, errHungUp):
		return nil
	}
	return fmt.Errorf("serve vhost-user: %w", err)
}

var errHungUp = errors.New("the VMM has hung up")

// A session is what one VMM has set. One goroutine owns it.
type session struct {
	conn     *net.UnixConn
	cfg      Config
	pool     *pool
	memory   *memory
	protocol uint64 // features that were agreed upon
	buf      [headerSize + maxPayload]byte
}

func (s *session) close() {
	s.pool.stop()
	for _, q := range s.pool.queues {
		q.close()
	}
	s.memory.release()
}

// run takes messages until there is an error.
func (s *session) run(ctx context.Context) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // see mapRegion
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	for {
		h, payload, fds, err := s.receive()
		if err != nil {
			return err
		}
		err = s.handle(ctx, h, payload, &fds)
		fds.close()
		if err != nil {
			return fmt.Errorf("%s: %w", h.name, err)
		}
	}
}

// descriptors came with a message. They are no os.File, which would change the flags of open files that are the
// VMM's, too.
type descriptors []int

func (d *descriptors) close() {
	for _, fd := range *d {
		_ = unix.Close(fd)
	}
	*d = nil
}

// receive reads a message. The caller closes the descriptors.
func (s *session) receive() (h header, payload []byte, fds descriptors, err error) {
	defer func() {
		if err != nil {
			fds.close()
		}
	}()
	head, oob := s.buf[:headerSize], make([]byte, unix.CmsgSpace(4*maxFDs))
	n, oobn, flags, _, err := s.conn.ReadMsgUnix(head, oob)
	if n == 0 || errors.Is(err, unix.ECONNRESET) {
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			return h, nil, nil, errHungUp
		}
		return h, nil, nil, err
	}
	if err := fds.parse(oob[:oobn]); err != nil {
		return h, nil, fds, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return h, nil, fds, fmt.Errorf("a message with more than %d descriptors", maxFDs)
	}
	if _, err := io.ReadFull(s.conn, head[n:]); err != nil {
		return h, nil, fds, fmt.Errorf("the end of a message is missing: %w", err)
	}
	if h, err = decodeHeader(head); err != nil {
		return h, nil, fds, err
	}
	if len(fds) > h.fds {
		return h, nil, fds, fmt.Errorf("%s: %d descriptors, at most %d belong to it", h.name, len(fds), h.fds)
	}
	payload = s.buf[headerSize : headerSize+h.payload]
	if _, err := io.ReadFull(s.conn, payload); err != nil {
		return h, nil, fds, fmt.Errorf("%s: the end of the message is missing: %w", h.name, err)
	}
	return h, payload, fds, nil
}

// parse appends the descriptors of a control message, also before an error.
func (d *descriptors) parse(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return err
		}
		*d = append(*d, fds...)
	}
	return nil
}

// handle does what a message says and answers it.
func (s *session) handle(ctx context.Context, h header, payload []byte, fds *descriptors) error {
	answer, err := s.apply(ctx, h, payload, fds)
	if !h.answers {
		if !h.needReply || s.protocol&protocolReplyAck == 0 {
			return err
		}
		answer = u64(0)
		if err != nil {
			answer = u64(1)
		}
	} else if err != nil {
		return err
	}
	return errors.Join(err, s.send(h.kind, answer))
}

func (s *session) send(kind uint32, payload []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	_, err := s.conn.Write(appendAnswer(nil, kind, payload))
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return errHungUp
	}
	return err
}

func u64(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

// apply does what a message says, and returns the payload of its answer if it has one.
func (s *session) apply(ctx context.Context, h header, payload []byte, fds *descriptors) ([]byte, error) {
	switch h.kind {
	case getFeatures:
		return u64(offeredFeatures), nil
	case setFeatures:
		return nil, s.setFeatures(binary.LittleEndian.Uint64(payload))
	case getProtocolFeatures:
		return u64(offeredProtocol), nil
	case setProtocolFeatures:
		features := binary.LittleEndian.Uint64(payload)
		if features&^uint64(offeredProtocol) != 0 {
			return nil, fmt.Errorf("features %#x: not offered", features&^uint64(offeredProtocol))
		}
		s.protocol = features
		return nil, nil
	case getQueueNum:
		return u64(uint64(s.cfg.Queues)), nil
	case getMaxMemSlots:
		return u64(maxSlots), nil
	case setOwner:
		return nil, nil
	case resetOwner, resetDevice:
		return nil, s.reset(ctx)
	case setMemTable, addMemReg, remMemReg:
		return nil, s.applyMemory(h.kind, payload, fds)
	case setVringKick, setVringCall, setVringErr:
		return nil, s.applyEvent(h.kind, binary.LittleEndian.Uint64(payload), fds)
	case setVringAddr:
		index, a, err := decodeAddress(payload)
		if err != nil {
			return nil, err
		}
		q, err := s.queue(index)
		if err != nil {
			return nil, err
		}
		return nil, q.setAddress(s.memory, a)
	default:
		return s.applyState(ctx, h.kind, decodeState(payload))
	}
}

func (s *session) queue(index uint32) (*queue, error) {
	if int64(index) >= int64(len(s.pool.queues)) {
		return nil, fmt.Errorf("queue %d of %d", index, len(s.pool.queues))
	}
	return s.pool.queues[index], nil
}

// applyState does what a message with a queue's number and one value says.
func (s *session) applyState(ctx context.Context, kind uint32, st state) ([]byte, error) {
	q, err := s.queue(st.index)
	if err != nil {
		return nil, err
	}
	switch kind {
	case setVringNum:
		return nil, q.setSize(st.num)
	case setVringBase:
		return nil, q.setBase(st.num)
	case setVringEnable:
		if st.num > 1 {
			return nil, fmt.Errorf("state %d", st.num)
		}
		q.setEnabled(st.num == 1)
		return nil, nil
	default: // getVringBase
		base, err := q.stop(ctx)
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, st.index), uint32(base)), err
	}
}

func (s *session) setFeatures(features uint64) error {
	if features&^uint64(offeredFeatures) != 0 {
		return fmt.Errorf("features %#x: not offered", features&^uint64(offeredFeatures))
	}
	for _, q := range s.pool.queues {
		q.setEventIdx(features&featureEventIdx != 0)
		if features&featureProtocol == 0 {
			q.setEnabled(true) // the VMM has no message for it then
		}
	}
	return nil
}

// reset brings the device to its first state, but for its memory and what was agreed upon.
func (s *session) reset(ctx context.Context) error {
	for _, q := range s.pool.queues {
		if _, err := q.stop(ctx); err != nil {
			return err
		}
		q.reset()
	}
	return nil
}

// applyMemory changes the guest's memory.
func (s *session) applyMemory(kind uint32, payload []byte, fds *descriptors) error {
	if kind == setMemTable {
		return s.setTable(payload, fds)
	}
	info, err := decodeRegion(payload[8:])
	if err != nil {
		return err
	}
	if kind == addMemReg {
		if len(*fds) != 1 {
			return errors.New("the descriptor is missing")
		}
		r, err := mapRegion(info, (*fds)[0])
		if err != nil {
			return err
		}
		return s.setMemory(append(slices.Clone(s.memory.regions), r), r)
	}
	gone := s.memory.find(info)
	if gone == nil {
		return fmt.Errorf("region %s: there is none", info)
	}
	return s.setMemory(slices.DeleteFunc(slices.Clone(s.memory.regions), func(r *region) bool { return r == gone }))
}

func (s *session) setTable(payload []byte, fds *descriptors) error {
	infos, err := decodeTable(payload)
	if err != nil {
		return err
	}
	if len(infos) != len(*fds) {
		return fmt.Errorf("%d descriptors for %d regions", len(*fds), len(infos))
	}
	var regions []*region
	for i, info := range infos {
		r, err := mapRegion(info, (*fds)[i])
		if err != nil {
			for _, r := range regions {
				r.unmap()
			}
			return err
		}
		regions = append(regions, r)
	}
	return s.setMemory(regions, regions...)
}

// setMemory makes regions the guest's memory. Those that are new are unmapped after an error. Those that are not part of it any more
// are unmapped when the last request that has buffers in them is done.
func (s *session) setMemory(regions []*region, fresh ...*region) error {
	m, err := newMemory(regions)
	if err != nil {
		for _, r := range fresh {
			r.unmap()
		}
		return err
	}
	for _, q := range s.pool.queues {
		q.setMemory(m)
	}
	s.memory.release()
	s.memory = m
	return nil
}

// applyEvent gives a queue an eventfd.
func (s *session) applyEvent(kind uint32, payload uint64, fds *descriptors) error {
	if payload&^uint64(2*noFD-1) != 0 {
		return fmt.Errorf("payload %#x", payload)
	}
	q, err := s.queue(uint32(payload & (noFD - 1)))
	if err != nil {
		return err
	}
	fd := -1
	switch {
	case payload&noFD == 0 != (len(*fds) == 1):
		return errors.New("a descriptor is missing, or is one too many")
	case len(*fds) == 1:
		if fd, err = fds.ownEvent(); err != nil {
			return err
		}
	case kind == setVringKick:
		return errors.New("the queue would have to be polled")
	}
	switch kind {
	case setVringKick:
		return q.start(s.memory, fd)
	case setVringCall:
		q.setCall(fd)
	default: // a queue that fails stops, and the log tells of it
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	return nil
}

// ownEvent takes an eventfd out of the descriptors and sees to it that writing to it never blocks. The caller closes it.
func (d *descriptors) ownEvent() (int, error) {
	fd := (*d)[0]
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, fmt.Errorf("stat descriptor: %w", err)
	}
	if st.Mode&unix.S_IFMT != 0 { // a file, a pipe, a socket
		return -1, errors.New("not an eventfd")
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return -1, fmt.Errorf("set descriptor to not block: %w", err)
	}
	*d = (*d)[1:]
	return fd, nil
}
