package container

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/fault"
	"runv/internal/guest/stage"
)

// MaxSpec bounds the JSON that the host may send, in bytes.
const MaxSpec = 48 << 20

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

func parseSpec(data []byte) (*specs.Spec, error) {
	spec := &specs.Spec{}
	if len(data) > MaxSpec {
		return nil, invalid("parse specification: %d bytes are too many", len(data))
	}
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, invalid("parse specification: %w", err)
	}
	switch {
	case spec.Process == nil:
		return nil, invalid("parse specification: process is missing")
	case spec.Root == nil || !filepath.IsAbs(spec.Root.Path):
		return nil, invalid("parse specification: root.path is no absolute path")
	case spec.Linux == nil:
		return nil, invalid("parse specification: linux is missing")
	}
	return spec, nil
}

func parseProcess(data []byte) (*specs.Process, error) {
	p := &specs.Process{}
	if len(data) > MaxSpec {
		return nil, invalid("parse process: %d bytes are too many", len(data))
	}
	if err := json.Unmarshal(data, p); err != nil {
		return nil, invalid("parse process: %w", err)
	}
	return p, nil
}

func parseResources(data []byte) (*specs.LinuxResources, error) {
	r := &specs.LinuxResources{}
	if len(data) > MaxSpec {
		return nil, invalid("parse resources: %d bytes are too many", len(data))
	}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, invalid("parse resources: %w", err)
	}
	return r, nil
}

// rlimits are the limits' numbers by their names.
var rlimits = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}

// translateProcess makes a stage's process of a specification's.
func translateProcess(s *specs.Process) (*stage.Process, error) {
	if len(s.Args) == 0 {
		return nil, invalid("process.args: must not be empty")
	}
	if !filepath.IsAbs(s.Cwd) {
		return nil, invalid("process.cwd: %q is no absolute path", s.Cwd)
	}
	p := &stage.Process{
		Args:        s.Args,
		Env:         s.Env,
		Cwd:         s.Cwd,
		UID:         s.User.UID,
		GID:         s.User.GID,
		Groups:      s.User.AdditionalGids,
		Umask:       s.User.Umask,
		NoNewPrivs:  s.NoNewPrivileges,
		OOMScoreAdj: s.OOMScoreAdj,
		Terminal:    s.Terminal,
	}
	if s.ConsoleSize != nil {
		p.Width, p.Height = uint16(s.ConsoleSize.Width), uint16(s.ConsoleSize.Height)
	}
	for _, l := range s.Rlimits {
		resource, ok := rlimits[l.Type]
		if !ok {
			return nil, invalid("process.rlimits: unknown type %q", l.Type)
		}
		p.Rlimits = append(p.Rlimits, stage.Rlimit{Resource: resource, Soft: l.Soft, Hard: l.Hard})
	}
	if err := translateScheduling(p, s); err != nil {
		return nil, err
	}
	if c := s.Capabilities; c != nil {
		bits := capabilityBits()
		p.Capabilities = stage.Capabilities{
			Bounding:    bits.of(c.Bounding),
			Effective:   bits.of(c.Effective),
			Permitted:   bits.of(c.Permitted),
			Inheritable: bits.of(c.Inheritable),
			Ambient:     bits.of(c.Ambient),
		}
	}
	return p, nil
}

const (
	maxFilter   = 4096 // instructions: what the kernel takes
	filterFlags = unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
)

// translateSeccomp makes a stage's filter of the host's; nil stays nil.
func translateSeccomp(s *agentv1.Seccomp) (*stage.Seccomp, error) {
	if s == nil {
		return nil, nil
	}
	n := len(s.Program) / stage.InstructionSize
	if len(s.Program)%stage.InstructionSize != 0 || n == 0 || n > maxFilter {
		return nil, invalid("seccomp: a program of %d bytes is none", len(s.Program))
	}
	if s.Flags&^filterFlags != 0 {
		return nil, invalid("seccomp: flags %#x are not supported", s.Flags)
	}
	f := &stage.Seccomp{Program: make([]uint64, n), Flags: s.Flags}
	for i := range f.Program {
		f.Program[i] = binary.LittleEndian.Uint64(s.Program[i*stage.InstructionSize:])
	}
	return f, nil
}

// capabilityNames are the bits of capabilities by their names.
type capabilityNames map[string]uint64

func capabilityBits() capabilityNames {
	names := make(capabilityNames)
	for _, c := range capability.ListKnown() {
		names["CAP_"+strings.ToUpper(c.String())] = 1 << c
	}
	return names
}

// of ignores unknown names, as the OCI runtime specification allows.
func (n capabilityNames) of(names []string) (set uint64) {
	for _, name := range names {
		set |= n[strings.ToUpper(name)]
	}
	return set
}

