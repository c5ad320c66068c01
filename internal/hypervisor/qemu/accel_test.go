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
				makeDevice(t, host.KVM, 0, 0o666)
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

func makeDevice(t *testing.T, path string, group int, mode os.FileMode) {
	t.Helper()
	assert.NilError(t, os.WriteFile(path, nil, 0o600))
	if group != 0 {
		assert.NilError(t, os.Chown(path, -1, group))
	}
	assert.NilError(t, os.Chmod(path, mode))
}

// The VMM is not root: it needs the device's group, and root's is not for it.
func TestGroupsOfKVM(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give a file to a group")
	}
	for _, c := range []struct {
		name  string
		group int
		mode  os.FileMode
		want  []uint32
		why   string
	}{
		{name: "everybody", group: 0, mode: 0o666},
		{name: "a group", group: 108, mode: 0o660, want: []uint32{108}},
		{name: "root's group", group: 0, mode: 0o660, why: "for root alone (group 0, mode 0660)"},
		{name: "a group that may read", group: 108, mode: 0o640, why: "for root alone (group 108, mode 0640)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			host := qemu.Host{KVM: filepath.Join(dir, "kvm"), CPUInfo: filepath.Join(dir, "cpuinfo")}
			makeDevice(t, host.KVM, c.group, c.mode)
			assert.NilError(t, os.WriteFile(host.CPUInfo, []byte("flags : vmx\n"), 0o600))
			accel, note, err := host.ProbeAccel("auto")
			assert.NilError(t, err)
			groups, err := host.Groups(hypervisor.KVM)
			if c.why != "" {
				assert.Equal(t, accel, hypervisor.TCG)
				assert.Assert(t, strings.Contains(note, c.why), "%s", note)
				assert.ErrorContains(t, err, c.why)
				return
			}
			assert.Equal(t, accel, hypervisor.KVM)
			assert.NilError(t, err)
			assert.DeepEqual(t, groups, c.want)
			groups, err = host.Groups(hypervisor.TCG)
			assert.NilError(t, err)
			assert.Equal(t, len(groups), 0)
		})
	}
}

// Whatever this machine is, auto decides.
func TestProbeThisHost(t *testing.T) {
	accel, note, err := qemu.ThisHost().ProbeAccel("auto")
	assert.NilError(t, err)
	assert.Equal(t, accel == hypervisor.TCG, note != "")
}
