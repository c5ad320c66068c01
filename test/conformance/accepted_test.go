package conformance

// Why a difference is accepted, in words of the document.
const (
	kernelDiffers  = "the kernels differ in version and configuration"
	machineDiffers = "the VM is a machine of its own: other CPUs, memory and devices"
	cgroup2        = "the guest has cgroup v2; the oracle's machine has v1"
	overVirtiofs   = "files of the host reach the guest over virtiofs, whose mounts are named and placed differently"
	lacksCall      = "the oracle's kernel lacks the call"
	guestNetwork   = "the container's network is the VM's own, so its sysfs has the VM's superblock; it is mounted read-only as under runc"
)

// acceptedDifferences are all differences between runc and runv that have a reason. One that no
// case shows any more fails `make conformance`.
var acceptedDifferences = []accepted{
	{where: `.*/(self|init)\.status`, line: `Cpus_allowed(_list)?: .*`, reason: machineDiffers},
	{where: `.*/(self|init)\.status`, line: `(Speculation_Store_Bypass|SpeculationIndirectBranch): .*`, reason: machineDiffers},
	{where: `.*/(self|init)\.status`, line: `Kthread: 0`, reason: kernelDiffers},
	{where: `.*/(self|init)\.limits`, line: `Max (processes|pending signals) .*`, reason: "the kernel derives these from the memory that it has"},
	{where: `least/(self|init)\.limits`, line: `Max open files .*`, reason: "a bundle without rlimits inherits those of the runtime's caller under runc, the kernel's in a VM"},
	{where: `(least|few-namespaces)/(sysctl|uname)`, line: `(kernel/hostname )?(\S+ \(none\) x86_64|\S+) ok`, reason: "without a hostname or uts namespace of its own a container has the host's name under runc, the VM's here"},
	{where: `.*/(self|init)\.attr`, line: `current ("" EINVAL|"unconfined" ok)`, reason: "the guest's kernel has AppArmor, the oracle's none; nobody is confined by it"},

	{where: `.*/init\.fd`, line: `[012] (/dev/null|\S*/runv-test-outputN.*|pipe:\[N\])`, reason: "standard streams that are no terminal reach the guest as pipes, whatever they are on the host"},

	{where: `.*/(self|init)\.cgroup`, line: `[0-9]+:[a-z_=,]*:/\S*|0::/\S*`, reason: cgroup2},
	{where: `.*/(self|init)\.fd`, line: `[34] /sys/fs/cgroup/.*`, reason: cgroup2 + "; Go's runtime holds the files of the CPU limit open"},
	{where: `.*/(self|init)\.mountinfo`, line: `/sys/fs/cgroup(/[a-z_,]+)? .*`, reason: cgroup2},
	{where: `.*/places`, line: `/sys/fs/cgroup .*`, reason: cgroup2},

	{where: `.*/(self|init)\.mountinfo`, line: `\S+ shows (BUNDLE|DIR)\S* of .*|\S+ shows /ID/\S+ of virtiofs .*`, reason: overVirtiofs},
	{where: `.*/(self|init)\.mountinfo`, line: `/sys shows / of sysfs sysfs, r[ow]`, reason: guestNetwork},
	{where: `(rich|user)/writes`, line: `/sys/class/net/lo/mtu (EROFS|EACCES)`, reason: guestNetwork},
	{where: `.*/(self|init)\.mountinfo`, line: `/proc/(kcore|sysrq-trigger|latency_stats|timer_stats|sched_debug|scsi|acpi) .*`, reason: kernelDiffers},
	{where: `.*/paths`, line: `/proc/(kcore|sysrq-trigger|latency_stats|timer_stats|sched_debug|scsi|acpi) .*`, reason: kernelDiffers},
	{where: `.*/dev`, line: `/dev/core .*`, reason: kernelDiffers + ": runc links it if there is a /proc/kcore"},

	{where: `(rich|mounts)/places`, line: `/tmp 04(0755|1770) 7:8`, reason: "runc before 1.2 gives a tmpfs the mode of the directory below it, whatever its options say"},
	{where: `.*/(self|init)\.mountinfo`, line: `\S+ shows / of tmpfs \S+, (mode=\d+,)?rw`, reason: "runc before 1.2 gives a tmpfs the mode of the directory below it by chmod, not by an option"},
	{where: `(rich|user)/(self.status|prctl)`, line: `(Umask:|umask) 0+2[27]`, reason: "runc before 1.2 forgets the umask of processes that are added"},

	{where: `(rich|limits)/self.limits`, line: `Max open files .*`, reason: "runc built by Go 1.19 may raise the soft limit of open files of processes that are added to the hard one", sometimes: true},

	{where: `.*/syscalls`, line: `(delete_module|finit_module|ioperm|iopl|kexec_load) \w+`, reason: lacksCall},
	{where: `capabilities/syscalls`, line: `syslog (ok|EPERM)`, reason: kernelDiffers + ": the guest's lets CAP_SYS_ADMIN read the log"},
	{where: `privileged/syscalls`, line: `rtprio (ok|EPERM)`, reason: "the oracle's machine gives cgroups no real-time share"},
	{where: `(privileged|rich|devices)/nodes`, line: `tun mknod ok, read (ok|ENODEV), write (ok|ENODEV)`, reason: machineDiffers},
	{where: `privileged/nodes`, line: `(kvm|loop|mem) mknod ok, .*`, reason: machineDiffers},
	{where: `.*/syscalls`, line: `open_by_handle_at (EFAULT|EPERM)`, reason: kernelDiffers},
	{where: `.*/syscalls`, line: `socket vsock (ok|EAFNOSUPPORT)`, reason: kernelDiffers},
}
