// Package boot is what PID 1 does to a machine that the kernel has just handed over:
// file systems, modules, loopback, clock, entropy, the way to the agent
// channel, and in the end the power. internal/guest calls it. It knows no
// containers.
package boot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// CgroupDir is the group above those of the containers.
const CgroupDir = "/sys/fs/cgroup/runv"

// ShareDir is where the pod's shared directory is mounted.
const ShareDir = "/run/runv/share"

// MirrorDir is where mirrors are mounted.
const MirrorDir = "/run/runv/mirror"

type fileSystem struct {
	target, kind string
	flags        uintptr
	data         string
}

const (
	noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	noDev  = unix.MS_NOSUID | unix.MS_NODEV
)

// Device and kernel file systems, in the order in which they are mounted.
var fileSystems = []fileSystem{
	{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"/proc", "proc", noExec, ""},
	{"/sys", "sysfs", noExec, ""},
	{"/run", "tmpfs", noDev, "mode=0755"},
	{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
	{"/dev/shm", "tmpfs", noDev, "mode=1777"},
	{"/dev/mqueue", "mqueue", noExec, ""},
	// A container that may write to its group can make others below it, and not change its own limits.
	{"/sys/fs/cgroup", "cgroup2", noExec, "nsdelegate"},
}

// Mount mounts the machine's own file systems. What is mounted already is left alone.
func Mount() error {
	if err := moveRoot(); err != nil {
		return err
	}
	for _, fs := range fileSystems {
		if err := os.MkdirAll(fs.target, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		err := unix.Mount(fs.kind, fs.target, fs.kind, fs.flags, fs.data)
		if err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", fs.target, err)
		}
	}
	// The root of a container's user namespace, too, must reach its files.
	for _, dir := range []string{ShareDir, MirrorDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	// A container that reaches the agent's executable, through /proc say, shall not be
	// able to change it.
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make root read-only: %w", err)
	}
	return nil
}

// moveRoot mounts the initramfs over itself: its first mount has no parent, and pivot_root,
// which the containers need, refuses to replace such a root.
func moveRoot() error {
	const dir = "/run"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.Mount("/", dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind root: %w", err)
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	return unix.Chdir("/")
}
