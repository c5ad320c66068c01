// Package bundle reads OCI bundles: it loads config.json, refuses what runv
// cannot honour, and translates the rest for the guest.
//
// The rule is that nothing is dropped silently. Each field of the runtime-spec
// is in the table of fields.go as honoured, refused or ignored; a refused field
// that is set makes the whole bundle fail with the field's name, and what is
// ignored is told in Warnings. The command line and the supervisor call this
// package. It starts nothing, writes nothing, and knows nothing of the guest
// but what its agent takes as a specification.
package bundle

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/bundle/seccomp"
)

const (
	// MaxConfig bounds config.json and process.json, in bytes. The kernel takes up to 6 MiB of arguments and environment,
	// whose characters JSON may write as six each.
	MaxConfig = 64 << 20
	// maxGuest bounds a specification for the guest, in bytes: what its agent takes.
	maxGuest = 48 << 20
	// maxResources bounds resources for the guest, in bytes: what a message to its agent takes.
	maxResources = 3 << 20
)

const configFile = "config.json"

// Bundle is a loaded and validated bundle.
type Bundle struct {
	Dir    string // absolute
	Spec   *specs.Spec
	Rootfs string // absolute; symlinks are left as they are
	// Warnings tell, each in a line, what was ignored or will be otherwise than
	// under a runtime without a VM.
	Warnings []string
	// Made are the paths of MountPoints that the host has made for this container: GuestSpec says so to the guest, for
	// which they are there.
	Made []string
	// HostReadOnly are the binds, by index, that the host keeps from being written to, for that is not so of what is mounted
	// below them: GuestSpec leaves `ro` away, which in the guest would be for all of it.
	HostReadOnly map[int]bool

	seccomp *seccomp.Filter
}

// Seccomp returns the container's filter of system calls, or nil if it has none.
func (b *Bundle) Seccomp() *seccomp.Filter { return b.seccomp }

// NetNS returns the host's network namespace that the container lives in: that at a path, or if the
// path is empty a new one. ok is false when the specification has none.
func (b *Bundle) NetNS() (path string, ok bool) {
	for _, ns := range b.Spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path, true
		}
	}
	return "", false
}

// Bind is a bind mount of the bundle.
type Bind struct {
	Index     int    // in Spec.Mounts
	Source    string // absolute path on the host
	Recursive bool   // with what is mounted below the source
	ReadOnly  bool
	// ReadOnlyBelow says that what is mounted below the source is read-only, too (option rro).
	ReadOnlyBelow bool
	IDMap         *IDMap // nil: files belong to whom they belong on the host
	// Exclusive says that only this container's VM changes the files, so that its guest may cache them.
	Exclusive bool
}

// ExclusiveAnnotation lists the destinations of bind mounts, with commas between them, whose files only this container's VM
// changes.
const ExclusiveAnnotation = "dev.runv.exclusive"

// exclusive are the destinations that the annotation lists.
func exclusive(s *specs.Spec) []string {
	value, ok := s.Annotations[ExclusiveAnnotation]
	if !ok {
		return nil
	}
	return strings.Split(value, ",")
}

// IDMap maps the ids that the files of a bind mount have (ContainerID) to those that they seem to
// have (HostID).
type IDMap struct {
	UIDs, GIDs []specs.LinuxIDMapping
	Recursive  bool // also in what is mounted below the source
}

// Load reads and validates the bundle in dir, which may be relative to the
// working directory. Its root file system and the sources of its bind mounts
// must exist. Mounts of the host's control groups have become mounts of the guest's.
// Errors: *FieldError for what config.json says, errdefs.ErrNotFound without a config.json, errdefs.ErrInvalidArgument for
// one that is no JSON or too large.
func Load(dir string) (*Bundle, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	data, err := readConfig(dir)
	if err != nil {
		return nil, err
	}
	b, err := Parse(data, dir)
	if err != nil {
		return nil, err
	}
	if err := b.checkFiles(); err != nil {
		return nil, err
	}
	if err := b.adaptCgroups(groupSourceOf); err != nil {
		return nil, err
	}
	return b, nil
}

