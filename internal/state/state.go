// Package state owns the state directory: which containers and pods exist, and
// which host processes belong to them. It makes list, state and delete --force
// work when no supervisor answers.
//
// # Layout
//
//	ROOT/lock                         held while the set of entries or a file changes
//	ROOT/containers/ID/state.json     a Container
//	ROOT/containers/ID/pod            symlink to the pod's directory
//	ROOT/pods/POD/pod.json            a Pod; beside it the supervisor's own files
//	ROOT/tmp/                         directories on their way in or out
//
// Directories appear and vanish by rename, files change by rename, so readers
// need no lock and never see half of anything, save what a crash or a hand
// left. Such an entry is reported as broken and can be purged like any other.
//
// # Who calls
//
// The command line reserves containers and pods, lists, and purges. A pod's
// supervisor saves the pod and its containers at each transition. Nobody else
// writes below ROOT but in the pod's own directory.
//
// The package starts no process and speaks to none. It kills only in Purge and
// SweepPods, and only processes whose start time proves who they are. State
// files are data to it, not truth: they are bounded and validated when read.
package state

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/hostcgroup"
	"runv/internal/network"
)

// Version is of the files that this package writes, and the newest that it reads.
const Version = 1

const (
	maxFile = 16 << 20 // bytes of a state file, most of them annotations
	maxName = 255      // bytes of an id: it is the name of a directory
	maxVM   = 64       // processes of a VM
	// MaxPhases bounds the timed phases of a pod.
	MaxPhases = 256
	maxNets   = 256 // network namespaces of a pod
	maxLost   = 256 // bind mounts of a container that lost their watches
)

// Names of the supervisor's files in the pod's directory that others look for.
const (
	SupervisorSocket = "supervisor.sock" // where it serves its API
	EventsFile       = "events.log"      // the pod's journal
	ConsoleFile      = "console.log"     // what the guest's console has shown
)

// Status is where a container is in its life.
type Status string

// The statuses of the OCI runtime-spec, and paused as runc has it.
const (
	Creating Status = "creating" // reserved; its supervisor has not answered create yet
	Created  Status = "created"  // all but the user's program is there
	Running  Status = "running"  // the user's program runs
	Paused   Status = "paused"   // all its processes are frozen
	Stopped  Status = "stopped"  // its init has exited, or its supervisor is dead
)

func (s Status) known() bool {
	switch s {
	case Creating, Created, Running, Paused, Stopped:
		return true
	}
	return false
}

