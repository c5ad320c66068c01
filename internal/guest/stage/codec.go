package stage

import (
	"encoding/binary"
	"errors"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// coder writes values to buf or reads them from it, so that one description of
// a type serves both directions. Reflection would take longer than all the rest
// of an exec.
type coder struct {
	buf     []byte
	reading bool
	err     error // of reading
}

var errTruncated = errors.New("configuration is truncated")

func (x *coder) uint64(v *uint64) {
	if !x.reading {
		x.buf = binary.LittleEndian.AppendUint64(x.buf, *v)
		return
	}
	if len(x.buf) < 8 {
		x.err, x.buf = errTruncated, nil
		return
	}
	*v = binary.LittleEndian.Uint64(x.buf)
	x.buf = x.buf[8:]
}

// integer codes any integer by its 64 bits.
func integer[T ~int | ~int32 | ~uint16 | ~uint32 | ~uint64 | ~uintptr](x *coder, v *T) {
	n := uint64(*v)
	x.uint64(&n)
	*v = T(n)
}

func (x *coder) bool(v *bool) {
	n := 0
	if *v {
		n = 1
	}
	integer(x, &n)
	*v = n != 0
}

func (x *coder) string(v *string) {
	n := len(*v)
	integer(x, &n)
	if !x.reading {
		x.buf = append(x.buf, *v...)
		return
	}
	if n < 0 || n > len(x.buf) {
		x.err, x.buf = errTruncated, nil
		return
	}
	*v = string(x.buf[:n])
	x.buf = x.buf[n:]
}

// list codes a list whose elements each codes.
func list[T any](x *coder, v *[]T, each func(*coder, *T)) {
	n := len(*v)
	integer(x, &n)
	if x.reading {
		if n < 0 || n > len(x.buf)/8 { // an element has at least eight bytes
			x.err, x.buf = errTruncated, nil
			return
		}
		*v = nil
		if n > 0 {
			*v = make([]T, n)
		}
	}
	for i := range *v {
		each(x, &(*v)[i])
	}
}

// optional codes a value that may be missing.
func optional[T any](x *coder, v **T, each func(*coder, *T)) {
	have := *v != nil
	x.bool(&have)
	if !have {
		*v = nil
		return
	}
	if x.reading {
		*v = new(T)
	}
	each(x, *v)
}

// Encode returns cfg for Decode.
func (c *Config) Encode() []byte {
	x := &coder{}
	c.code(x)
	return x.buf
}

// Decode is the inverse of Encode.
func Decode(data []byte) (*Config, error) {
	x := &coder{buf: data, reading: true}
	c := &Config{}
	c.code(x)
	if x.err != nil {
		return nil, x.err
	}
	return c, nil
}

func (c *Config) code(x *coder) {
	c.Process.code(x)
	optional(x, &c.Container, func(x *coder, v *Container) { v.code(x) })
	integer(x, &c.Join)
	x.bool(&c.UserNS)
}

func (p *Process) code(x *coder) {
	list(x, &p.Args, (*coder).string)
	list(x, &p.Env, (*coder).string)
	x.string(&p.Cwd)
	integer(x, &p.UID)
	integer(x, &p.GID)
	list(x, &p.Groups, integer[uint32])
	optional(x, &p.Umask, integer[uint32])
	for _, set := range []*uint64{
		&p.Capabilities.Bounding, &p.Capabilities.Effective, &p.Capabilities.Permitted,
		&p.Capabilities.Inheritable, &p.Capabilities.Ambient,
	} {
		x.uint64(set)
	}
	list(x, &p.Rlimits, func(x *coder, l *Rlimit) {
		integer(x, &l.Resource)
		x.uint64(&l.Soft)
		x.uint64(&l.Hard)
	})
	x.bool(&p.NoNewPrivs)
	optional(x, &p.OOMScoreAdj, integer[int])
	optional(x, &p.Scheduler, func(x *coder, s *Scheduler) {
		integer(x, &s.Policy)
		integer(x, &s.Nice)
		integer(x, &s.Priority)
		for _, v := range []*uint64{&s.Flags, &s.Runtime, &s.Deadline, &s.Period} {
			x.uint64(v)
		}
	})
	optional(x, &p.IOPriority, integer[uint32])
	optional(x, &p.Affinity.Initial, codeSet)
	optional(x, &p.Affinity.Final, codeSet)
	optional(x, &p.CoredumpFilter, integer[uint32])
	x.uint64(&p.TimerSlack)
	integer(x, &p.Securebits)
	x.bool(&p.THPDisable)
	x.bool(&p.Terminal)
	integer(x, &p.Width)
	integer(x, &p.Height)
	p.Shared.code(x)
}

func (s *Shared) code(x *coder) {
	optional(x, &s.Seccomp, func(x *coder, s *Seccomp) {
		list(x, &s.Program, (*coder).uint64)
		integer(x, &s.Flags)
	})
	x.string(&s.Keyring)
	optional(x, &s.Personality, integer[uint32])
	optional(x, &s.MemoryPolicy, func(x *coder, p *MemoryPolicy) {
		integer(x, &p.Mode)
		codeSet(x, &p.Nodes)
	})
}

func codeSet(x *coder, set *unix.CPUSet) {
	for i := range set {
		integer(x, &set[i])
	}
}

func (c *Container) code(x *coder) {
	x.string(&c.Root)
	x.bool(&c.ReadonlyRoot)
	integer(x, &c.RootPropagation)
	x.string(&c.Hostname)
	x.string(&c.Domainname)
	x.bool(&c.NewCgroupNS)
	x.bool(&c.NewNetNS)
	list(x, &c.Mounts, func(x *coder, m *Mount) { m.code(x) })
	list(x, &c.Devices, func(x *coder, d *Device) { d.code(x) })
	list(x, &c.MaskedPaths, (*coder).string)
	list(x, &c.ReadonlyPaths, (*coder).string)
	list(x, &c.Sysctl, func(x *coder, s *Sysctl) {
		x.string(&s.Name)
		x.string(&s.Value)
	})
	list(x, &c.Hooks.Create, codeHook)
	list(x, &c.Hooks.Start, codeHook)
	for _, part := range []*string{
		&c.Hooks.CreateState[0], &c.Hooks.CreateState[1], &c.Hooks.StartState[0], &c.Hooks.StartState[1],
	} {
		x.string(part)
	}
}

func codeHook(x *coder, h *specs.Hook) {
	x.string(&h.Path)
	list(x, &h.Args, (*coder).string)
	list(x, &h.Env, (*coder).string)
	optional(x, &h.Timeout, integer[int])
}

func (m *Mount) code(x *coder) {
	x.string(&m.Destination)
	x.string(&m.Type)
	x.string(&m.Source)
	x.bool(&m.Inside)
	integer(x, &m.Flags)
	x.string(&m.Data)
	for _, attr := range []*uint64{&m.Set, &m.Clear, &m.RecSet, &m.RecClear} {
		x.uint64(attr)
	}
	list(x, &m.Propagation, integer[uintptr])
	x.bool(&m.CopyUp)
}

func (d *Device) code(x *coder) {
	x.string(&d.Path)
	for _, v := range []*uint32{&d.Mode, &d.Major, &d.Minor, &d.UID, &d.GID} {
		integer(x, v)
	}
	x.string(&d.Node)
}

// A reply is what a stage tells the agent: the kind and text of an error, or, when
// both are empty, that it is ready. A ready process with a terminal sends the
// master along.
const replySep = "\x00"

// maxText bounds the text of an error.
const maxText = 8 << 10

func encodeReply(err error) []byte {
	if err == nil {
		return []byte(replySep)
	}
	text := err.Error()
	return []byte(fault.Kind(err) + replySep + text[:min(len(text), maxText)])
}

// DecodeReply returns the error that a stage has sent, or nil when it is ready.
func DecodeReply(data []byte) error {
	kind, text, _ := strings.Cut(string(data), replySep)
	if text == "" {
		return nil
	}
	return fault.OfKind(kind, text)
}
