package qemu

import (
	"fmt"
	"strconv"
	"strings"

	"runv/internal/hypervisor"
	"runv/internal/transport"
)

// Names inside QEMU that the driver uses again over QMP.
const (
	// shareQueueSize is how many requests of a share's can be under way. Those that wait for locks are among them, so it
	// must be larger than what the share server lets wait.
	shareQueueSize = 512

	// dimmSlots is how often memory can be plugged. vhost-user daemons map each piece apart; those
	// that are in use take 32 of them.
	dimmSlots = 16
	// dimmUnit is the size of the pieces that a guest's kernel takes into use, in bytes.
	dimmUnit = 128 << 20
)

// Machine is all that decides QEMU's command line. Files reach QEMU as inherited
// descriptors, never as paths, so that the user QEMU runs as needs access to
// nothing; the firmware, which comes with QEMU, is the exception.
type Machine struct {
	Name        string
	Accel       hypervisor.Accel
	VCPUs       int
	MemoryBytes int64
	MaxVCPUs    int    // 0: as VCPUs
	MaxMemory   int64  // bytes; 0: as MemoryBytes
	Firmware    string // path of qboot.rom
	KernelFD    int
	InitrdFD    int
	KernelArgs  []string // appended to the driver's own
	TSCKHz      int      // frequency of the time stamp counter that a TCG guest sees; 0: unknown
	QMPFD       int
	AgentFD     int
	ConsoleFD   int
	Shares      []ShareFD
}

// ShareFD is a share whose daemon is connected to an inherited descriptor.
type ShareFD struct {
	ID, Tag string
	FD      int
}

// Args returns QEMU's arguments without the program's name. It only looks at m.
//
// The figures in the comments are of a two-core machine without KVM, QEMU 7.2
// and Debian's cloud kernel 6.1; a boot to the first answer takes 1.4 to 1.5 s there.
// What was tried and makes no difference: the console (no measurable cost), initcall
// blacklists, LSMs off, init_on_alloc=0, 256 MiB to 1 GiB of memory, SMAP off. A root
// port costs 6 ms.
func Args(m Machine) []string {
	mib := mebibytes(m.MemoryBytes)
	args := []string{
		"-name", "runv-" + m.Name,
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		// A guest that resets itself ends, and SHUTDOWN tells why.
		"-no-reboot",
		// What QEMU needs no more once it runs is forbidden to it. The filter also
		// sets no_new_privs.
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// q35 with all left out that a container's guest does not use. The guest's
		// memory must not land in a core file of QEMU.
		"-machine", "q35,vmport=off,smm=off,usb=off,sata=off,hpet=off,dump-guest-core=off,memory-backend=mem",
		"-bios", m.Firmware,
		"-accel", accel(m.Accel),
		"-cpu", cpu(m.Accel),
		"-smp", smp(m),
		"-m", memory(m),
		// vhost-user daemons map the guest's memory: it must be shared and have a file
		// descriptor.
		"-object", "memory-backend-memfd,id=mem,share=on,size=" + mib,
		"-kernel", fdPath(m.KernelFD),
		"-initrd", fdPath(m.InitrdFD),
		"-append", strings.Join(kernelArgs(m), " "),
		"-chardev", socket("qmp", m.QMPFD), "-mon", "chardev=qmp,mode=control",
		"-chardev", socket("console", m.ConsoleFD), "-serial", "chardev:console",
		"-chardev", socket("agent", m.AgentFD),
	}
	for i := range bridges(len(m.Shares)) {
		// Without a controller of its own (shpc), which the guest's kernel does not know: ACPI tells of what comes.
		args = append(args, "-device", fmt.Sprintf("pci-bridge,id=%s,chassis_nr=%d,shpc=off", bridgeName(i), i+1))
	}
	args = append(args,
		"-device", fmt.Sprintf("virtio-serial-pci,max_ports=2,disable-legacy=on,bus=%s,addr=%s", channelSlot.bus(), channelSlot.addr()),
		"-device", "virtserialport,chardev=agent,name="+transport.PortName,
	)
	for i, s := range m.Shares {
		args = append(args,
			"-chardev", socket(chardevName(s.ID), s.FD),
			"-device", fmt.Sprintf("vhost-user-fs-pci,id=%s,chardev=%s,tag=%s,queue-size=%d,bus=%s,addr=%s",
				deviceName(s.ID), chardevName(s.ID), escape(s.Tag), shareQueueSize, slotOfShare(i).bus(), slotOfShare(i).addr()))
	}
	return args
}

