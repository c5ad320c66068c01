package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	urfave "github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	"runv/internal/config"
	"runv/internal/hostcgroup"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu"
	"runv/internal/network"
	"runv/internal/sharefs"
)

// doctorTimeout bounds all of doctor: it starts programs to ask their version.
const doctorTimeout = 30 * time.Second

func (a *app) doctorCommand() *urfave.Command {
	var asJSON bool
	return &urfave.Command{
		Name:     "doctor",
		Usage:    "check whether this machine can run containers, and say what to do",
		Category: groupSetup,
		Description: `Checks the user's rights, the configuration, the accelerator, QEMU, the limit of open files,
the guest's files, the state directory, cgroups and the network. Changes nothing. Each
finding has a code that stays the same between versions, a severity (ok, note,
warning or error) and, where something is to be done, a remedy.

The exit status is 1 when there is an error, otherwise 0.

Examples:
   runv doctor
   runv doctor --json | jq '.[] | select(.severity == "error")'`,
		Flags: []urfave.Flag{&urfave.BoolFlag{Name: "json", Destination: &asJSON, Usage: "print the findings as a JSON list"}},
		Action: func(ctx context.Context, cmd *urfave.Command) error {
			if err := exactArgs(cmd, 0); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
			defer cancel()
			found := a.examine(ctx)
			if err := printFindings(a.prog.Stdout, found, asJSON); err != nil {
				return err
			}
			for _, f := range found {
				if f.Severity == severityError {
					return &exitError{status: statusError}
				}
			}
			return nil
		},
	}
}

// severity is how much a finding matters.
type severity string

const (
	severityOK      severity = "ok"
	severityNote    severity = "note"    // worth knowing
	severityWarning severity = "warning" // containers run, but not as they should
	severityError   severity = "error"   // containers cannot run
)

// finding is what one check has found.
type finding struct {
	Code     string   `json:"code"`
	Severity severity `json:"severity"`
	Message  string   `json:"message"`
	Remedy   string   `json:"remedy,omitempty"`
}

func printFindings(w io.Writer, all []finding, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	}
	count := map[severity]int{}
	for _, f := range all {
		count[f.Severity]++
		if _, err := fmt.Fprintf(w, "%-7s  %-21s  %s\n", f.Severity, f.Code, oneLine(f.Message)); err != nil {
			return err
		}
		if f.Remedy != "" {
			if _, err := fmt.Fprintf(w, "%-32s-> %s\n", "", oneLine(f.Remedy)); err != nil {
				return err
			}
		}
	}
	verdict := "Containers can run here."
	if count[severityError] > 0 {
		verdict = "Containers cannot run here."
	}
	_, err := fmt.Fprintf(w, "\n%s Errors: %d, warnings: %d.\n", verdict, count[severityError], count[severityWarning])
	return err
}

// examine runs all checks. Those that need the configuration take the default
// one when it is bad.
func (a *app) examine(ctx context.Context) []finding {
	found := []finding{checkUser(), checkPlatform()}
	cfg, f := a.checkConfig()
	found = append(found, f)
	if cfg == nil {
		return found
	}
	found = append(found, checkAccel(cfg))
	found = append(found, checkQEMU(ctx, cfg)...)
	found = append(found, checkFiles(), checkGuest(cfg), a.checkState(), checkCgroups(), checkNetwork())
	return found
}

func checkNetwork() finding {
	if err := network.Probe(); err != nil {
		return finding{
			"network.unusable", severityError, fmt.Sprintf("a network cannot be connected to a VM: %v", err),
			"load the kernel's modules tun, sch_ingress, cls_u32 and act_mirred",
		}
	}
	return finding{Code: "network.usable", Severity: severityOK, Message: "networks of containers can be connected to VMs"}
}

