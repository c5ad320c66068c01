package conformance

import (
	"runv/test/compare"
	"runv/test/harness"
)

// Why a difference is accepted, in words of the document.
const (
	kernelDiffers  = "the kernels differ in version and configuration"
	machineDiffers = "the VM is a machine of its own: other CPUs, memory and devices"
	cgroup2        = "the guest has cgroup v2; the oracle's machine has v1"
	overVirtiofs   = "files of the host reach the guest over virtiofs, whose mounts are named and placed differently"
	lacksCall      = "the oracle's kernel lacks the call"
	asShells       = "a program that cannot be run gives the status that shells give, 127 or 126, as engines expect; the runcs have 1 or 255"
)

// acceptedDifferences are all differences between runc and runv that have a reason. One that no
// case shows any more fails `make conformance`.
var acceptedDifferences = []compare.Accepted{
	{Where: `.*[/.](self|init)\.status`, Line: `Cpus_allowed(_list)?: .*`, Reason: machineDiffers},
	{Where: `.*[/.](self|init)\.status`, Line: `(Speculation_Store_Bypass|SpeculationIndirectBranch): .*`, Reason: machineDiffers},
	{Where: `.*[/.](self|init)\.status`, Line: `Kthread: 0`, Reason: kernelDiffers},
	{Where: `least/(.*\.status|nodes|paths|syscalls)`, Line: `.*`, Only: harness.NewRunc, Reason: "a bundle without process.capabilities has none here and under the old runc; the new one lets it have its caller's"},
	{Where: `environment/(self|init)\.environ`, Line: compare.Order, Only: harness.NewRunc, Reason: "a variable that is set twice is where it was set first; the new runc has it where it was set last"},
	{Where: `(least|few-namespaces)/(sysctl|uname)`, Line: `(kernel/hostname )?(\S+ \(none\) x86_64|\S+) ok`, Reason: "without a hostname or uts namespace of its own a container has the host's name under runc, the VM's here"},
	{Where: `.*[/.](self|init)\.attr`, Line: `current ("" EINVAL|"unconfined" ok)`, Reason: "the guest's kernel has AppArmor, the oracle's none; nobody is confined by it"},

	{Where: `.*[/.]init\.fd`, Line: `[012] (/dev/null|\S*/runv-test-outputN.*|pipe:\[N\])`, Reason: "standard streams that are no terminal reach the guest as pipes, whatever they are on the host"},

	{Where: `.*[/.](self|init)\.cgroup`, Line: `[0-9]+:[a-z_=,]*:/\S*|0::/\S*`, Reason: cgroup2},
	{Where: `.*[/.](self|init)\.fd`, Line: `[34] /sys/fs/cgroup/.*`, Reason: cgroup2 + "; Go's runtime holds the files of the CPU limit open"},
	{Where: `.*[/.](self|init)\.mountinfo`, Line: `/sys/fs/cgroup(/[a-z_,]+)? .*`, Reason: cgroup2},
	{Where: `.*[/.]places`, Line: `/sys/fs/cgroup .*`, Reason: cgroup2},

	{Where: `.*[/.](self|init)\.mountinfo`, Line: `\S+ shows (BUNDLE|DIR|/Test\w+/\d+/)\S* of .*|\S+ shows /(ID|@\d+(~coherent)?)/\S+ of virtiofs .*|\S+ shows /tree(/\S*)? of tmpfs .*`, Reason: overVirtiofs},
	{Where: `.*[/.](self|init)\.mountinfo`, Line: `(/sys/firmware|/proc/(acpi|asound|scsi)) shows / of tmpfs tmpfs, (nr_inodes=1,)?ro(,size=4k)?`, Only: harness.NewRunc, Reason: "the new runc limits the empty tmpfs that hides a directory, which is read-only under all"},
	{Where: `.*[/.](self|init)\.mountinfo`, Line: `/proc/(kcore|sysrq-trigger|latency_stats|timer_stats|sched_debug|scsi|acpi) .*`, Reason: kernelDiffers},
	{Where: `.*[/.]paths`, Line: `/proc/(kcore|sysrq-trigger|latency_stats|timer_stats|sched_debug|scsi|acpi) .*`, Reason: kernelDiffers},
	{Where: `.*[/.]dev`, Line: `/dev/core .*`, Reason: kernelDiffers + ": runc links it if there is a /proc/kcore"},

	{Where: `(rich|mounts)/places`, Line: `/tmp 04(0755|1770) 7:8`, Only: harness.OldRunc, Reason: "runc before 1.2 gives a tmpfs the mode of the directory below it, whatever its options say"},
	{Where: `.*[/.](self|init)\.mountinfo`, Line: `\S+ shows / of tmpfs \S+, (mode=\d+,)?rw`, Only: harness.OldRunc, Reason: "runc before 1.2 gives a tmpfs the mode of the directory below it by chmod, not by an option"},
	{Where: `(rich|user)/(self.status|prctl)`, Line: `(Umask:|umask) 0+2[27]`, Only: harness.OldRunc, Reason: "runc before 1.2 forgets the umask of processes that are added"},

	{Where: `(rich|limits|least|additions)/.*(self|init).limits`, Line: `Max open files .*`, Reason: "runc built by Go 1.19 may raise the soft limit of open files to the hard one", Sometimes: true},

	{Where: `.*[/.]syscalls`, Line: `(delete_module|finit_module|ioperm|iopl|kexec_load) \w+`, Reason: lacksCall},
	{Where: `(verbs|endings|inits)/.*`, Line: `(exec ID nosuch: )?exit (1|255|127): (executable file not found in \$PATH|no such file or directory)`, Reason: asShells},
	{Where: `(verbs|endings|inits)/.*`, Line: `(exec ID /etc(/passwd)?: )?exit (1|255|126): (permission denied|is a directory|exec format error)`, Reason: asShells},
	{Where: `verbs/.*`, Line: `kill ID (99|NOSUCH): exit 1: (an error|unknown signal|container not running|container does not exist)`, Reason: "runv looks at the signal before it looks for the container"},
	{Where: `refusals/run`, Line: `(empty|odd) ociVersion: exit [01], (an error|nothing) said`, Reason: "runc looks at no ociVersion; the specification wants a semantic version, of a major version that the runtime knows"},
	{Where: `documents/(state|list) .*`, Line: `(\[0\]\.)?annotations\.dev\.runv\..*`, Reason: "runv tells of the VM in annotations of its own"},
	{Where: `documents/(state|list) .*`, Line: `(\[0\]\.)?ociVersion = "1\.[0-9.]+(-dev)?"`, Only: harness.OldRunc, Reason: "each tells the version of the specification that it knows"},
	{Where: `documents/spec`, Line: `hostname = .*|ociVersion = .*`, Reason: "runv's specification names runv, and the version that it knows"},
	{Where: `documents/spec`, Line: `process\.capabilities\.ambient.*`, Only: harness.OldRunc, Reason: "no ambient capabilities, which without inheritable ones nobody can have; the new runc's specification has none either"},
	{Where: `documents/spec`, Line: `linux\.namespaces\[5\]\.type = "cgroup"`, Reason: cgroup2 + ", for which runc's specification has a cgroup namespace, too"},
	{Where: `documents/stats`, Line: `data\..*`, Reason: cgroup2 + ", which counts other things"},
	{Where: `additions/.*\.session`, Line: `processes seen: [0-9]+`, Reason: "a process of runc's own may still be seen when another is added", Sometimes: true},
	{Where: `additions/.*oom_score_adj`, Line: `0|500`, Reason: "runc gives oomScoreAdj to a container's first process only"},
	{Where: `(capabilities|additions)/.*syscalls`, Line: `syslog (ok|EPERM)`, Reason: kernelDiffers + ": the guest's lets CAP_SYS_ADMIN read the log"},
	{Where: `privileged/syscalls`, Line: `rtprio (ok|EPERM)`, Reason: "the oracle's machine gives cgroups no real-time share"},
	{Where: `(privileged|rich|devices)/nodes`, Line: `tun mknod ok, read (ok|ENODEV), write (ok|ENODEV)`, Sometimes: true, Reason: machineDiffers},
	{Where: `privileged/nodes`, Line: `(kvm|loop|mem|ram) mknod ok, .*`, Reason: machineDiffers},
	{Where: `.*[/.]syscalls`, Line: `open_by_handle_at (EFAULT|EPERM)`, Reason: kernelDiffers},
}

