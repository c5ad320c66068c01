package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"
)

func (a *app) specCommand() *urfave.Command {
	var dir string
	var rootless bool
	return &urfave.Command{
		Name:     "spec",
		Usage:    "write a config.json to start from",
		Category: groupSetup,
		Description: `Writes config.json into the bundle's directory; it runs sh in a terminal on a
read-only root file system, as that of "runc spec" does. Edit process.args to
run something else. A config.json that exists is not touched: that is an error.

Example:
   mkdir -p web/rootfs && tar -C web/rootfs -xf rootfs.tar
   runv spec --bundle web
   sed -i 's;"sh";"/bin/httpd";' web/config.json`,
		Flags: []urfave.Flag{
			&urfave.StringFlag{Name: "bundle", Aliases: []string{"b"}, Value: ".", Destination: &dir, TakesFile: true, Usage: "`DIR` of the bundle"},
			&urfave.BoolFlag{Name: "rootless", Destination: &rootless, Hidden: true},
		},
		Action: func(_ context.Context, cmd *urfave.Command) error {
			if err := exactArgs(cmd, 0); err != nil {
				return err
			}
			if rootless {
				return errors.New("spec --rootless: not supported: runv needs root")
			}
			if err := writeSpec(filepath.Join(dir, "config.json")); err != nil {
				return fmt.Errorf("spec: %w", err)
			}
			return nil
		},
	}
}

func writeSpec(path string) error {
	data, err := json.MarshalIndent(exampleSpec(), "", "\t")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("file %s exists, remove it first", path)
	}
	if err != nil {
		return err
	}
	if _, err := f.Write(append(data, '\n')); err != nil {
		return errors.Join(err, f.Close(), os.Remove(path))
	}
	return f.Close()
}

// exampleSpec has the values of runc's example, so that one bundle does for
// both; the cgroup namespace comes from guests having cgroup v2.
func exampleSpec() *specs.Spec {
	caps := []string{"CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	mount := func(destination, typ, source string, options ...string) specs.Mount {
		return specs.Mount{Destination: destination, Type: typ, Source: source, Options: options}
	}
	return &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Terminal: true,
			Args:     []string{"sh"},
			Env:      []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"},
			Cwd:      "/",
			Capabilities: &specs.LinuxCapabilities{
				Bounding: caps, Effective: caps, Permitted: caps, Ambient: caps,
			},
			Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}},
			NoNewPrivileges: true,
		},
		Root:     &specs.Root{Path: "rootfs", Readonly: true},
		Hostname: "runv",
		Mounts: []specs.Mount{
			mount("/proc", "proc", "proc"),
			mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
			mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
			mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
			mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
			mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
			mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
		},
		Linux: &specs.Linux{
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths: []string{
				"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
				"/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}
