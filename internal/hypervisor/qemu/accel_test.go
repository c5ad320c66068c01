package qemu_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu"
)

func TestProbeAccel(t *testing.T) {
	const (
		intel   = "processor\t: 0\nflags\t\t: fpu vme vmx sse\n"
		amd     = "flags\t\t: fpu svm\n"
		neither = "processor\t: 0\nflags\t\t: fpu vmxnet svmlike\nbugs\t: vmx\n"
		arm     = "processor\t: 0\nFeatures\t: fp asimd\n"
	)
	const (
		missing = "kvm: no such file or directory"
		flags   = "neither vmx nor svm"
		warning = "no security boundary"
	)
	for _, c := range []struct {
		name, requested string
		device          bool
		cpuinfo         string
		accel           hypervisor.Accel
		notes           []string
		errText         string
		errIs           func(error) bool
	}{
		{name: "auto, Intel", requested: "auto", device: true, cpuinfo: intel, accel: hypervisor.KVM},
		{name: "auto, AMD", requested: "auto", device: true, cpuinfo: amd, accel: hypervisor.KVM},
		{name: "auto, ARM", requested: "auto", device: true, cpuinfo: arm, accel: hypervisor.KVM},
		{name: "auto, no device", requested: "auto", cpuinfo: intel, accel: hypervisor.TCG, notes: []string{missing, warning}},
		{name: "auto, no flags", requested: "auto", device: true, cpuinfo: neither, accel: hypervisor.TCG, notes: []string{flags, warning}},
		{name: "kvm", requested: "kvm", device: true, cpuinfo: amd, accel: hypervisor.KVM},
		{name: "kvm, no device", requested: "kvm", cpuinfo: intel, errText: missing, errIs: errdefs.IsFailedPrecondition},
		{name: "kvm, no flags", requested: "kvm", device: true, cpuinfo: neither, errText: flags, errIs: errdefs.IsFailedPrecondition},
		{name: "tcg", requested: "tcg", device: true, cpuinfo: intel, accel: hypervisor.TCG, notes: []string{warning}},
		{name: "other word", requested: "xen", device: true, cpuinfo: intel, errText: "auto, kvm, tcg", errIs: errdefs.IsInvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			host := qemu.Host{KVM: filepath.Join(dir, "kvm"), CPUInfo: filepath.Join(dir, "cpuinfo")}
			if c.device {
				assert.NilError(t, os.WriteFile(host.KVM, nil, 0o600))
			}
			assert.NilError(t, os.WriteFile(host.CPUInfo, []byte(c.cpuinfo), 0o600))
			accel, note, err := host.ProbeAccel(c.requested)
			assert.Equal(t, accel, c.accel)
			if c.errIs != nil {
				assert.Assert(t, c.errIs(err), "%v", err)
				assert.ErrorContains(t, err, c.errText)
				return
			}
			assert.NilError(t, err)
			if c.notes == nil {
				assert.Equal(t, note, "")
			}
			for _, text := range c.notes {
				assert.Assert(t, strings.Contains(note, text), "%s", note)
			}
		})
	}
}

// Whatever this machine is, auto decides.
func TestProbeThisHost(t *testing.T) {
	accel, note, err := qemu.ThisHost().ProbeAccel("auto")
	assert.NilError(t, err)
	assert.Equal(t, accel == hypervisor.TCG, note != "")
}