const (
	hostCgroup  = "the program looks for the container's limits in the host's cgroup v1 at cgroupsPath; there are the VM's, which are higher, and the container's are in the guest's cgroup v2"
	noSuchGroup = "this kernel has no such controller or file"
	hookTests   = "the program's own error: it wants what contradicts the specification or itself"
	hostSpaces  = "the program compares or joins namespaces of the host; a container's are the guest's"
)

// Names of sides under which programs pass.
var (
	onlyRunv   = []string{runvName}
	oldAndRunv = []string{harness.OldRunc, runvName}
	newAndRunv = []string{harness.NewRunc, runvName}
	oracles    = harness.OracleNames()
	everywhere = append(harness.OracleNames(), runvName)
)

// imperfect are the programs of runtime-tools that do not pass under all runtimes.
var imperfect = []program{
	{name: "delete", reason: "all delete a container that is created, on which callers count"},
	{name: "delete_resources", passes: oracles, reason: hostCgroup},
	{name: "hooks", reason: hookTests},
	{name: "hooks_stdin", reason: "the program wants the status created in prestart hooks, where the specification says creating"},
	{name: "killsig", passes: everywhere, flaky: onlyRunv, reason: "the program sends the signal once the container runs, perhaps before its shell has set its trap; under TCG a shell starts slowly"},
	{name: "linux_cgroups_blkio", reason: "this kernel has no blkio.leaf_weight; the guest has no device of the numbers that are limited"},
	{name: "linux_cgroups_cpus", passes: oracles, reason: hostCgroup},
	{name: "linux_cgroups_devices", reason: "the program wants the list of the host's cgroup v1 to begin with its own rule; runc lists what it allows by default first. " + hostCgroup},
	{name: "linux_cgroups_hugetlb", reason: noSuchGroup},
	{name: "linux_cgroups_memory", reason: "this kernel has no limits of kernel memory. " + hostCgroup},
	{name: "linux_cgroups_network", reason: noSuchGroup},
	{name: "linux_cgroups_pids", passes: oracles, reason: hostCgroup},
	{name: "linux_cgroups_relative_blkio", reason: noSuchGroup},
	{name: "linux_cgroups_relative_cpus", passes: oracles, reason: hostCgroup},
	{name: "linux_cgroups_relative_devices", reason: "as linux_cgroups_devices"},
	{name: "linux_cgroups_relative_hugetlb", reason: noSuchGroup},
	{name: "linux_cgroups_relative_memory", reason: "as linux_cgroups_memory"},
	{name: "linux_cgroups_relative_network", reason: noSuchGroup},
	{name: "linux_cgroups_relative_pids", passes: oracles, reason: hostCgroup},
	{name: "linux_devices", passes: oldAndRunv, reason: "the program gives a FIFO device numbers, which the new runc then looks for in vain"},
	{name: "linux_mount_label", reason: "neither kernel has SELinux"},
	{name: "linux_ns_itype", passes: oracles, reason: hostSpaces},
	{name: "linux_ns_nopath", passes: oracles, reason: hostSpaces},
	{name: "linux_ns_path", passes: oracles, reason: hostSpaces},
	{name: "linux_process_apparmor_profile", reason: "the oracle's machine has no AppArmor, and runv refuses profiles by name"},
	{name: "linux_rootfs_propagation", passes: newAndRunv, reason: "the old runc binds the root to itself before pivot_root, which an unbindable one cannot be"},
	{name: "linux_seccomp", passes: onlyRunv, reason: "the program denies getcwd, by which the runcs check the working directory"},
	{name: "misc_props", reason: "the program gives the container no runtimetest to run"},
	{name: "mounts", passes: oldAndRunv, reason: "the program binds with options of a tmpfs, which the new runc refuses"},
	{name: "pidfile", passes: onlyRunv, flaky: everywhere, reason: "the program signals a process that has ended"},
	{name: "poststart", flaky: onlyRunv, reason: hookTests},
	{name: "poststart_fail", reason: "a poststart hook that fails stops the container, as the specification says since 1.3"},
	{name: "poststop_fail", passes: onlyRunv, reason: "the program wants a warning in the log, which the runcs write but do not let it see"},
	{name: "prestart", reason: "the program wants prestart hooks after start, where the specification has them in create"},
	{name: "process_capabilities", passes: onlyRunv, reason: "the oracle's machine lacks capabilities that the program wants"},
	{name: "process_capabilities_fail", reason: "all warn of a capability that they do not know, and go on"},
	{name: "process_rlimits", reason: "runtimetest is a Go program, whose runtime raises the soft limit of open files before it looks"},
	{name: "start", reason: "the program wants a container without a process to be created, and to fail at start"},
}
