package qemu_test

import (
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu"
)

func machine() qemu.Machine {
	return qemu.Machine{
		Name: "web-1", Accel: hypervisor.TCG, VCPUs: 1, MemoryBytes: 512 << 20, Firmware: "/fw/qboot.rom",
		KernelFD: 3, InitrdFD: 4, KernelArgs: []string{"runv.log=debug"}, TSCKHz: 2596136,
		QMPFD: 5, AgentFD: 6, ConsoleFD: 7,
		Shares: []qemu.ShareFD{{ID: "runv", Tag: "runv", FD: 8}},
	}
}

func TestArgs(t *testing.T) {
	assert.DeepEqual(t, qemu.Args(machine()), []string{
		"-name", "runv-web-1",
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		"-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35,vmport=off,smm=off,usb=off,sata=off,hpet=off,dump-guest-core=off,memory-backend=mem",
		"-bios", "/fw/qboot.rom",
		"-accel", "tcg,tb-size=128",
		"-cpu", "max,-erms,-la57,-mpx,-pku",
		"-smp", "1",
		"-m", "512M",
		"-object", "memory-backend-memfd,id=mem,share=on,size=512M",
		"-kernel", "/proc/self/fd/3",
		"-initrd", "/proc/self/fd/4",
		"-append", "console=ttyS0 quiet panic=-1 oops=panic tsc=reliable no_timer_check rcupdate.rcu_expedited=1 cryptomgr.notests " +
			"random.trust_cpu=on swiotlb=noforce mitigations=off nokaslr noreplace-smp nolapic_timer tsc_early_khz=2596136 runv.log=debug",
		"-chardev", "socket,id=qmp,fd=5", "-mon", "chardev=qmp,mode=control",
		"-chardev", "socket,id=console,fd=7", "-serial", "chardev:console",
		"-chardev", "socket,id=agent,fd=6",
		"-device", "pci-bridge,id=bridge0,chassis_nr=1,shpc=off",
		"-device", "pci-bridge,id=bridge1,chassis_nr=2,shpc=off",
		"-device", "virtio-serial-pci,max_ports=2,disable-legacy=on,bus=bridge0,addr=0x1",
		"-device", "virtserialport,chardev=agent,name=runv.agent",
		"-chardev", "socket,id=chr-runv,fd=8",
		"-device", "vhost-user-fs-pci,id=dev-runv,chardev=chr-runv,tag=runv,queue-size=512,bus=bridge1,addr=0x1",
	})
}

func TestArgsVary(t *testing.T) {
	for _, c := range []struct {
		name       string
		change     func(*qemu.Machine)
		has, hasNo []string
	}{
		{
			name:   "KVM leaves the guest its defences and the host's processor",
			change: func(m *qemu.Machine) { m.Accel = hypervisor.KVM },
			has:    []string{"-accel kvm", "-cpu host", "console=ttyS0"},
			hasNo:  []string{"mitigations=off", "nokaslr", "noreplace-smp", "nolapic_timer", "tsc_early_khz", "-erms"},
		},
		{
			name:   "several processors need the APIC's timer",
			change: func(m *qemu.Machine) { m.VCPUs = 2 },
			has:    []string{"-smp 2", "mitigations=off"},
			hasNo:  []string{"nolapic_timer"},
		},
		{
			name:   "an unknown frequency is left out",
			change: func(m *qemu.Machine) { m.TSCKHz = 0 },
			hasNo:  []string{"tsc_early_khz"},
		},
		{
			name:   "memory",
			change: func(m *qemu.Machine) { m.MemoryBytes = 3 << 30 },
			has:    []string{"-m 3072M", "size=3072M"},
		},
		{
			name:   "room to grow, and a timer for what may come",
			change: func(m *qemu.Machine) { m.MaxVCPUs, m.MaxMemory = 4, 2<<30 },
			has:    []string{"-smp 1,maxcpus=4", "-m 512M,slots=16,maxmem=2048M", "size=512M"},
			hasNo:  []string{"nolapic_timer"},
		},
		{
			name:   "no room beyond the size",
			change: func(m *qemu.Machine) { m.MaxVCPUs, m.MaxMemory = 1, 512<<20 },
			has:    []string{"-smp 1 ", "-m 512M ", "nolapic_timer"},
		},
		{
			name:   "no share, and no bridge that needs one",
			change: func(m *qemu.Machine) { m.Shares = nil },
			has:    []string{"share=on", "bridge0"},
			hasNo:  []string{"vhost-user", "bridge1"},
		},
		{
			name: "shares each have a slot, and their tags no syntax",
			change: func(m *qemu.Machine) {
				m.Shares = append(m.Shares, qemu.ShareFD{ID: "b", Tag: "a,bus=bridge3", FD: 9})
			},
			has: []string{"id=dev-b,chardev=chr-b,tag=a,,bus=bridge3,queue-size=512,bus=bridge1,addr=0x2", "socket,id=chr-b,fd=9"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := machine()
			c.change(&m)
			line := strings.Join(qemu.Args(m), " ")
			for _, text := range c.has {
				assert.Check(t, is.Contains(line, text))
			}
			for _, text := range c.hasNo {
				assert.Check(t, !strings.Contains(line, text), "%s in %s", text, line)
			}
		})
	}
}

func TestArgsLeavesItsInput(t *testing.T) {
	m := machine()
	m.KernelArgs = slices.Grow(m.KernelArgs, 100)
	before := machine()
	qemu.Args(m)
	assert.DeepEqual(t, m, before)
}