func checkUser() finding {
	if uid := os.Geteuid(); uid != 0 {
		return finding{"user.not-root", severityError, fmt.Sprintf("runv runs as uid %d; it needs root", uid), "run it as root, with sudo for example"}
	}
	// What the supervisor does on the host.
	for _, c := range []struct {
		bit  uint
		name string
		why  string
	}{
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "mounts root file systems into the pod's share"},
		{unix.CAP_SETUID, "CAP_SETUID", "runs QEMU as another user"},
		{unix.CAP_SETGID, "CAP_SETGID", "runs QEMU as another group"},
		{unix.CAP_CHOWN, "CAP_CHOWN", "has the share server, which gives files to the container's users"},
		{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "reads root file systems of any owner"},
		{unix.CAP_KILL, "CAP_KILL", "ends QEMU, which is another user's"},
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "connects the container's network to the VM"},
	} {
		if !hasCapability(c.bit) {
			return finding{"user.capability", severityError, fmt.Sprintf("root without %s: the supervisor %s", c.name, c.why), "run runv with " + c.name}
		}
	}
	return finding{"user", severityOK, "runs as root, with the capabilities that it needs", ""}
}

func hasCapability(bit uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return true // not known; using it will tell
	}
	return data[bit/32].Effective&(1<<(bit%32)) != 0
}

func checkPlatform() finding {
	var uts unix.Utsname
	release := "unknown"
	if err := unix.Uname(&uts); err == nil {
		release = unix.ByteSliceToString(uts.Release[:])
	}
	message := fmt.Sprintf("Linux %s on %s, %d CPUs", release, runtime.GOARCH, runtime.NumCPU())
	if runtime.GOARCH != "amd64" {
		return finding{"platform.architecture", severityError, message + ": guests are made for amd64 only", "use an amd64 machine"}
	}
	return finding{"platform", severityOK, message, ""}
}

func (a *app) checkConfig() (*config.Effective, finding) {
	cfg, err := a.loadConfig()
	if err != nil {
		return nil, finding{"config.invalid", severityError, err.Error(), "correct the configuration; the other checks wait for it"}
	}
	return cfg, finding{"config", severityOK, `the configuration is valid ("runv config" shows it)`, ""}
}

func checkAccel(cfg *config.Effective) finding {
	accel, note, err := qemu.ThisHost().ProbeAccel(cfg.Accel)
	switch {
	case err != nil:
		return finding{"accel.unusable", severityError, err.Error(), "set accel to auto or tcg, or give this machine access to hardware virtualization"}
	case accel == hypervisor.TCG:
		return finding{
			"accel.tcg", severityWarning,
			"guests run under TCG, which translates their instructions and is several times slower than KVM" + because(note),
			"use a machine with hardware virtualization (vmx or svm among the flags of /proc/cpuinfo, and /dev/kvm)",
		}
	}
	return finding{"accel", severityOK, "guests run under KVM" + because(note), ""}
}

func because(note string) string {
	if note == "" {
		return ""
	}
	return " (" + note + ")"
}

func checkQEMU(ctx context.Context, cfg *config.Effective) []finding {
	path, version, err := qemu.Find(ctx, cfg.QEMU)
	if err != nil {
		return []finding{fileFinding("qemu.missing", err, "install qemu-system-x86, or set qemu in the configuration")}
	}
	found := []finding{{"qemu", severityOK, fmt.Sprintf("QEMU %s at %s", version, path), ""}}
	firmware, err := qemu.FindFirmware(path)
	if err != nil {
		return append(found, fileFinding("firmware.missing", err, "install qemu-system-data"))
	}
	return append(found, finding{"firmware", severityOK, "firmware at " + firmware, ""})
}

// fileFinding is an error whose remedy the error itself may know better.
func fileFinding(code string, err error, remedy string) finding {
	message := err.Error()
	if file, ok := errors.AsType[*qemu.FileError](err); ok && file.Remedy != "" {
		remedy = file.Remedy
		message = strings.TrimSuffix(message, " ("+file.Remedy+")")
	}
	return finding{code, severityError, message, remedy}
}

