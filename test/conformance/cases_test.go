package conformance

import (
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// differentials are the cases. A VM boots for each, at least.
var differentials = []differential{
	{
		name: "default", about: "the bundle of `spec`; exec of the probe", short: true,
	},
	{
		name: "foreground", about: "the probe as PID 1, its output and status",
		edit: func(_ *trial, s *specs.Spec) { s.Process.Args = []string{"/bin/probe"} }, run: foreground,
	},
	{
		name: "rich", about: "much of config.json at once: user, groups, umask, capabilities, limits, mounts, devices, sysctl", short: true,
		edit: func(t *trial, s *specs.Spec) {
			user(s)
			limits(s)
			mounts(t, s)
			deviceNodes(t, s)
			sysctl(s)
			s.Hostname = "rich"
			s.Process.OOMScoreAdj = new(300)
			s.Process.Cwd = "/made/by/the/runtime"
			s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/etc/masked", "/data/masked", "/nosuch")
			s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, "/etc/readonly", "/nosuch")
			t.rootfs("etc/masked", "secret")
			t.rootfs("etc/readonly/file", "text")
		},
	},
	{
		name: "privileged", about: "all capabilities and devices, nothing masked, root writable",
		edit: func(_ *trial, s *specs.Spec) {
			s.Root.Readonly = false
			s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
			s.Process.NoNewPrivileges = false
			// Those that the oracle's machine lacks cannot be compared.
			caps := hostCapabilities()
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
			s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
			for i, m := range s.Mounts {
				if m.Destination == "/sys" {
					s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev"}
				}
			}
		},
	},
	{
		name: "least", about: "no optional part of config.json at all",
		edit: func(_ *trial, s *specs.Spec) {
			args := s.Process.Args
			*s = specs.Spec{
				Version: s.Version, Root: &specs.Root{Path: "rootfs"},
				Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
				Mounts:  s.Mounts[:1],
				Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}}},
			}
		},
	},
	{name: "user", about: "uid, gid, additional groups, umask", edit: func(_ *trial, s *specs.Spec) { user(s) }},
	{
		name: "capabilities", about: "five different sets",
		edit: func(_ *trial, s *specs.Spec) {
			s.Process.Capabilities = &specs.LinuxCapabilities{
				Bounding:    []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SETUID", "CAP_SYS_ADMIN"},
				Permitted:   []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SYS_ADMIN"},
				Effective:   []string{"CAP_CHOWN", "CAP_SYS_ADMIN"},
				Inheritable: []string{"CAP_KILL", "CAP_NET_RAW"},
				Ambient:     []string{"CAP_KILL"},
			}
		},
	},
	{
		name: "no-capabilities", about: "no capability in any set, as root",
		edit: func(_ *trial, s *specs.Spec) { s.Process.Capabilities = &specs.LinuxCapabilities{} },
	},
	{
		name: "unknown-capability", about: "a capability that no kernel has is ignored",
		edit: func(_ *trial, s *specs.Spec) {
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_FLY")
		},
	},
	{name: "limits", about: "every rlimit that an unprivileged machine can set", edit: func(_ *trial, s *specs.Spec) { limits(s) }},
	{
		name: "environment", about: "variables twice, empty, without PATH; HOME of the user; cwd that is made",
		edit: func(_ *trial, s *specs.Spec) {
			s.Process.Args = []string{"/bin/sleep", "100000"}
			s.Process.Env = []string{"A=1", "B=", "A=2", "SPACE=a b\tc", "UTF=ä", "EQ=a=b"}
			s.Process.Cwd = "/made/by/the/runtime"
		},
	},
	{name: "mounts", about: "file systems and binds with their options", edit: func(t *trial, s *specs.Spec) { mounts(t, s) }},
	{
		name: "propagation", about: "propagation of mounts of their own",
		edit: func(t *trial, s *specs.Spec) {
			s.Linux.RootfsPropagation = "rslave"
			for _, p := range []string{"private", "rprivate", "slave", "rslave", "unbindable", "runbindable"} {
				s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt/" + p, Type: "tmpfs", Source: "tmpfs", Options: []string{p}})
			}
		},
	},
	{
		name: "readonly-root", about: "root that is read-only, with volumes on it",
		edit: func(t *trial, s *specs.Spec) {
			s.Root.Readonly = true
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/volume", Type: "bind", Source: filepath.Dir(t.file("volume/file", "text")), Options: []string{"bind"}},
				specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"})
		},
	},
	{name: "devices", about: "device nodes, and rules of the device cgroup", edit: func(t *trial, s *specs.Spec) { deviceNodes(t, s) }},
	{name: "sysctl", about: "sysctls of the ipc, network and uts namespaces", edit: func(_ *trial, s *specs.Spec) { sysctl(s) }},
	{
		name: "seccomp", about: "a profile that denies what probes try", edit: func(_ *trial, s *specs.Spec) { profile(s) },
	},
	{
		name: "few-namespaces", about: "no ipc, uts and cgroup namespace",
		edit: func(_ *trial, s *specs.Spec) {
			s.Hostname = ""
			s.Linux.Namespaces = without(s.Linux.Namespaces, specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace)
		},
	},
	{
		name: "links-in-rootfs", about: "places of mounts that are symbolic links",
		edit: func(t *trial, s *specs.Spec) {
			root := filepath.Join(t.dir, "bundle", "rootfs")
			assert.NilError(t, os.MkdirAll(filepath.Join(root, "var", "data"), 0o755))
			assert.NilError(t, os.Symlink("/var/data", filepath.Join(root, "data")))
			assert.NilError(t, os.Symlink("../../../../../../var/data", filepath.Join(root, "volume")))
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/data/sub", Type: "tmpfs", Source: "tmpfs"},
				specs.Mount{Destination: "/volume/other", Type: "tmpfs", Source: "tmpfs"})
		},
	},
	{name: "verbs", about: "every command in every state of a container: status and message", short: true, run: verbs},
	{name: "endings", about: "exit status, output and message of added processes", run: endings},
	{name: "inits", about: "the same of `run`", run: inits},
	{name: "refusals", about: "configurations and ids that cannot work", run: refusals},
	{
		name: "documents", about: "what `state`, `list`, `ps`, `events --stats` and `spec` print", run: documents,
		edit: func(_ *trial, s *specs.Spec) { s.Annotations = map[string]string{"org.example.color": "blue"} },
	},
	{
		name: "terminals", about: "a terminal through a console socket: its owner, mode, settings", run: terminals,
		edit: func(_ *trial, s *specs.Spec) {
			user(s)
			s.Process.Args = []string{"/bin/probe"}
			s.Process.Terminal = true
			s.Process.ConsoleSize = &specs.Box{Width: 91, Height: 33}
		},
	},
	{name: "additions", about: "flags of `exec`, and process.json", run: additions},
}

