package storage

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// IDMap maps the owners of a mount's files.
type IDMap struct {
	UIDs, GIDs []IDRange
	Recursive  bool // also of what is mounted below
}

// IDRange maps Size ids, that the files have from Inside on, to those from Outside on.
type IDRange struct{ Inside, Outside, Size uint32 }

// apply maps the ids of a detached tree of mounts.
func (m *IDMap) apply(tree int) error {
	ns, err := m.userNS()
	if err != nil {
		return fmt.Errorf("map ids: make user namespace: %w", err)
	}
	defer ns.Close()
	flags := uint(unix.AT_EMPTY_PATH)
	if m.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	err = unix.MountSetattr(tree, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("map ids: the kernel cannot do that on this file system: %w: %w", err, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return fmt.Errorf("map ids: %w", err)
	}
	return nil
}

// userNS makes a user namespace with the mappings. There is no way but to start a process in it: this
// program, which is stopped before its first instruction and then killed.
func (m *IDMap) userNS() (ns *os.File, err error) {
	// Who traces the process is a thread, which has another root then.
	err = mountns.OnThread(func() error {
		if err := leaveChroot(); err != nil {
			return err
		}
		ns, err = m.forkUserNS()
		return err
	})
	return ns, err
}

// leaveChroot makes the root of the mount namespace this thread's: in a chroot the kernel makes no
// user namespaces (user_namespaces(7), EPERM).
func leaveChroot() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	fd, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, unix.CLONE_NEWNS)
}

func (m *IDMap) forkUserNS() (*os.File, error) {
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"idmap"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: ranges(m.UIDs),
			GidMappings: ranges(m.GIDs),
			Ptrace:      true,
			Pdeathsig:   syscall.SIGKILL,
		},
	})
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	killErr := unix.Kill(pid, unix.SIGKILL)
	for {
		var ws unix.WaitStatus
		_, waitErr := unix.Wait4(pid, &ws, 0, nil)
		if waitErr == nil && ws.Stopped() || errors.Is(waitErr, unix.EINTR) {
			continue
		}
		if err := errors.Join(err, killErr, waitErr); err != nil {
			if ns != nil {
				ns.Close()
			}
			return nil, err
		}
		return ns, nil
	}
}

func ranges(list []IDRange) []syscall.SysProcIDMap {
	ids := make([]syscall.SysProcIDMap, len(list))
	for i, r := range list {
		ids[i] = syscall.SysProcIDMap{ContainerID: int(r.Inside), HostID: int(r.Outside), Size: int(r.Size)}
	}
	return ids
}
