package archtest_test

// A pattern names packages of this module without the module's path: a package, or with "/..." at
// its end a package and all below it.

// An importRule limits what packages may import from this module. Imports of tests are free.
type importRule struct {
	// from are patterns; except takes packages out again.
	from, except []string
	// only are the patterns that may be imported; nil sets no limit, an empty list allows none. A
	// package may always import those below it.
	only []string
	// never are patterns that may not be imported.
	never []string
	why   string
}

func importRules() []importRule {
	return []importRule{
		{
			from: []string{"cmd/..."},
			only: []string{"internal/cli", "internal/hostcgroup", "internal/shareserver", "internal/standin", "internal/supervisor", "internal/guest/..."},
			why:  "a main parses, wires and runs one of the program's faces",
		},
		{
			from: []string{"api/..."},
			only: []string{},
			why:  "a contract depends on neither of its sides",
		},
		{
			from: []string{"internal/guest/..."},
			only: []string{"api/agent/...", "internal/cpulist", "internal/guest/...", "internal/hook", "internal/resolver", "internal/transport"},
			why:  "the guest shares the agent's API, the transport, the carrying of DNS queries, the running of hooks and the reading of CPU lists with the host, nothing else",
		},
		{
			from: []string{"..."}, except: []string{"internal/guest/...", "cmd/runv-agent", "cmd/runv-init", "test/..."},
			never: []string{"internal/guest/..."},
			why:   "code of the guest runs on the host by nobody's wish",
		},
		{
			from: []string{"internal/hypervisor"},
			only: []string{"internal/console"},
			why:  "the contract of the drivers knows no driver and no caller",
		},
		{
			from: []string{"internal/hypervisor/..."}, except: []string{"internal/hypervisor"},
			only: []string{"internal/hypervisor", "internal/console", "internal/transport", "internal/unixsock"},
			why:  "a driver knows its contract, never another driver",
		},
		{
			from: []string{"internal/hypervisor/qemu/qmp"},
			only: []string{},
			why:  "the protocol's client knows nothing of those who use it",
		},
		{
			from:  []string{"internal/pod"},
			never: []string{"internal/cli", "internal/config", "internal/supervisor", "internal/hypervisor/qemu/...", "internal/hypervisor/fake"},
			why:   "the pod is handed its parts by the supervisor, behind interfaces that it declares",
		},
		{
			from: []string{"internal/cli"},
			never: []string{
				"api/agent/...", "internal/agentclient", "internal/factory", "internal/pod", "internal/supervisor",
				"internal/transport",
			},
			why: "the command line talks to a pod through the supervisor's API or reads its state from disk",
		},
		{
			from: []string{"..."}, except: []string{"cmd/...", "test/..."},
			never: []string{"internal/cli", "internal/supervisor", "cmd/...", "image/mkguest", "test/..."},
			why:   "these are the top: they see the others, no one sees them",
		},
		{
			from:  []string{"internal/agentclient", "internal/factory"},
			never: []string{"internal/hypervisor/qemu/...", "internal/hypervisor/fake", "internal/pod"},
			why:   "they serve the pod and take any driver",
		},
		{
			from: []string{"internal/bundle"},
			only: []string{"internal/cpulist"},
			why:  "it judges a document; what it needs to know of the guest is in its own table",
		},
		{
			from: []string{"internal/network"},
			only: []string{"api/agent/...", "internal/hypervisor", "internal/mountns"},
			why:  "it plugs cards into any VM and tells any agent; the pod decides when",
		},
		{
			from: []string{"internal/mirror"},
			only: []string{"api/agent/..."},
			why:  "it gets open trees and tells any agent; which binds are mirrored the pod decides",
		},
		{
			from: []string{
				"internal/caller", "internal/console", "internal/cpulist", "internal/hook", "internal/hostcgroup", "internal/journal",
				"internal/mountns", "internal/resolver", "internal/rpcerror", "internal/stdio", "internal/transport", "internal/unixsock",
				"internal/vhostuser",
			},
			only: []string{},
			why:  "leaves: each can be read, tested and used alone",
		},
		{
			from: []string{"internal/config", "internal/join", "internal/standin", "internal/state", "internal/storage"},
			never: []string{
				"api/...", "internal/agentclient", "internal/cli", "internal/factory", "internal/hypervisor/...",
				"internal/pod", "internal/supervisor",
			},
			why: "what lies below the pod does not look up",
		},
		{
			from: []string{"internal/shareserver"},
			only: []string{"internal/bundle/seccomp", "internal/sharefs", "internal/vhostuser"},
			why:  "the confined process consists of what it needs to serve, and of what confines it",
		},
		{
			from: []string{"image/..."},
			only: []string{"image/..."},
			why:  "the builder of the guest runs where nothing of runv is installed yet",
		},
	}
}

// A binaryRule names packages that a program must not contain, however it came to them.
type binaryRule struct {
	program string
	// never are full import paths. Each must be part of another program, else the rule is out of
	// date.
	never []string
	why   string
}

func binaryRules() []binaryRule {
	return []binaryRule{
		{
			program: "cmd/runv-agent",
			never:   []string{"google.golang.org/grpc", "net/http"},
			why:     "the agent is loaded into every VM, and these are larger than it is",
		},
		{
			program: "cmd/runv-agent",
			never:   []string{"testing"},
			why:     "helpers of tests stay in tests",
		},
		{
			program: "cmd/runv-init",
			never:   []string{"github.com/containerd/ttrpc", "google.golang.org/protobuf/proto", "net", "testing"},
			why:     "each exec waits for it to start, and these take longer to initialize than all that it does",
		},
		{
			program: "cmd/runv",
			never:   []string{"testing"},
			why:     "helpers of tests stay in tests",
		},
	}
}
