package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// openFiles is how many files the agent may have open: some for each process.
const openFiles = 1 << 16

// RaiseLimits lets the agent serve many processes, and a container have many mounts: until it is in place
// each counts as a mount namespace, of which the kernel allows fewer the less memory there is. Numbers of processes
// go as far as they can: the host's limit may be one for each pid namespace.
func RaiseLimits() error {
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: openFiles, Max: 1 << 20})
	if err != nil {
		return fmt.Errorf("raise limit of open files: %w", err)
	}
	for file, value := range map[string]int{"user/max_mnt_namespaces": 1_000_000, "kernel/pid_max": maxPID} {
		if err := os.WriteFile(filepath.Join(parametersDir, file), strconv.AppendInt(nil, int64(value), 10), 0); err != nil {
			return fmt.Errorf("raise limit: %w", err)
		}
	}
	return nil
}

// Loopback brings the interface lo up.
func Loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	return nil
}

// SetClock sets the wall clock, in nanoseconds since 1970.
func SetClock(nanos int64) error {
	ts := unix.NsecToTimespec(nanos)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

// maxEntropy is the most that AddEntropy takes.
const maxEntropy = 512

// AddEntropy credits seed to the kernel's random number generator.
func AddEntropy(seed []byte) error {
	if len(seed) > maxEntropy {
		return fmt.Errorf("add entropy: %d bytes are more than %d", len(seed), maxEntropy)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer f.Close()
	if err := addEntropy(int(f.Fd()), seed); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	return nil
}

// shareInterval is how often MountShare looks for its device.
const shareInterval = 2 * time.Millisecond

// MountShare mounts the virtiofs device of this tag at ShareDir. The driver may
// still be on its way to the device: it waits until ctx ends.
func MountShare(ctx context.Context, tag string) error {
	tick := time.NewTicker(shareInterval)
	defer tick.Stop()
	for {
		err := unix.Mount(tag, ShareDir, "virtiofs", 0, "")
		if !errors.Is(err, unix.EINVAL) { // which is what an unknown tag gives
			if err != nil {
				return fmt.Errorf("mount share %q: %w", tag, err)
			}
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("mount share %q: no such device: %w", tag, context.Cause(ctx))
		}
	}
}

// UnmountShare unmounts what MountShare has mounted, and writes back what was not yet.
func UnmountShare() error {
	err := unix.Unmount(ShareDir, 0)
	if errors.Is(err, unix.EBUSY) {
		unix.Sync()
		err = unix.Unmount(ShareDir, unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EINVAL) {
		return nil // not mounted
	}
	return err
}

// PowerOff ends the virtual machine. It does not return.
func PowerOff(log *slog.Logger) {
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	log.Error("power off", "error", err)
	err = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	log.Error("restart", "error", err)
	os.Exit(1) // the kernel panics, which ends the machine, too
}

// Debug tells whether the kernel command line asks for debug messages.
func Debug() bool {
	data, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return false
	}
	return slices.Contains(strings.Fields(string(data)), "runv.log=debug")
}

// Uptime is the time since the kernel's start, in milliseconds.
func Uptime() float64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return float64(ts.Nano()) / float64(time.Millisecond)
}

// CPUs is how many processors are online.
func CPUs() uint32 { return (&Hotplug{dir: devicesDir}).cpus() }

// countList counts the members of a list like "0-3,7".
func countList(list string) (n uint32) {
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		a, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			continue
		}
		b := a
		if isRange {
			if b, err = strconv.ParseUint(last, 10, 16); err != nil || b < a {
				continue
			}
		}
		n += uint32(b - a + 1)
	}
	return n
}