func user(s *specs.Spec) {
	s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{2000, 5}, Umask: new(uint32(0o027))}
	s.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding:    []string{"CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_CHOWN"},
		Permitted:   []string{"CAP_NET_BIND_SERVICE", "CAP_KILL"},
		Effective:   []string{"CAP_NET_BIND_SERVICE", "CAP_KILL"},
		Inheritable: []string{"CAP_NET_BIND_SERVICE"},
		Ambient:     []string{"CAP_NET_BIND_SERVICE"},
	}
}

func limits(s *specs.Spec) {
	s.Process.Rlimits = nil
	for name, limit := range map[string][2]uint64{
		"RLIMIT_AS": {1 << 40, 1 << 41}, "RLIMIT_CORE": {0, 4096}, "RLIMIT_CPU": {1000, 2000}, "RLIMIT_DATA": {1 << 40, 1 << 41},
		"RLIMIT_FSIZE": {1 << 30, 1 << 31}, "RLIMIT_LOCKS": {7, 8}, "RLIMIT_MEMLOCK": {4096, 65536}, "RLIMIT_MSGQUEUE": {1000, 2000},
		"RLIMIT_NICE": {0, 0}, "RLIMIT_NOFILE": {77, 99}, "RLIMIT_NPROC": {1000, 1001}, "RLIMIT_RSS": {1 << 30, 1 << 31},
		"RLIMIT_RTPRIO": {0, 0}, "RLIMIT_RTTIME": {1000, 2000}, "RLIMIT_SIGPENDING": {10, 20}, "RLIMIT_STACK": {1 << 20, 1 << 23},
	} {
		s.Process.Rlimits = append(s.Process.Rlimits, specs.POSIXRlimit{Type: name, Soft: limit[0], Hard: limit[1]})
	}
}

