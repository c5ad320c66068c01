package container

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
	"runv/internal/guest/stage"
)

// namespaces are those of a container, as far as they are not the guest's.
type namespaces struct {
	flags    int                    // CLONE_NEW*: its own and those of others
	own      int                    // CLONE_NEW*: those that it gets for itself
	refs     []ref                  // what it asks for of others
	from     []joined               // what that is, while init is made
	network  string                 // id of its network; empty: none
	uid, gid []specs.LinuxIDMapping // of the user namespace
	clocks   []byte                 // offsets of the time namespace, as timens_offsets takes them
}

// kinds are the namespaces that a container can have.
var kinds = map[specs.LinuxNamespaceType]int{
	specs.PIDNamespace:     unix.CLONE_NEWPID,
	specs.MountNamespace:   unix.CLONE_NEWNS,
	specs.IPCNamespace:     unix.CLONE_NEWIPC,
	specs.UTSNamespace:     unix.CLONE_NEWUTS,
	specs.CgroupNamespace:  unix.CLONE_NEWCGROUP,
	specs.UserNamespace:    unix.CLONE_NEWUSER,
	specs.TimeNamespace:    unix.CLONE_NEWTIME,
	specs.NetworkNamespace: unix.CLONE_NEWNET,
}

func translateNamespaces(l *specs.Linux) (ns namespaces, err error) {
	for _, n := range l.Namespaces {
		flag, ok := kinds[n.Type]
		if !ok {
			return ns, fault.New(errdefs.ErrNotImplemented, "linux.namespaces: type %q is not supported", n.Type)
		}
		ns.flags |= flag
		switch {
		case n.Path == "":
			ns.own |= flag
		case flag == unix.CLONE_NEWNS:
			return ns, fault.New(errdefs.ErrNotImplemented, "linux.namespaces: a mount namespace cannot be joined")
		case strings.HasPrefix(n.Path, containerPath), strings.HasPrefix(n.Path, networkPath) && flag == unix.CLONE_NEWNET:
			ns.refs = append(ns.refs, ref{kind: n.Type, flag: flag, path: n.Path})
		default:
			return ns, invalid("linux.namespaces: path %q of type %s names neither a container nor a network", n.Path, n.Type)
		}
	}
	if ns.own&unix.CLONE_NEWNS == 0 {
		return ns, invalid("linux.namespaces: a mount namespace is needed")
	}
	uids, gids := len(l.UIDMappings) > 0, len(l.GIDMappings) > 0
	if uids != gids || uids && !ns.user() || !uids && ns.own&unix.CLONE_NEWUSER != 0 {
		return ns, invalid("linux.uidMappings, linux.gidMappings: belong to a user namespace, and it needs both")
	}
	ns.uid, ns.gid = l.UIDMappings, l.GIDMappings
	if len(l.TimeOffsets) > 0 && ns.own&unix.CLONE_NEWTIME == 0 {
		return ns, invalid("linux.timeOffsets: belong to a time namespace of its own")
	}
	for _, clock := range slices.Sorted(maps.Keys(l.TimeOffsets)) {
		if clock != "monotonic" && clock != "boottime" {
			return ns, invalid("linux.timeOffsets: unknown clock %q", clock)
		}
		ns.clocks = fmt.Appendf(ns.clocks, "%s %d %d\n", clock, l.TimeOffsets[clock].Secs, l.TimeOffsets[clock].Nanosecs)
	}
	return ns, nil
}

func (ns *namespaces) user() bool { return ns.flags&unix.CLONE_NEWUSER != 0 }

// seesGuestCgroups tells of a container whose mount of control groups is the guest's. In a user namespace only the owner
// of a cgroup namespace may mount its groups; outside any cgroup namespace a mount would set the options of all others anew.
func (ns *namespaces) seesGuestCgroups() bool {
	return ns.flags&unix.CLONE_NEWCGROUP == 0 || ns.user() && ns.own&unix.CLONE_NEWCGROUP == 0
}