// enoughFiles is how many files the share server of a busy container may have to keep open.
const enoughFiles = 16384

// checkFiles tells of a limit that a container meets as "too many open files in system". The share server's descriptors are
// those of the files that the container has open, and a bounded number of others.
func checkFiles() finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return finding{"files", severityWarning, fmt.Sprintf("read limit of open files: %v", err), ""}
	}
	if limit.Max < enoughFiles {
		return finding{
			"files.few", severityWarning,
			fmt.Sprintf("a container can have about %d files of the host open at a time: the hard limit of open files is %d",
				sharefs.LimitsFor(limit.Max).Files, limit.Max),
			fmt.Sprintf("raise the hard limit (ulimit -Hn, LimitNOFILE= of the engine's unit) to %d or more", enoughFiles),
		}
	}
	return finding{"files", severityOK, fmt.Sprintf("hard limit of open files: %d", limit.Max), ""}
}

func checkGuest(cfg *config.Effective) finding {
	guest, err := cfg.Guest()
	if err != nil {
		return finding{"guest.missing", severityError, err.Error(), `build the guest's files with "make guest", install them, or name their directory with --guest-dir`}
	}
	for _, path := range []string{guest.Kernel, guest.Initrd} {
		f, err := os.Open(path)
		if err != nil {
			return finding{"guest.unreadable", severityError, err.Error(), "make the guest's files readable for root"}
		}
		_ = f.Close()
	}
	return finding{"guest", severityOK, fmt.Sprintf("guest kernel %s in %s", guest.Release, filepath.Dir(guest.Kernel)), ""}
}

func (a *app) checkState() finding {
	store, err := a.openStore()
	if err != nil {
		return finding{"state.refused", severityError, err.Error(), "make the directory root's with mode 0700, or name another one with --root"}
	}
	dir := store.Root()
	for dir != "/" {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return finding{"state.read-only", severityError, fmt.Sprintf("state directory %s: %s: %v", store.Root(), dir, err), "make it writable, or name another one with --root"}
	}
	if _, err := store.Containers(); err != nil {
		return finding{"state.damaged", severityWarning, err.Error(), `remove what is damaged with "runv delete --force ID"`}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err == nil && fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		return finding{
			"state.not-tmpfs", severityNote, fmt.Sprintf("state directory %s is not on a tmpfs: what it says outlives a reboot", store.Root()),
			"mount a tmpfs there, or name a directory on one with --root",
		}
	}
	return finding{"state", severityOK, "state directory " + store.Root(), ""}
}

// checkCgroups tells whether the VMs can be bounded on the host. The limits of what runs in them are
// the guest's to keep in any case, and a guest always has cgroup v2.
func checkCgroups() finding {
	const guests = "limits of containers are kept in the guest, which has cgroup v2"
	h := hostcgroup.Probe()
	switch {
	case h.Version == 0:
		return finding{
			"cgroups.none", severityWarning, "the host has no cgroups at /sys/fs/cgroup: containers with limits or a cgroupsPath are refused",
			"mount the cgroup file systems",
		}
	case h.Err != nil:
		return finding{
			"cgroups.read-only", severityWarning, fmt.Sprintf("no cgroup can be made: %v: containers with limits or a cgroupsPath are refused", h.Err),
			"make the cgroup file systems writable",
		}
	case len(h.Missing) > 0:
		return finding{
			"cgroups.incomplete", severityWarning,
			fmt.Sprintf("the host's cgroups lack %s: containers with limits of that kind are refused", strings.Join(h.Missing, ", ")),
			"mount or enable these controllers",
		}
	case h.Version == 1:
		return finding{"cgroups.v1", severityNote, "the host has cgroup v1, which bounds the VMs; " + guests, ""}
	}
	return finding{"cgroups", severityOK, "the host has cgroup v2, which bounds the VMs; " + guests, ""}
}
