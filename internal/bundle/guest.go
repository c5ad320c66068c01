package bundle

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// guestPathRoom is how long a guest path of a root or a bind mount can get.
const guestPathRoom = 512

// GuestSpec translates the specification for the guest, as JSON: root.path
// becomes root, the source of the bind mount with index i in Spec.Mounts
// becomes bindSource[i], and what concerns only the host is left out. Both are
// absolute guest paths. The error is errdefs.ErrInvalidArgument for a missing
// or relative path. namespaces tells which namespace of the guest the container
// joins, as the agent API has it, by type; one of another type is a new one.
func (b *Bundle) GuestSpec(root string, bindSource map[int]string, namespaces map[specs.LinuxNamespaceType]string) ([]byte, error) {
	if !path.IsAbs(root) {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("translate bundle: guest root %q is not absolute", root))
	}
	spec := *b.Spec
	spec.Root = &specs.Root{Path: root, Readonly: b.Spec.Root.Readonly}
	spec.Mounts = slices.Clone(b.Spec.Mounts)
	for i := range spec.Mounts {
		if inside, ok := b.inside(i); ok {
			spec.Mounts[i].Source = path.Join(root, inside) // below the root: the guest looks it up when it is there
		}
	}
	for _, bind := range b.Binds() {
		source := bindSource[bind.Index]
		if !path.IsAbs(source) {
			return nil, errdefs.ErrInvalidArgument.WithMessage(
				fmt.Sprintf("translate bundle: mounts[%d]: guest source %q is not absolute", bind.Index, source))
		}
		m := &spec.Mounts[bind.Index]
		m.Type, m.Source = "bind", source
		m.UIDMappings, m.GIDMappings = nil, nil // the host has mapped them
		m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool {
			return idOptions[o] || o == "ro" && b.HostReadOnly[bind.Index]
		})
		if !slices.Contains(m.Options, "bind") && !bind.Recursive {
			m.Options = append(m.Options, "bind")
		}
	}
	b.fillMade(spec.Mounts)
	process := guestProcess(spec.Process)
	spec.Process = process
	linux := *b.Spec.Linux
	linux.CgroupsPath, linux.Seccomp = "", nil // Seccomp goes as a program
	linux.Namespaces = slices.Clone(linux.Namespaces)
	for i := range linux.Namespaces {
		ns := &linux.Namespaces[i]
		ns.Path = namespaces[ns.Type]
	}
	if b.writesCgroups() {
		linux.Namespaces = append(linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	if p := linux.Personality; p != nil {
		linux.Personality = &specs.LinuxPersonality{Domain: p.Domain}
	}
	spec.Linux = &linux
	spec.Hooks = guestHooks(b.Spec.Hooks)
	if spec.Hooks == nil {
		spec.Annotations = nil // they are for the state that hooks get
	}
	data, err := marshal(&spec)
	if err != nil {
		return nil, fmt.Errorf("translate bundle: %w", err)
	}
	return data, nil
}

// fillMade gives a tmpfs without a mode, on a mount point that was made for it, the mode that it has where nobody says another.
// The guest would take that of the mount point, as it does with one that was there.
func (b *Bundle) fillMade(mounts []specs.Mount) {
	made := make(map[string]bool, len(b.Made))
	for _, path := range b.Made {
		made[path] = true
	}
	for i := range mounts {
		at := path.Join("/", mounts[i].Destination)
		if made[at] && mounts[i].Type == "tmpfs" {
			mounts[i].Options = append([]string{"mode=1777"}, mounts[i].Options...)
		}
		delete(made, at) // the next one finds a mount there
	}
}

// guestHooks are those that run in the container; nil: none.
func guestHooks(h *specs.Hooks) *specs.Hooks {
	if h == nil || len(h.CreateContainer)+len(h.StartContainer) == 0 {
		return nil
	}
	return &specs.Hooks{CreateContainer: h.CreateContainer, StartContainer: h.StartContainer}
}

// GuestProcess translates a checked process for the guest, as JSON.
func GuestProcess(p *specs.Process) ([]byte, error) {
	data, err := marshal(guestProcess(p))
	if err != nil {
		return nil, fmt.Errorf("translate process: %w", err)
	}
	if len(data) > maxGuest {
		return nil, errdefs.ErrInvalidArgument.WithMessage(
			fmt.Sprintf("process: %d bytes for the guest are more than %d", len(data), maxGuest))
	}
	return data, nil
}

// GuestResources translates checked resources for the guest, as JSON.
func GuestResources(r *specs.LinuxResources) ([]byte, error) {
	data, err := marshal(r)
	if err != nil {
		return nil, fmt.Errorf("translate resources: %w", err)
	}
	if len(data) > maxResources {
		return nil, errdefs.ErrInvalidArgument.WithMessage(
			fmt.Sprintf("resources: %d bytes for the guest are more than %d", len(data), maxResources))
	}
	return data, nil
}

// guestProcess is a copy without what was warned of as ignored.
func guestProcess(p *specs.Process) *specs.Process {
	q := *p
	q.User.Username, q.ApparmorProfile = "", ""
	if p.Capabilities != nil {
		q.Capabilities = &specs.LinuxCapabilities{
			Bounding:    knownOnly(p.Capabilities.Bounding),
			Effective:   knownOnly(p.Capabilities.Effective),
			Inheritable: knownOnly(p.Capabilities.Inheritable),
			Permitted:   knownOnly(p.Capabilities.Permitted),
			Ambient:     knownOnly(p.Capabilities.Ambient),
		}
	}
	return &q
}

func knownOnly(caps []string) []string {
	return slices.DeleteFunc(slices.Clone(caps), func(name string) bool { return !knownCap(name) })
}

// guestSize bounds the length of what GuestSpec returns, whatever the paths.
func (b *Bundle) guestSize() (int, error) {
	sources := map[int]string{}
	for _, bind := range b.Binds() {
		sources[bind.Index] = "/" + strings.Repeat("x", guestPathRoom)
	}
	namespaces := map[specs.LinuxNamespaceType]string{}
	for _, ns := range b.Spec.Linux.Namespaces {
		namespaces[ns.Type] = strings.Repeat("x", guestPathRoom)
	}
	data, err := b.GuestSpec("/"+strings.Repeat("x", guestPathRoom), sources, namespaces)
	return len(data), err
}

// marshal encodes without the escapes for HTML, which can make text six times
// as long.
func marshal(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}