// singleThreaded are the namespaces that a process can enter only as long as it has one thread.
const singleThreaded = unix.CLONE_NEWUSER | unix.CLONE_NEWTIME

// enteredAlone are those namespaces of others that an init enters itself. From within a cgroup namespace
// nobody can be born in a group that is not below its root.
const enteredAlone = singleThreaded | unix.CLONE_NEWCGROUP

// madeFlags are those of the namespaces that init is born in. The root of a cgroup
// namespace is the group that the process is in, so it can be made only after the clone has put the
// process there; a time namespace begins with the thread that has made it.
func (ns *namespaces) madeFlags() int {
	return ns.own &^ (unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME)
}

// become makes init the root of its own user namespace.
func (ns *namespaces) become(attr *syscall.SysProcAttr) {
	if ns.own&unix.CLONE_NEWUSER == 0 {
		return
	}
	attr.UidMappings, attr.GidMappings = idMap(ns.uid), idMap(ns.gid)
	attr.GidMappingsEnableSetgroups = true
	// An execve by somebody who is nobody in the namespace would lose all capabilities.
	attr.Credential = &syscall.Credential{}
}

func idMap(list []specs.LinuxIDMapping) []syscall.SysProcIDMap {
	ids := make([]syscall.SysProcIDMap, len(list))
	for i, m := range list {
		ids[i] = syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)}
	}
	return ids
}

// owner returns who in the guest a user and group of the container are; nobody, if not mapped.
func (ns *namespaces) owner(uid, gid uint32) (int, int) {
	return outside(ns.uid, uid), outside(ns.gid, gid)
}

func outside(list []specs.LinuxIDMapping, id uint32) int {
	for _, m := range list {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return int(m.HostID + (id - m.ContainerID))
		}
	}
	return math.MaxUint16 - 1
}

// newDevices makes the nodes of devices for a container that may make none of its own: on a file
// system that is attached nowhere. Devices that need them get their names.
func (ns *namespaces) newDevices(devices []stage.Device) (_ *os.File, err error) {
	fs, err := newTmpfs()
	if err != nil {
		return nil, fmt.Errorf("make file system for devices: %w", err)
	}
	defer func() {
		if err != nil {
			fs.Close()
		}
	}()
	defaults := len(devices) - len(stage.DefaultDevices())
	seen := make(map[string]bool)
	for i := range devices {
		d := &devices[i]
		kind := d.Mode & unix.S_IFMT
		path := filepath.Clean(d.Path)
		if (kind != unix.S_IFCHR && kind != unix.S_IFBLK) || seen[path] {
			continue
		}
		seen[path] = true
		name := strconv.Itoa(i)
		if err := unix.Mknodat(int(fs.Fd()), name, d.Mode, int(unix.Mkdev(d.Major, d.Minor))); err != nil {
			return nil, fmt.Errorf("make device %s: %w", d.Path, err)
		}
		if err := unix.Fchmodat(int(fs.Fd()), name, d.Mode&0o7777, 0); err != nil { // in spite of the umask
			return nil, fmt.Errorf("make device %s: %w", d.Path, err)
		}
		if i < defaults { // as everywhere, the others belong to the machine's root
			uid, gid := ns.owner(d.UID, d.GID)
			if err := unix.Fchownat(int(fs.Fd()), name, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return nil, fmt.Errorf("make device %s: %w", d.Path, err)
			}
		}
		d.Node = name
	}
	return fs, nil
}

func newTmpfs() (*os.File, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fsfd)
	for _, option := range [][2]string{{"source", "devices"}, {"mode", "0755"}} {
		if err := unix.FsconfigSetString(fsfd, option[0], option[1]); err != nil {
			return nil, err
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, err
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "devices"), nil
}