// Parse validates data as the config.json of a bundle in bundleDir, an
// absolute path. It does not look at the file system. Errors as Load.
func Parse(data []byte, bundleDir string) (*Bundle, error) {
	if !filepath.IsAbs(bundleDir) {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("bundle directory %q is not an absolute path", bundleDir))
	}
	spec := &specs.Spec{}
	c := &checker{doc: configFile}
	if err := decode(c, data, spec); err != nil {
		return nil, err
	}
	if err := c.spec(spec); err != nil {
		return nil, err
	}
	b := &Bundle{Dir: filepath.Clean(bundleDir), Spec: spec, Warnings: c.warnings, seccomp: c.filter}
	b.Rootfs = b.abs(spec.Root.Path)
	for i := range spec.Mounts {
		if _, inside := b.inside(i); inside && b.idMapOf(&spec.Mounts[i]) != nil {
			return nil, c.refused(fmt.Sprintf("mounts[%d]", i), "ids of what an earlier mount shows cannot be mapped: the host has no such files")
		}
	}
	// The limit of what the agent takes is better met here than when a VM runs.
	size, err := b.guestSize()
	if err != nil {
		return nil, err
	}
	if size > maxGuest {
		return nil, errdefs.ErrInvalidArgument.WithMessage(
			fmt.Sprintf("%s: %d bytes for the guest are more than %d", configFile, size, maxGuest))
	}
	return b, nil
}

// ParseProcess validates a process on its own, as exec takes it from a file.
// Fields in errors are relative to the process. Errors as Load.
func ParseProcess(data []byte) (*specs.Process, error) {
	p := &specs.Process{}
	if err := decode(&checker{doc: "process"}, data, p); err != nil {
		return nil, err
	}
	if _, err := CheckProcess(p); err != nil {
		return nil, err
	}
	return p, nil
}

// CheckProcess validates a process that was put together, such as exec's from
// the container's and flags. Errors as ParseProcess.
func CheckProcess(p *specs.Process) (warnings []string, err error) {
	c := &checker{doc: "process"}
	if err := c.processAlone(p); err != nil {
		return nil, err
	}
	return c.warnings, nil
}

// Binds lists the bind mounts whose sources the host has, in the order of the specification.
func (b *Bundle) Binds() []Bind {
	var binds []Bind
	exclusive := exclusive(b.Spec)
	for i := range b.Spec.Mounts {
		m := &b.Spec.Mounts[i]
		if _, inside := b.inside(i); isBind(m) && !inside {
			binds = append(binds, Bind{
				Index:     i,
				Source:    b.abs(m.Source),
				Recursive: slices.Contains(m.Options, "rbind"),
				ReadOnly:  readOnly(m), ReadOnlyBelow: slices.Contains(m.Options, "rro"),
				IDMap:     b.idMapOf(m),
				Exclusive: slices.Contains(exclusive, m.Destination),
			})
		}
	}
	return binds
}

// inside tells of a bind mount whose source lies in the container's own root file system, below an earlier mount: it is what
// that mount shows there, which only the guest has. The path is absolute, in the root file system.
func (b *Bundle) inside(i int) (path string, ok bool) {
	m := &b.Spec.Mounts[i]
	rest, below := strings.CutPrefix(b.abs(m.Source), strings.TrimSuffix(b.Rootfs, "/")+"/")
	if !isBind(m) || !below {
		return "", false
	}
	path = "/" + rest
	return path, covered(path, b.Spec.Mounts[:i])
}

// covered tells whether a path in the root file system is that of a mount or lies below one.
func covered(path string, mounts []specs.Mount) bool {
	return slices.ContainsFunc(mounts, func(m specs.Mount) bool {
		over := filepath.Join("/", m.Destination)
		return over != "/" && (path == over || strings.HasPrefix(path, over+"/"))
	})
}

// MountPoint is a path in the root file system on which something is mounted.
type MountPoint struct {
	Path string // absolute
	File bool   // a file is bound there
}

