package conformance

// Why a difference is accepted, in words of the document.
const (
	kernelDiffers  = "the kernels differ in version and configuration"
	machineDiffers = "the VM is a machine of its own: other CPUs, memory and devices"
	cgroup2        = "the guest has cgroup v2; the oracle's machine has v1"
	overVirtiofs   = "files of the host reach the guest over virtiofs, whose mounts are named and placed differently"
	lacksCall      = "the oracle's kernel lacks the call"
	asShells       = "a program that cannot be run gives the status that shells give, 127 or 126, as engines expect; runc 1.1 has 1 or 255"
	guestNetwork   = "the container's network is the VM's own, so its sysfs has the VM's superblock; it is mounted read-only as under runc"
)

// acceptedDifferences are all differences between runc and runv that have a reason. One that no
// case shows any more fails `make conformance`.
var acceptedDifferences = []accepted{
	{where: `.*[/.](self|init)\.status`, line: `Cpus_allowed(_list)?: .*`, reason: machineDiffers},
	{where: `.*[/.](self|init)\.status`, line: `(Speculation_Store_Bypass|SpeculationIndirectBranch): .*`, reason: machineDiffers},
	{where: `.*[/.](self|init)\.status`, line: `Kthread: 0`, reason: kernelDiffers},
	{where: `.*[/.](self|init)\.limits`, line: `Max (processes|pending signals) .*`, reason: "the kernel derives these from the memory that it has"},
	{where: `(least|additions)/.*(self|init)\.limits`, line: `Max open files .*`, reason: "a bundle without rlimits inherits those of the runtime's caller under runc, the kernel's in a VM"},
	{where: `(least|few-namespaces)/(sysctl|uname)`, line: `(kernel/hostname )?(\S+ \(none\) x86_64|\S+) ok`, reason: "without a hostname or uts namespace of its own a container has the host's name under runc, the VM's here"},
	{where: `.*[/.](self|init)\.attr`, line: `current ("" EINVAL|"unconfined" ok)`, reason: "the guest's kernel has AppArmor, the oracle's none; nobody is confined by it"},

	{where: `.*[/.]init\.fd`, line: `[012] (/dev/null|\S*/runv-test-outputN.*|pipe:\[N\])`, reason: "standard streams that are no terminal reach the guest as pipes, whatever they are on the host"},

	{where: `.*[/.](self|init)\.cgroup`, line: `[0-9]+:[a-z_=,]*:/\S*|0::/\S*`, reason: cgroup2},
	{where: `.*[/.](self|init)\.fd`, line: `[34] /sys/fs/cgroup/.*`, reason: cgroup2 + "; Go's runtime holds the files of the CPU limit open"},
	{where: `.*[/.](self|init)\.mountinfo`, line: `/sys/fs/cgroup(/[a-z_,]+)? .*`, reason: cgroup2},
	{where: `.*[/.]places`, line: `/sys/fs/cgroup .*`, reason: cgroup2},

	{where: `.*[/.](self|init)\.mountinfo`, line: `\S+ shows (BUNDLE|DIR)\S* of .*|\S+ shows /ID/\S+ of virtiofs .*`, reason: overVirtiofs},
	{where: `.*[/.](self|init)\.mountinfo`, line: `/sys shows / of sysfs sysfs, r[ow]`, reason: guestNetwork},
	{where: `.*[/.]writes`, line: `/sys/class/net/lo/mtu (EROFS|EACCES)`, reason: guestNetwork},
	{where: `.*[/.](self|init)\.mountinfo`, line: `/proc/(kcore|sysrq-trigger|latency_stats|timer_stats|sched_debug|scsi|acpi) .*`, reason: kernelDiffers},
	{where: `.*[/.]paths`, line: `/proc/(kcore|sysrq-trigger|latency_stats|timer_stats|sched_debug|scsi|acpi) .*`, reason: kernelDiffers},
	{where: `.*[/.]dev`, line: `/dev/core .*`, reason: kernelDiffers + ": runc links it if there is a /proc/kcore"},

	{where: `(rich|mounts)/places`, line: `/tmp 04(0755|1770) 7:8`, reason: "runc before 1.2 gives a tmpfs the mode of the directory below it, whatever its options say"},
	{where: `.*[/.](self|init)\.mountinfo`, line: `\S+ shows / of tmpfs \S+, (mode=\d+,)?rw`, reason: "runc before 1.2 gives a tmpfs the mode of the directory below it by chmod, not by an option"},
	{where: `(rich|user)/(self.status|prctl)`, line: `(Umask:|umask) 0+2[27]`, reason: "runc before 1.2 forgets the umask of processes that are added"},

	{where: `(rich|limits)/self.limits`, line: `Max open files .*`, reason: "runc built by Go 1.19 may raise the soft limit of open files of processes that are added to the hard one", sometimes: true},

	{where: `.*[/.]syscalls`, line: `(delete_module|finit_module|ioperm|iopl|kexec_load) \w+`, reason: lacksCall},
	{where: `(verbs|endings|inits)/.*`, line: `(exec ID nosuch: )?exit (1|255|127): (executable file not found in \$PATH|no such file or directory)`, reason: asShells},
	{where: `(verbs|endings|inits)/.*`, line: `(exec ID /etc(/passwd)?: )?exit (1|255|126): (permission denied|is a directory|exec format error)`, reason: asShells},
	{where: `verbs/.*`, line: `kill ID (99|NOSUCH): exit 1: (an error|unknown signal|container not running|container does not exist)`, reason: "runv looks at the signal before it looks for the container"},
	{where: `refusals/run`, line: `(empty|odd) ociVersion: exit [01], (an error|nothing) said`, reason: "runc looks at no ociVersion; the specification wants a semantic version, of a major version that the runtime knows"},
	{where: `documents/(state|list) .*`, line: `(\[0\]\.)?annotations\.dev\.runv\..*`, reason: "runv tells of the VM in annotations of its own"},
	{where: `documents/(state|list) .*`, line: `(\[0\]\.)?ociVersion = "1\.[0-9.]+(-dev)?"`, reason: "each tells the version of the specification that it knows"},
	{where: `documents/spec`, line: `hostname = .*|ociVersion = .*`, reason: "runv's specification names runv, and the version that it knows"},
	{where: `documents/spec`, line: `linux\.namespaces\[5\]\.type = "cgroup"`, reason: cgroup2 + ", for which runc's specification has a cgroup namespace, too"},
	{where: `documents/stats`, line: `data\..*`, reason: cgroup2 + ", which counts other things"},
	{where: `additions/.*\.session`, line: `processes seen: [0-9]+`, reason: "a process of runc's own may still be seen when another is added", sometimes: true},
	{where: `additions/.*oom_score_adj`, line: `0|500`, reason: "runc gives oomScoreAdj to a container's first process only"},
	{where: `(capabilities|additions)/.*syscalls`, line: `syslog (ok|EPERM)`, reason: kernelDiffers + ": the guest's lets CAP_SYS_ADMIN read the log"},
	{where: `privileged/syscalls`, line: `rtprio (ok|EPERM)`, reason: "the oracle's machine gives cgroups no real-time share"},
	{where: `(privileged|rich|devices)/nodes`, line: `tun mknod ok, read (ok|ENODEV), write (ok|ENODEV)`, reason: machineDiffers},
	{where: `privileged/nodes`, line: `(kvm|loop|mem) mknod ok, .*`, reason: machineDiffers},
	{where: `.*[/.]syscalls`, line: `open_by_handle_at (EFAULT|EPERM)`, reason: kernelDiffers},
	{where: `.*[/.]syscalls`, line: `socket vsock (ok|EAFNOSUPPORT)`, reason: kernelDiffers},
}