// translateContainer makes a stage's container of a specification.
func translateContainer(s *specs.Spec, ns *namespaces) (*stage.Container, error) {
	c := &stage.Container{
		Root:          s.Root.Path,
		ReadonlyRoot:  s.Root.Readonly,
		Hostname:      s.Hostname,
		Domainname:    s.Domainname,
		NewCgroupNS:   ns.own&unix.CLONE_NEWCGROUP != 0,
		NewNetNS:      ns.own&unix.CLONE_NEWNET != 0,
		MaskedPaths:   fromRoot(s.Linux.MaskedPaths),
		ReadonlyPaths: fromRoot(s.Linux.ReadonlyPaths),
	}
	if ns.flags&unix.CLONE_NEWUTS == 0 && (s.Hostname != "" || s.Domainname != "") {
		return nil, invalid("hostname: needs a uts namespace")
	}
	if p := s.Linux.RootfsPropagation; p != "" {
		flag, ok := propagationOptions[p]
		if !ok {
			return nil, invalid("linux.rootfsPropagation: unknown value %q", p)
		}
		c.RootPropagation = flag
	}
	for _, name := range slices.Sorted(maps.Keys(s.Linux.Sysctl)) {
		c.Sysctl = append(c.Sysctl, stage.Sysctl{Name: name, Value: s.Linux.Sysctl[name]})
	}
	for _, m := range s.Mounts {
		if strings.HasPrefix(m.Type, "cgroup") && ns.seesGuestCgroups() {
			m.Type, m.Source = "bind", guestCgroups
		}
		t := translateMount(m)
		if inside, ok := strings.CutPrefix(m.Source, s.Root.Path+"/"); ok && t.Type == "bind" {
			t.Source, t.Inside = "/"+inside, true
		}
		c.Mounts = append(c.Mounts, t)
	}
	for _, d := range s.Linux.Devices {
		dev, err := translateDevice(d)
		if err != nil {
			return nil, err
		}
		c.Devices = append(c.Devices, dev)
	}
	// The specification's come first: they may replace a default one.
	c.Devices = append(c.Devices, stage.DefaultDevices()...)
	return c, nil
}

// guestCgroups is where the guest's control groups are mounted.
const guestCgroups = "/sys/fs/cgroup"

// translateHooks makes a stage's hooks of a specification's, with the state that they get.
func translateHooks(id, bundle string, s *specs.Spec) (h stage.Hooks, err error) {
	if s.Hooks == nil {
		return h, nil
	}
	h.Create, h.Start = s.Hooks.CreateContainer, s.Hooks.StartContainer
	state := specs.State{Version: specs.Version, ID: id, Bundle: bundle, Annotations: s.Annotations}
	if h.CreateState, err = splitState(state, specs.StateCreating); err != nil {
		return h, err
	}
	h.StartState, err = splitState(state, specs.StateCreated)
	return h, err
}

// splitState encodes a state without a pid: only the stage knows what pid it has in its namespace.
func splitState(s specs.State, status specs.ContainerState) (parts [2]string, err error) {
	s.Status = status
	data, err := json.Marshal(s)
	if err != nil {
		return parts, invalid("encode state: %w", err)
	}
	return [2]string{`{"pid":`, "," + strings.TrimPrefix(string(data), "{")}, nil
}

func translateMount(m specs.Mount) stage.Mount {
	t := stage.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source}
	switch {
	case m.Type == "cgroup":
		t.Type = "cgroup2"
	case slices.Contains(m.Options, "bind"), slices.Contains(m.Options, "rbind"):
		t.Type = "bind"
	}
	parseOptions(&t, m.Options)
	return t
}

// fromRoot makes paths start at the container's root, where runc takes relative ones from.
func fromRoot(paths []string) []string {
	absolute := make([]string, 0, len(paths))
	for _, path := range paths {
		absolute = append(absolute, filepath.Join("/", path))
	}
	return absolute
}

var deviceTypes = map[string]uint32{
	"b": unix.S_IFBLK,
	"c": unix.S_IFCHR,
	"u": unix.S_IFCHR,
	"p": unix.S_IFIFO,
}

func translateDevice(d specs.LinuxDevice) (stage.Device, error) {
	kind, ok := deviceTypes[d.Type]
	if !ok {
		return stage.Device{}, invalid("linux.devices: unknown type %q of %s", d.Type, d.Path)
	}
	dev := stage.Device{Path: filepath.Join("/", d.Path), Mode: kind | 0o666, Major: uint32(d.Major), Minor: uint32(d.Minor)}
	if d.FileMode != nil {
		dev.Mode = kind | uint32(*d.FileMode&os.ModePerm)
	}
	if d.UID != nil {
		dev.UID = *d.UID
	}
	if d.GID != nil {
		dev.GID = *d.GID
	}
	return dev, nil
}