// MountPoints lists the places in the root file system itself, not below another
// mount, that the container's mounts and its working directory need.
func (b *Bundle) MountPoints() []MountPoint {
	var points []MountPoint
	inRoot := func(path string, before []specs.Mount) bool { return path != "/" && !covered(path, before) }
	for i := range b.Spec.Mounts {
		m := &b.Spec.Mounts[i]
		path := filepath.Join("/", m.Destination)
		if !inRoot(path, b.Spec.Mounts[:i]) {
			continue
		}
		file := false
		if isBind(m) {
			fi, err := os.Stat(b.abs(m.Source))
			file = err == nil && !fi.IsDir()
		}
		points = append(points, MountPoint{Path: path, File: file})
	}
	if cwd := filepath.Join("/", b.Spec.Process.Cwd); inRoot(cwd, b.Spec.Mounts) {
		points = append(points, MountPoint{Path: cwd})
	}
	return points
}

// Size tells which VM the resource limits ask for.
func (b *Bundle) Size() Size { return SizeOf(b.Spec.Linux.Resources) }

// Size is what resource limits ask of a VM. 0 means that there is no such limit.
type Size struct {
	QuotaCPUs   int   // as many vCPUs as the CPU quota can keep busy
	SetCPUs     int   // as many as have numbers up to the highest of the cpuset
	MemoryBytes int64 // the memory limit
}

// SizeOf tells which VM resource limits, which may be nil, ask for.
func SizeOf(r *specs.LinuxResources) (s Size) {
	if r == nil {
		return s
	}
	if cpu := r.CPU; cpu != nil && positive(cpu.Quota) {
		period := uint64(defaultPeriod)
		if cpu.Period != nil && *cpu.Period != 0 {
			period = *cpu.Period
		}
		quota := uint64(*cpu.Quota)
		n := quota / period
		if quota%period != 0 {
			n++
		}
		s.QuotaCPUs = int(min(n, math.MaxInt32))
	}
	if cpu := r.CPU; cpu != nil && cpu.Cpus != "" {
		if n, err := highest(cpu.Cpus); err == nil {
			s.SetCPUs = n + 1
		}
	}
	if m := r.Memory; m != nil && positive(m.Limit) {
		s.MemoryBytes = *m.Limit
	}
	return s
}

// AffinityCPUs is as many CPUs as have numbers up to the highest that execCPUAffinity of the container's process names; 0:
// it names none.
func (b *Bundle) AffinityCPUs() (cpus int) {
	a := b.Spec.Process.ExecCPUAffinity
	if a == nil {
		return 0
	}
	for _, list := range []string{a.Initial, a.Final} {
		if list == "" {
			continue
		}
		if n, err := highest(list); err == nil {
			cpus = max(cpus, n+1)
		}
	}
	return cpus
}

// abs makes a path of the specification absolute: relative ones start at the bundle.
func (b *Bundle) abs(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(b.Dir, path)
}

// checkFiles looks for the files that the specification names.
func (b *Bundle) checkFiles() error {
	c := &checker{doc: configFile}
	fi, err := os.Stat(b.Rootfs)
	switch {
	case err != nil:
		return c.invalid("root.path", "%s: %v", b.Rootfs, reason(err))
	case !fi.IsDir():
		return c.invalid("root.path", "%s: not a directory", b.Rootfs)
	}
	for _, bind := range b.Binds() {
		field := fmt.Sprintf("mounts[%d].source", bind.Index)
		fi, err := os.Stat(bind.Source)
		if err != nil {
			return c.invalid(field, "%s: %v", bind.Source, reason(err))
		}
		if fi.Mode()&(fs.ModeSocket|fs.ModeNamedPipe|fs.ModeDevice) != 0 {
			b.Warnings = append(b.Warnings, fmt.Sprintf(
				"%s: %s is a socket, FIFO or device of the host: it does not work across the VM's border", field, bind.Source))
		}
	}
	return nil
}

// readConfig reads a regular file of bounded size.
func readConfig(dir string) ([]byte, error) {
	path := filepath.Join(dir, configFile)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not block
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("open bundle: %s: no such file", path))
	}
	if err != nil {
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("open bundle: %s: not a regular file", path))
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	return data, nil
}

// reason is the error without the path, which the caller has said already.
func reason(err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