const (
	hostCgroup  = "the program looks for the container's limits in the host's cgroup v1 at cgroupsPath; there are the VM's, which are higher, and the container's are in the guest's cgroup v2"
	noSuchGroup = "this kernel has no such controller or file"
	hookTests   = "the program's own error: it wants what contradicts the specification or itself"
	hostSpaces  = "the program compares or joins namespaces of the host; a container's are the guest's"
)

// imperfect are the programs of runtime-tools that do not pass under both.
var imperfect = []program{
	{name: "delete", reason: "both delete a container that is created, on which callers count"},
	{name: "delete_resources", runc: true, reason: hostCgroup},
	{name: "hooks", reason: hookTests},
	{name: "hooks_stdin", reason: "the program wants the status created in prestart hooks, where the specification says creating"},
	{name: "killsig", runc: true, runv: true, flaky: [2]bool{false, true}, reason: "the program sends the signal once the container runs, perhaps before its shell has set its trap; under TCG a shell starts slowly"},
	{name: "linux_cgroups_blkio", reason: "this kernel has no blkio.leaf_weight; the guest has no device of the numbers that are limited"},
	{name: "linux_cgroups_cpus", runc: true, reason: hostCgroup},
	{name: "linux_cgroups_devices", reason: "the program wants the list of the host's cgroup v1 to begin with its own rule; runc lists what it allows by default first. " + hostCgroup},
	{name: "linux_cgroups_hugetlb", reason: noSuchGroup},
	{name: "linux_cgroups_memory", reason: "this kernel has no limits of kernel memory. " + hostCgroup},
	{name: "linux_cgroups_network", reason: noSuchGroup},
	{name: "linux_cgroups_pids", runc: true, reason: hostCgroup},
	{name: "linux_cgroups_relative_blkio", reason: noSuchGroup},
	{name: "linux_cgroups_relative_cpus", runc: true, reason: hostCgroup},
	{name: "linux_cgroups_relative_devices", reason: "as linux_cgroups_devices"},
	{name: "linux_cgroups_relative_hugetlb", reason: noSuchGroup},
	{name: "linux_cgroups_relative_memory", reason: "as linux_cgroups_memory"},
	{name: "linux_cgroups_relative_network", reason: noSuchGroup},
	{name: "linux_cgroups_relative_pids", runc: true, reason: hostCgroup},
	{name: "linux_mount_label", reason: "neither kernel has SELinux"},
	{name: "linux_ns_itype", runc: true, reason: hostSpaces},
	{name: "linux_ns_nopath", runc: true, reason: hostSpaces},
	{name: "linux_ns_path", runc: true, reason: hostSpaces},
	{name: "linux_process_apparmor_profile", reason: "the oracle's machine has no AppArmor, and runv refuses profiles by name"},
	{name: "linux_rootfs_propagation", runv: true, reason: "runc binds the root to itself before pivot_root, which an unbindable one cannot be"},
	{name: "linux_seccomp", runv: true, reason: "the program denies getcwd, by which runc 1.1 checks the working directory"},
	{name: "misc_props", reason: "the program gives the container no runtimetest to run"},
	{name: "pidfile", runv: true, flaky: [2]bool{false, true}, reason: "the program signals a process that has ended"},
	{name: "poststart", reason: hookTests},
	{name: "poststart_fail", reason: "a poststart hook that fails stops the container, as the specification says since 1.3"},
	{name: "poststop_fail", runv: true, reason: "the program wants a warning in the log, which runc 1.1 writes but does not let it see"},
	{name: "prestart", reason: "the program wants prestart hooks after start, where the specification has them in create"},
	{name: "process_capabilities", runv: true, reason: "the oracle's machine lacks capabilities that the program wants"},
	{name: "process_capabilities_fail", reason: "both warn of a capability that they do not know, and go on"},
	{name: "process_rlimits", reason: "runtimetest is a Go program, whose runtime raises the soft limit of open files before it looks"},
	{name: "start", reason: "the program wants a container without a process to be created, and to fail at start"},
}