func mounts(t *trial, s *specs.Spec) {
	dir := filepath.Dir(t.file("source/file", "text"))
	t.file("source/masked", "text")
	t.file("source/new", "text")
	one := t.file("one", "1")
	t.rootfs("copied/up/file", "text")
	assert.NilError(t, os.Chmod(filepath.Join(t.dir, "bundle", "rootfs", "copied", "up"), 0o1777))
	s.Root.Readonly = false
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "scratch", Options: []string{"nosuid", "nodev", "noexec", "mode=1770", "size=64k", "uid=7", "gid=8"}},
		specs.Mount{Destination: "/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"strictatime", "ro"}},
		specs.Mount{Destination: "/run/on/it", Type: "bind", Source: dir, Options: []string{"bind"}},
		specs.Mount{Destination: "/copied/up", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup"}},
		specs.Mount{Destination: "/data", Type: "bind", Source: dir, Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
		specs.Mount{Destination: "/volume", Type: "bind", Source: dir, Options: []string{"rbind", "rw", "noatime"}},
		specs.Mount{Destination: "/slave", Source: dir, Options: []string{"rbind", "rslave"}},
		specs.Mount{Destination: "/one", Type: "bind", Source: one, Options: []string{"bind", "ro"}},
		specs.Mount{Destination: "/made/by/mount", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/made/file", Type: "bind", Source: one, Options: []string{"bind"}},
		specs.Mount{Destination: "/volume/on/it", Type: "tmpfs", Source: "tmpfs", Options: []string{"nodiratime", "dirsync"}},
		specs.Mount{Destination: "/proc2", Type: "proc", Source: "proc", Options: []string{"ro", "nosuid"}},
	)
}

func deviceNodes(_ *trial, s *specs.Spec) {
	s.Root.Readonly = false
	mode := os.FileMode(0o640)
	s.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: &mode, UID: new(uint32(7)), GID: new(uint32(8))},
		{Path: "/dev/sub/dir/loop0", Type: "b", Major: 7, Minor: 0},
		{Path: "/dev/queue", Type: "p", FileMode: &mode},
		{Path: "/dev/unbuffered", Type: "u", Major: 1, Minor: 7},
		{Path: "/outside", Type: "c", Major: 1, Minor: 3, FileMode: &mode},
	}
	if s.Process.Capabilities != nil {
		s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_MKNOD")
		s.Process.Capabilities.Permitted = append(s.Process.Capabilities.Permitted, "CAP_MKNOD")
		s.Process.Capabilities.Effective = append(s.Process.Capabilities.Effective, "CAP_MKNOD")
	}
	s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Major: new(int64(1)), Minor: new(int64(11)), Access: "r"},
		{Allow: true, Type: "c", Major: new(int64(10)), Minor: new(int64(229)), Access: "rw"},
		{Allow: true, Type: "b", Major: new(int64(7)), Minor: new(int64(-1)), Access: "m"},
		{Allow: true, Type: "c", Major: new(int64(10)), Minor: new(int64(200)), Access: "rm"},
		{Allow: false, Type: "c", Major: new(int64(10)), Minor: new(int64(200)), Access: "r"},
	}}
}

func sysctl(s *specs.Spec) {
	s.Linux.Sysctl = map[string]string{
		"net.ipv4.ip_forward":          "1",
		"net/ipv4/ping_group_range":    "0 7",
		"net.core.somaxconn":           "77",
		"kernel.msgmax":                "7777",
		"kernel.shm_rmid_forced":       "1",
		"kernel.sem":                   "200 20000 50 100",
		"fs.mqueue.msg_max":            "7",
		"net.ipv4.ip_local_port_range": "2000 3000",
	}
}

// profile forbids some of what the probe tries, in the ways that filters have.
func profile(s *specs.Spec) {
	deny := func(errno uint, args []specs.LinuxSeccompArg, names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: specs.ActErrno, ErrnoRet: &errno, Args: args}
	}
	s.Process.NoNewPrivileges = false
	s.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"kcmp", "nosuchcall"}, Action: specs.ActErrno},
			deny(uint(unix.ENOSYS), nil, "clone3"),
			deny(uint(unix.EXDEV), nil, "mount", "umount2", "pivot_root"),
			deny(uint(unix.ERANGE), []specs.LinuxSeccompArg{{Index: 0, Value: 1000, Op: specs.OpGreaterThan}}, "socket"),
			deny(uint(unix.EDOM), []specs.LinuxSeccompArg{{Index: 0, Value: unix.CLONE_NEWNS, ValueTwo: unix.CLONE_NEWNS, Op: specs.OpMaskedEqual}}, "unshare"),
			deny(uint(unix.EMLINK), []specs.LinuxSeccompArg{{Index: 0, Value: 0xffffffff, Op: specs.OpEqualTo}}, "personality"),
			{Names: []string{"acct"}, Action: specs.ActLog},
		},
	}
}

// rootfs makes a file in the root file system of the trial's bundle.
func (t *trial) rootfs(path, text string) { t.file(filepath.Join("bundle", "rootfs", path), text) }

// hostCapabilities are those that this process has, by the names of the specification.
func hostCapabilities() []string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return nil
	}
	names := strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
		NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
		SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
		MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)
	var has []string
	for i, name := range names {
		if data[i/32].Permitted&(1<<(i%32)) != 0 {
			has = append(has, "CAP_"+name)
		}
	}
	return has
}
