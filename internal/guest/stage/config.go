// Package stage is what a container's process does before it becomes the user's
// program: it is the agent's own executable again, started in new namespaces (init)
// or to join those of a container (exec), and ends in execve.
//
// internal/guest/container starts it with Command and talks to it over Control;
// cmd/runv-agent calls Main when it runs under the name Name. Everything in the
// container's root file system is hostile: no path in it is used but through
// descriptors that were resolved inside that root.
//
// The steps of init, in order: mounts, pivot_root, terminal, read-only and masked
// paths, limits, the user and its privileges, look up the program, report ready,
// wait for the start, execve. Those of exec: join, terminal, the same from
// limits on, execve.
package stage

// Name is argv[0] of a stage.
const Name = "runv-init"

// Descriptors that a stage inherits besides 0, 1 and 2.
const (
	controlFD = 3 // SOCK_SEQPACKET socket to the agent
	configFD  = 4 // Config as JSON, at offset 0
	targetFD  = 5 // exec: pidfd of the container's init
)

// Config tells a stage what to do.
type Config struct {
	Process   Process
	Container *Container // init
	Join      int        // exec: the CLONE_NEW* of the namespaces to join
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
	Terminal     bool
	Width        uint16 // of the terminal; 0: leave
	Height       uint16
}

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
	Mounts          []Mount
	Devices         []Device
	MaskedPaths     []string
	ReadonlyPaths   []string
	Sysctl          map[string]string
}

// Mount is one mount in the container.
type Mount struct {
	Destination string
	Type        string // "bind" for a bind mount
	Source      string
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
}

// reply is what a stage tells the agent: an error or, without one, that it is
// ready. A ready process with a terminal sends the master along.
type reply struct {
	Error string `json:",omitempty"`
	Kind  string `json:",omitempty"` // see fault.Kind
}