// Container is what state.json holds. Its supervisor writes it at each
// transition; see Store.Live for what its Status means when the supervisor is
// dead.
type Container struct {
	Version     int               `json:"version"` // set by the Store
	ID          string            `json:"id"`
	PodID       string            `json:"podId"`
	Bundle      string            `json:"bundle"`     // absolute path
	Rootfs      string            `json:"rootfs"`     // absolute path
	OCIVersion  string            `json:"ociVersion"` // of the bundle
	Status      Status            `json:"status"`
	Creator     Process           `json:"creator"` // that reserved the id; set by the Store
	StandIn     Process           `json:"standIn"` // zero: none yet, or none at all
	Created     time.Time         `json:"created"`
	ExitStatus  *uint32           `json:"exitStatus,omitempty"` // of init, 0..255
	ExitedAt    *time.Time        `json:"exitedAt,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       int               `json:"owner"` // uid of who created it
	Terminal    bool              `json:"terminal"`
	// Hooks are the bundle's. The supervisor sets them when it begins to make the container; from
	// then on whoever removes the record runs the poststop hooks afterwards.
	Hooks specs.Hooks `json:"hooks,omitzero"`
	// LostWatches are sources of bind mounts whose changes watches in the container do not see any more, each
	// with the reason.
	LostWatches []string `json:"lostWatches,omitempty"`
	// NetNS is the network namespace of the host that the container is in. It is set when the
	// container is created; a container that another brings into its own network has it, too.
	NetNS NetNS `json:"netNS,omitzero"`
	// Cgroup is the container's own on the host, which a further container of a pod has. It is removed when the container has
	// ended, before its record.
	Cgroup hostcgroup.Record `json:"cgroup,omitzero"`
	// Writable are the directories and files of the host that the container can write to by its bind mounts.
	Writable []Tree `json:"writable,omitempty"`
}

// Tree is a directory or file of the host.
type Tree struct {
	Path string `json:"path"` // absolute, without symbolic links
	Dev  uint64 `json:"dev"`
	Ino  uint64 `json:"ino"`
}

// Overlaps tells whether two trees have files in common: they are the same, or one is below the other.
func (t Tree) Overlaps(o Tree) bool {
	below := func(path, dir string) bool { return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") }
	return t.Ino != 0 && t.Dev == o.Dev && t.Ino == o.Ino || below(t.Path, o.Path) || below(o.Path, t.Path)
}

// NetNS is a network namespace of the host. Zero: none.
type NetNS struct {
	Path string `json:"path"` // that led to it when the container was created
	Dev  uint64 `json:"dev"`  // of its file, which with the inode tells it from others
	Ino  uint64 `json:"ino"`
}

// Same tells whether both are the same namespace, whatever paths lead there. None is not the same
// as none.
func (n NetNS) Same(m NetNS) bool { return n.Ino != 0 && n.Dev == m.Dev && n.Ino == m.Ino }

// Pod is what pod.json holds.
type Pod struct {
	Version     int       `json:"version"` // set by the Store
	ID          string    `json:"id"`
	Creator     Process   `json:"creator"`    // that created the pod; set by the Store
	Supervisor  Process   `json:"supervisor"` // zero until it runs
	VM          []Process `json:"vm,omitempty"`
	Driver      string    `json:"driver,omitempty"`
	Accel       string    `json:"accel,omitempty"`
	AccelNote   string    `json:"accelNote,omitempty"` // why this accelerator
	Kernel      string    `json:"kernel,omitempty"`    // release of the guest's kernel
	VCPUs       int       `json:"vcpus,omitempty"`
	MemoryBytes int64     `json:"memoryBytes,omitempty"`
	Created     time.Time `json:"created"`
	Phases      []Phase   `json:"phases,omitempty"`
	Command     []string  `json:"command,omitempty"` // that started the VMM
	Failure     string    `json:"failure,omitempty"` // why the VM ended, if nobody asked it to
	// Cgroup is the pod's on the host, which is that of its first container. It is removed after the pod, when no container names that any
	// more.
	Cgroup hostcgroup.Record `json:"cgroup,omitzero"`
	// Networks are what mirrors the pod's network namespaces has made there, to be removed when the VM has
	// ended.
	Networks []network.Record `json:"networks,omitempty"`
}

// Phase is one timed step of the pod's start.
type Phase struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"ms"` // milliseconds in JSON
}

type phaseJSON struct {
	Name string  `json:"name"`
	MS   float64 `json:"ms"`
}

