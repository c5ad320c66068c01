// Package stage is what a container's process does before it becomes the user's
// program: started in new namespaces (init) or to join those of a container
// (exec), it makes of itself what the specification says, and ends in execve.
//
// internal/guest/launch starts it. cmd/runv-init calls Main, and cmd/runv-agent does when
// it runs under the name Name. The package's imports are few, since every exec waits for
// their initialization.
//
// The steps of init, in order: mounts, pivot_root, terminal, read-only and masked paths, limits,
// the user and its privileges, look up the program, createContainer hooks, report ready, wait for
// the start, seccomp, startContainer hooks, execve. Those of exec: join, terminal, the same from
// limits on, seccomp, execve.
package stage

import (
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Name is argv[0] of a stage.
const Name = "runv-init"

// Descriptors that a stage inherits besides 0, 1 and 2.
const (
	controlFD = 3 // SOCK_SEQPACKET socket to the agent
	configFD  = 4 // file with an encoded Config
	targetFD  = 5 // exec: pidfd of the container's init
	devicesFD = 6 // init in a user namespace: a detached file system of device nodes
	// From here on: what entry enters.
)

// Config tells a stage what to do.
type Config struct {
	Process   Process
	Container *Container // init
	Join      int        // exec: the CLONE_NEW* of the namespaces to join, but for those of entry
	// UserNS tells that the process is in a user namespace of the container's. It waits for the
	// agent first, which does what takes rights outside: limits, the score for the OOM killer, and
	// sysctls.
	UserNS bool
}

// Process is the user's program.
type Process struct {
	Args         []string
	Env          []string
	Cwd          string
	UID, GID     uint32
	Groups       []uint32
	Umask        *uint32
	Capabilities Capabilities
	Rlimits      []Rlimit
	NoNewPrivs   bool
	OOMScoreAdj  *int
	Scheduler    *Scheduler
	IOPriority   *uint32 // as ioprio_set(2) takes it
	Affinity     Affinity
	// What it has of its caller: as /proc/PID/coredump_filter has it, nil to leave; ns, 0 to leave; SECBIT_*.
	CoredumpFilter *uint32
	TimerSlack     uint64
	Securebits     uint32
	THPDisable     bool // no transparent huge pages

	Terminal bool
	Width    uint16 // of the terminal; 0: leave
	Height   uint16
	Shared   Shared
}

// Shared is what all processes of a container have in common.
type Shared struct {
	Seccomp      *Seccomp // nil: none
	Keyring      string   // session keyring by name; empty: that of the agent
	Personality  *uint32  // as personality(2) takes it
	MemoryPolicy *MemoryPolicy
}

// Scheduler is what sched_setattr(2) takes.
type Scheduler struct {
	Policy                    uint32
	Flags                     uint64
	Nice                      int32
	Priority                  uint32
	Runtime, Deadline, Period uint64 // ns
}

// Affinity is where an exec may run: while it is set up, and as the program. nil: leave.
type Affinity struct {
	Initial, Final *unix.CPUSet
}

// MemoryPolicy is what set_mempolicy(2) takes.
type MemoryPolicy struct {
	Mode  int // MPOL_*, with MPOL_F_*
	Nodes unix.CPUSet
}

// Seccomp is a filter of system calls.
type Seccomp struct {
	Program []uint64 // each the eight bytes of a struct sock_filter
	Flags   uint32   // SECCOMP_FILTER_FLAG_*
}

// InstructionSize is the length of a struct sock_filter, in bytes.
const InstructionSize = 8

// Capabilities are sets of capabilities: bit n is capability n.
type Capabilities struct {
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
}

// Rlimit is a limit by its RLIMIT_* number.
type Rlimit struct {
	Resource   int
	Soft, Hard uint64
}

// Container is what init makes around the process.
type Container struct {
	Root            string // directory outside
	ReadonlyRoot    bool
	RootPropagation uintptr // MS_SHARED and so on, with MS_REC; 0: MS_SLAVE|MS_REC
	Hostname        string
	Domainname      string
	NewCgroupNS     bool
	NewNetNS        bool
	Mounts          []Mount
	Devices         []Device // DefaultDevices are among them
	MaskedPaths     []string
	ReadonlyPaths   []string
	Sysctl          []Sysctl
	Hooks           Hooks
}

// Hooks run in the container, as the process that becomes the user's program.
type Hooks struct {
	Create, Start []specs.Hook
	// The OCI state in JSON that each gets: what is before and after the value of pid.
	CreateState, StartState [2]string
}

// Sysctl is a kernel parameter.
type Sysctl struct{ Name, Value string }

// OfUserNS tells whether the parameter is one of a user namespace, which only a process in it can set.
func (s Sysctl) OfUserNS() bool {
	return strings.HasPrefix(s.Name, "user.") || strings.HasPrefix(s.Name, "user/")
}

// Mount is one mount in the container.
type Mount struct {
	Destination string
	Type        string // "bind" for a bind mount
	Source      string
	Inside      bool    // a bind whose source is a path in the container, as it is when the mounts before have been made
	Flags       uintptr // MS_*, of a new file system or MS_REC of a bind
	Data        string
	Set, Clear  uint64    // MOUNT_ATTR_* of a bind
	RecSet      uint64    // MOUNT_ATTR_* of the mount and all below it
	RecClear    uint64    //
	Propagation []uintptr // MS_PRIVATE and so on
	CopyUp      bool      // tmpfs: begin with what the directory holds
}

// Device is a device node.
type Device struct {
	Path         string
	Mode         uint32 // type and permissions
	Major, Minor uint32
	UID, GID     uint32
	// Node is the name of the node in the file system of devicesFD to mount at Path, for who may
	// not make device nodes; empty: make one.
	Node string
}