// accel bounds the cache of translated code, in MiB: without that it grows to an eighth of the
// host's memory, up to 1 GiB. A guest that runs compilers fills 256 MiB in a minute; it is not
// measurably slower with 128, and a fifth with 64.
func accel(a hypervisor.Accel) string {
	if a == hypervisor.TCG {
		return "tcg,tb-size=128"
	}
	return string(a)
}

// smp is the number of processors now, and of those that there can be.
func smp(m Machine) string {
	if m.MaxVCPUs <= m.VCPUs {
		return strconv.Itoa(m.VCPUs)
	}
	return fmt.Sprintf("%d,maxcpus=%d", m.VCPUs, m.MaxVCPUs)
}

func memory(m Machine) string {
	size := mebibytes(m.MemoryBytes)
	if m.MaxMemory <= m.MemoryBytes {
		return size
	}
	return fmt.Sprintf("%s,slots=%d,maxmem=%s", size, dimmSlots, mebibytes(m.MaxMemory))
}

func mebibytes(n int64) string { return strconv.FormatInt(n>>20, 10) + "M" }

// cpu is the model the guest sees: all that the accelerator can do.
func cpu(accel hypervisor.Accel) string {
	if accel == hypervisor.TCG {
		// With erms the kernel copies and clears with "rep movsb", which TCG executes
		// byte by byte: without it a boot is 150 to 200 ms shorter, and reading a cached
		// file twice as fast. A fifth level of page tables (la57) makes each miss of the
		// emulated TLB dearer: without it an exec takes 11 ms instead of 13. MPX and
		// protection keys only make the floating point state that is saved larger.
		return "max,-erms,-la57,-mpx,-pku"
	}
	return "host"
}

// kernelArgs is the guest kernel's command line.
func kernelArgs(m Machine) []string {
	args := []string{
		// A panic ends the guest at once, and its text is on the console. A kernel that has
		// met a bug of its own may go on, but no container can rely on it any more.
		"console=ttyS0", "quiet", "panic=-1", "oops=panic",
		"tsc=reliable", "no_timer_check",
		"rcupdate.rcu_expedited=1", "cryptomgr.notests", "random.trust_cpu=on",
		// A kernel that may have memory above 4 GiB one day sets 64 MiB aside for devices that cannot
		// reach it. There are none.
		"swiotlb=noforce",
	}
	if m.Accel == hypervisor.TCG {
		// There is no speculation to defend against and no secret address space
		// to hide in a translator that is no security boundary. Under KVM the guest
		// deserves these defences.
		args = append(args, "mitigations=off", "nokaslr", "noreplace-smp")
		if max(m.VCPUs, m.MaxVCPUs) == 1 {
			// The legacy timer needs no calibration, 25 ms. It can serve one processor: where others
			// may come the kernel would go without timers finer than 4 ms.
			args = append(args, "nolapic_timer")
		}
		if m.TSCKHz > 0 {
			// Calibration against emulated timers costs 50 ms and was seen to be off by 0.2 %.
			args = append(args, "tsc_early_khz="+strconv.Itoa(m.TSCKHz))
		}
	}
	return append(args, m.KernelArgs...)
}

func socket(id string, fd int) string {
	return fmt.Sprintf("socket,id=%s,fd=%d", id, fd)
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func deviceName(id string) string { return "dev-" + id }

func chardevName(id string) string { return "chr-" + id }

// escape makes text a value in QEMU's option syntax.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
