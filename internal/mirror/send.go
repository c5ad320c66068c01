package mirror

import (
	"time"

	agentv1 "runv/api/agent/v1"
)

// What a request to the agent has at most: it shares the agent's control stream with others.
const (
	batchBytes      = 256 << 10
	batchOperations = 256
)

// sender collects operations for the guest. The mirror fails with the first request that does, and what
// comes then is dropped. Operations of several mirrors are done in their order, too: only one of them collects at a time.
type sender struct {
	m          *Mirror
	operations []*agentv1.MirrorOperation
	bytes      int
}

func (s *sender) send(op *agentv1.MirrorOperation) {
	if other := s.m.set.sending; other != s.m {
		if other != nil {
			other.out.flush()
		}
		s.m.set.sending = s.m
	}
	size := 64
	if w := op.GetWrite(); w != nil {
		for _, e := range w.Extents {
			size += len(e.Data)
		}
	}
	s.operations = append(s.operations, op)
	s.bytes += size
	s.m.set.pace.spend(1, size)
	if s.bytes >= batchBytes || len(s.operations) >= batchOperations {
		s.flush()
	}
}

// flush has all operations done before it returns.
func (s *sender) flush() {
	ops := s.operations
	s.operations, s.bytes = nil, 0
	if len(ops) == 0 || s.m.failed != nil || s.m.guest == nil {
		return
	}
	ctx, cancel := s.m.set.call()
	defer cancel()
	if _, err := s.m.guest.Apply(ctx, &agentv1.ApplyMirrorRequest{Id: s.m.id, Operations: ops}); err != nil {
		s.m.fail(err)
	}
}

func (s *sender) make(path string, staged bool, a *agentv1.MirrorAttributes, target string, rdev uint64) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Make{Make: &agentv1.MirrorMake{
		Path: path, Staged: staged, Attributes: a, Target: target, Rdev: rdev,
	}}})
}

func (s *sender) publish(staged, path string, moved bool) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Publish{Publish: &agentv1.MirrorPublish{
		Staged: staged, Path: path, Moved: moved,
	}}})
}

func (s *sender) link(n *node, link string, staged bool) {
	op := &agentv1.MirrorLink{Path: n.path(), Link: link, LinkStaged: staged}
	if n.staged != "" {
		op.Path, op.Staged = n.staged, true
	}
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Link{Link: op}})
}

// touch is a modification that changes nothing.
func (s *sender) touch(n *node) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Write{Write: &agentv1.MirrorWrite{
		Path: n.path(), Size: uint64(n.size), MtimeSec: n.st.mtime.Sec, MtimeNsec: uint32(n.st.mtime.Nsec),
	}}})
}

func (s *sender) closeWritten(path string) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Close{Close: &agentv1.MirrorClose{Path: path}}})
}

func (s *sender) setAttributes(path string, staged bool, a *agentv1.MirrorAttributes) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_SetAttributes{SetAttributes: &agentv1.MirrorSetAttributes{
		Path: path, Staged: staged, Attributes: a,
	}}})
}

func (s *sender) rename(path, to string, exchange bool) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Rename{Rename: &agentv1.MirrorRename{
		Path: path, To: to, Exchange: exchange,
	}}})
}

func (s *sender) remove(path string, moved bool) {
	s.send(&agentv1.MirrorOperation{Kind: &agentv1.MirrorOperation_Remove{Remove: &agentv1.MirrorRemove{Path: path, Moved: moved}}})
}

// What may be done for changes, in the long run and at once: whoever changes files without end shall not
// keep the supervisor and the agent busy. What comes faster waits in the kernel's queue, and when that overflows
// only the outcome is looked at.
const (
	operationsPerSecond = 2000
	bytesPerSecond      = 8 << 20
	burstSeconds        = 2
)

// pace counts what was done, in seconds of what may be.
type pace struct {
	debt float64
	at   time.Time // when it was so
}

func (p *pace) spend(operations, bytes int) {
	p.debt += max(float64(operations)/operationsPerSecond, float64(bytes)/bytesPerSecond)
}

// wait is how long to wait before more may be done.
func (p *pace) wait(now time.Time) time.Duration {
	p.debt = max(0, p.debt-now.Sub(p.at).Seconds())
	p.at = now
	return time.Duration(max(0, p.debt-burstSeconds) * float64(time.Second))
}