// MarshalJSON writes the duration as milliseconds.
func (p Phase) MarshalJSON() ([]byte, error) {
	return json.Marshal(phaseJSON{p.Name, float64(p.Duration) / float64(time.Millisecond)})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (p *Phase) UnmarshalJSON(data []byte) error {
	var j phaseJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	ns := math.Round(j.MS * float64(time.Millisecond))
	if !(ns >= 0 && ns < 1<<53) { // beyond, milliseconds do not round-trip; a NaN fails, too
		return fmt.Errorf("phase %q: duration of %g ms", j.Name, j.MS)
	}
	*p = Phase{j.Name, time.Duration(ns)}
	return nil
}

// DecodeContainer decodes and validates a state file. Errors:
// errdefs.ErrDataLoss for one that is damaged, errdefs.ErrFailedPrecondition
// for one of a newer version.
func DecodeContainer(data []byte) (Container, error) {
	var c Container
	if err := decode(data, &c); err != nil {
		return Container{}, err
	}
	return c, c.validate()
}

// DecodePod decodes and validates a pod file. Errors as DecodeContainer.
func DecodePod(data []byte) (Pod, error) {
	var p Pod
	if err := decode(data, &p); err != nil {
		return Pod{}, err
	}
	return p, p.validate()
}

func (c *Container) validate() error {
	switch {
	case !validName(c.ID):
		return damaged("id %q", shorten(c.ID))
	case !validName(c.PodID):
		return damaged("podId %q", shorten(c.PodID))
	case !c.Status.known():
		return damaged("status %q", shorten(string(c.Status)))
	case c.ExitStatus != nil && *c.ExitStatus > 255:
		return damaged("exitStatus %d", *c.ExitStatus)
	case c.Owner < 0:
		return damaged("owner %d", c.Owner)
	case c.Created.IsZero():
		return damaged("no created")
	case len(c.LostWatches) > maxLost:
		return damaged("%d entries in lostWatches", len(c.LostWatches))
	}
	if err := c.Cgroup.Validate(); err != nil {
		return damaged("%v", err)
	}
	if err := c.Creator.validate("creator"); err != nil {
		return err
	}
	return c.StandIn.validate("standIn")
}

func (p *Pod) validate() error {
	switch {
	case !validName(p.ID):
		return damaged("id %q", shorten(p.ID))
	case len(p.VM) > maxVM:
		return damaged("%d entries in vm", len(p.VM))
	case len(p.Phases) > MaxPhases:
		return damaged("%d entries in phases", len(p.Phases))
	case len(p.Networks) > maxNets:
		return damaged("%d entries in networks", len(p.Networks))
	case p.VCPUs < 0:
		return damaged("vcpus %d", p.VCPUs)
	case p.MemoryBytes < 0:
		return damaged("memoryBytes %d", p.MemoryBytes)
	case p.Created.IsZero():
		return damaged("no created")
	}
	for i, vm := range p.VM {
		if err := vm.validate(fmt.Sprintf("vm[%d]", i)); err != nil {
			return err
		}
		if vm.IsZero() {
			return damaged("vm[%d] is no process", i)
		}
	}
	if err := p.Cgroup.Validate(); err != nil {
		return damaged("%v", err)
	}
	if err := p.Creator.validate("creator"); err != nil {
		return err
	}
	return p.Supervisor.validate("supervisor")
}

// decode reads one JSON value of a version that this package knows.
func decode(data []byte, into any) error {
	if len(data) > maxFile {
		return damaged("larger than %d bytes", maxFile)
	}
	var head struct {
		Version int `json:"version"`
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&head); err != nil {
		return damaged("%v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return damaged("data after the end")
	}
	switch {
	case head.Version > Version:
		return errdefs.ErrFailedPrecondition.WithMessage(
			fmt.Sprintf("state file written by a newer runv: version %d, this is %d", head.Version, Version))
	case head.Version < 1:
		return damaged("version %d", head.Version)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return damaged("%v", err)
	}
	return nil
}

// encode is the inverse of decode; it refuses what decode would.
func encode(v any) ([]byte, error) {
	data, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return nil, err
	}
	if data = append(data, '\n'); len(data) > maxFile {
		return nil, errdefs.ErrInvalidArgument.WithMessage(
			fmt.Sprintf("state of %d bytes is larger than %d", len(data), maxFile))
	}
	return data, nil
}

func damaged(format string, args ...any) error {
	return errdefs.ErrDataLoss.WithMessage("damaged state file: " + fmt.Sprintf(format, args...))
}

// validName tells whether an id can name a directory of its own.
func validName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxName &&
		!strings.ContainsAny(name, "/\x00")
}

// shorten keeps hostile text from filling an error message.
func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}
