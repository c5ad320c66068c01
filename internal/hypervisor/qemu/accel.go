package qemu

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/hypervisor"
)

// tcgNote is what whoever runs VMs under TCG should know.
const tcgNote = "QEMU's developers treat TCG as no security boundary"

// Host is where the accelerator is looked for.
type Host struct {
	KVM     string // KVM's device
	CPUInfo string // the kernel's description of the processors
}

// ThisHost is the machine runv runs on.
func ThisHost() Host { return Host{KVM: "/dev/kvm", CPUInfo: "/proc/cpuinfo"} }

// ProbeAccel decides for "auto", or checks "kvm" or "tcg". The note, one line for
// humans, says why auto chose TCG, and what TCG means. A requested kvm never falls
// back: what it lacks is an errdefs.ErrFailedPrecondition. Any other word is an
// errdefs.ErrInvalidArgument.
func (h Host) ProbeAccel(requested string) (accel hypervisor.Accel, note string, err error) {
	switch requested {
	case "tcg":
		return hypervisor.TCG, tcgNote, nil
	case "kvm":
		if why := h.kvmLacks(); why != "" {
			return "", "", hypervisor.Errorf(errdefs.ErrFailedPrecondition, "accelerator kvm is configured and cannot be used: %s", why)
		}
		return hypervisor.KVM, "", nil
	case "auto":
		if why := h.kvmLacks(); why != "" {
			return hypervisor.TCG, why + "; " + tcgNote, nil
		}
		return hypervisor.KVM, "", nil
	}
	return "", "", hypervisor.Errorf(errdefs.ErrInvalidArgument, "accelerator %q: not one of auto, kvm, tcg", requested)
}

// Groups are the groups that a user without privileges needs to run VMs with an
// accelerator that ProbeAccel has chosen: under KVM that of the device, where not
// everybody may use it.
func (h Host) Groups(accel hypervisor.Accel) ([]uint32, error) {
	if accel != hypervisor.KVM {
		return nil, nil
	}
	f, err := os.OpenFile(h.KVM, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	groups, why := kvmGroups(f)
	if why != "" {
		return nil, hypervisor.Errorf(errdefs.ErrFailedPrecondition, "%s: %s", h.KVM, why)
	}
	return groups, nil
}

// kvmGroups tells by which group a user without privileges can use the device, none if
// everybody can, or why he cannot. Root's group is no choice: it can do more than that.
func kvmGroups(device *os.File) (groups []uint32, why string) {
	const readWrite = 0o6
	var st unix.Stat_t
	if err := unix.Fstat(int(device.Fd()), &st); err != nil {
		return nil, err.Error()
	}
	switch {
	case st.Mode&readWrite == readWrite:
		return nil, ""
	case st.Gid != 0 && st.Mode>>3&readWrite == readWrite:
		return []uint32{st.Gid}, ""
	}
	return nil, fmt.Sprintf("it is for root alone (group %d, mode %04o), and VMs do not run as root; "+
		"give it to a group of its own with mode 0660", st.Gid, st.Mode&0o7777)
}

// kvmLacks says why KVM cannot be used, or nothing.
func (h Host) kvmLacks() string {
	f, err := os.OpenFile(h.KVM, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	info, err := os.ReadFile(h.CPUInfo)
	if err != nil {
		return err.Error()
	}
	// Without the processor's help, what stands behind the device is emulation in
	// which a guest's kernel crawls. Only x86 lists flags.
	for line := range strings.Lines(string(info)) {
		name, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(name) != "flags" {
			continue
		}
		flags := strings.Fields(value)
		if !slices.Contains(flags, "vmx") && !slices.Contains(flags, "svm") {
			return fmt.Sprintf("%s opens, but the processor has neither vmx nor svm", h.KVM)
		}
		break
	}
	if _, why := kvmGroups(f); why != "" {
		return h.KVM + ": " + why
	}
	return ""
}
