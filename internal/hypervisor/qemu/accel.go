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

// kvmLacks says why KVM cannot be used, or nothing.
func (h Host) kvmLacks() string {
	f, err := os.OpenFile(h.KVM, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	f.Close()
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
	return ""
}