// inTimeNS makes the time namespace and calls f on the thread that has made it, whose children,
// if they share no memory with it, are born there.
func (ns *namespaces) inTimeNS(f func(timeNS *os.File) error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread cannot go back, so it ends with the goroutine.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWTIME); err != nil {
				return fmt.Errorf("make time namespace: %w", err)
			}
			if len(ns.clocks) > 0 {
				// Not below thread-self: there is no such file.
				err := os.WriteFile(fmt.Sprintf("/proc/%d/timens_offsets", unix.Gettid()), ns.clocks, 0)
				if errors.Is(err, unix.ERANGE) {
					return invalid("linux.timeOffsets: a clock would be below zero or out of range; it counts from the VM's boot: %w", fault.Cause(err))
				}
				if err != nil {
					return fmt.Errorf("set linux.timeOffsets: %w", fault.Cause(err))
				}
			}
			file, err := os.Open("/proc/thread-self/ns/time_for_children")
			if err != nil {
				return fmt.Errorf("open time namespace: %w", err)
			}
			defer file.Close()
			return f(file)
		}()
	}()
	return <-done
}

// settle does what a process in a user namespace has no right to do itself. The caller makes sure that
// pid is still the process.
func (ns *namespaces) settle(pid int, p *stage.Process) error {
	if err := p.SetProcFiles(fmt.Sprintf("/proc/%d", pid)); err != nil {
		return err
	}
	// The process lowers its limits itself, when it needs no more than its program.
	for _, l := range p.Limits() {
		var now unix.Rlimit
		if err := unix.Prlimit(pid, l.Resource, nil, &now); err != nil {
			return fmt.Errorf("read rlimit %d: %w", l.Resource, err)
		}
		if l.Soft <= now.Cur && l.Hard <= now.Max {
			continue
		}
		most := unix.Rlimit{Cur: max(now.Cur, l.Soft), Max: max(now.Max, l.Hard)}
		if err := unix.Prlimit(pid, l.Resource, &most, nil); err != nil {
			return fmt.Errorf("set rlimit %d: %w", l.Resource, err)
		}
	}
	return nil
}

// writeSysctl writes kernel parameters of a process's namespaces.
func (ns *namespaces) writeSysctl(pidfd *os.File, values []stage.Sysctl) error {
	flags := ns.flags & (unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked, as in inTimeNS
		done <- func() error {
			dir, err := os.Open("/proc/sys")
			if err != nil {
				return err
			}
			defer dir.Close()
			if err := unix.Setns(int(pidfd.Fd()), flags); err != nil {
				return fmt.Errorf("join namespaces to set linux.sysctl: %w", err)
			}
			for _, v := range values {
				if v.OfUserNS() {
					continue
				}
				one := func() error { return stage.WriteSysctl(int(dir.Fd()), []stage.Sysctl{v}) }
				err := one()
				if errors.Is(err, unix.EACCES) {
					err = ns.asRoot(one)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	return <-done
}

// asRoot calls f with the user that is the user namespace's root, on a thread that is not used for
// anything else. Since Linux 6.9 some sysctls are that user's; before they were the machine's.
func (ns *namespaces) asRoot(f func() error) error {
	const keep = ^uintptr(0)
	setEUID := func(uid int) error {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			return fmt.Errorf("become user %d: %w", uid, errno)
		}
		return nil
	}
	uid, _ := ns.owner(0, 0)
	if err := setEUID(uid); err != nil {
		return err
	}
	return errors.Join(f(), setEUID(0))
}

// delegate gives the container's root its control group, as far as the kernel means
// groups to be given away.
func (ns *namespaces) delegate(group int) error {
	data, err := os.ReadFile("/sys/kernel/cgroup/delegate")
	if err != nil {
		return fmt.Errorf("delegate cgroup: %w", err)
	}
	uid, _ := ns.owner(0, 0)
	if err := unix.Fchownat(group, "", uid, -1, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("delegate cgroup: %w", err)
	}
	for name := range strings.FieldsSeq(string(data)) {
		err := unix.Fchownat(group, name, uid, -1, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.ENOENT) { // of a controller that is not on
			return fmt.Errorf("delegate cgroup: %s: %w", name, err)
		}
	}
	return nil
}
