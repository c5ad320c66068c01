package pod

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
)

// hostParameters are the kernel parameters of the host that the guest is told: limits that a kernel derives from the
// machine's memory or that an administrator raises, and what processes may do to each other. What else a container sees
// in /proc/sys is the guest's own: counters and what it is built with, how its kernel manages its memory and reports its
// faults, and what belongs to namespaces, which internal/network mirrors or the container's specification sets.
var hostParameters = []string{
	"vm.overcommit_memory", "vm.max_map_count", "vm.mmap_min_addr", "vm.unprivileged_userfaultfd",
	"kernel.threads-max", "kernel.keys.maxkeys", "kernel.keys.maxbytes", "kernel.keys.root_maxkeys", "kernel.keys.root_maxbytes",
	"kernel.pty.max", "kernel.perf_event_paranoid", "kernel.perf_event_mlock_kb", "kernel.yama.ptrace_scope",
	"kernel.dmesg_restrict", "kernel.kptr_restrict", "kernel.core_uses_pid", "kernel.core_pattern",
	"kernel.unprivileged_bpf_disabled",
	"fs.file-max", "fs.nr_open", "fs.aio-max-nr", "fs.mount-max", "fs.pipe-max-size", "fs.pipe-user-pages-soft",
	"fs.pipe-user-pages-hard", "fs.epoll.max_user_watches", "fs.inotify.max_queued_events", "fs.inotify.max_user_instances",
	"fs.inotify.max_user_watches", "fs.fanotify.max_queued_events", "fs.fanotify.max_user_groups", "fs.fanotify.max_user_marks",
	"fs.protected_symlinks", "fs.protected_hardlinks", "fs.protected_fifos", "fs.protected_regular", "fs.suid_dumpable",
	"user.max_cgroup_namespaces", "user.max_ipc_namespaces", "user.max_mnt_namespaces", "user.max_net_namespaces",
	"user.max_pid_namespaces", "user.max_time_namespaces", "user.max_user_namespaces", "user.max_uts_namespaces",
	"net.core.rmem_max", "net.core.wmem_max", "net.core.rmem_default", "net.core.wmem_default", "net.core.optmem_max",
	"net.ipv4.tcp_mem", "net.ipv4.udp_mem", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem", "net.ipv4.tcp_max_orphans",
	"net.ipv4.tcp_max_syn_backlog", "net.ipv4.tcp_max_tw_buckets",
	"net.ipv4.neigh.default.gc_thresh1", "net.ipv4.neigh.default.gc_thresh2", "net.ipv4.neigh.default.gc_thresh3",
	"net.ipv6.neigh.default.gc_thresh1", "net.ipv6.neigh.default.gc_thresh2", "net.ipv6.neigh.default.gc_thresh3",
	"net.ipv4.tcp_congestion_control", "net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_expect_max",
}

// With this value of vm.overcommit_memory the kernel promises no more memory than a limit that it derives from what it has.
const limitedCommit = "2"

// readParameters reads the kernel parameters of the host below dir, /proc, that the guest is told. What the host does not have is
// left out, and so is a core_pattern that names a program of the host.
func readParameters(dir string) map[string]string {
	values := make(map[string]string)
	read := func(key string) {
		data, err := os.ReadFile(filepath.Join(dir, "sys", strings.ReplaceAll(key, ".", "/")))
		if value := strings.Join(strings.Fields(string(data)), " "); err == nil && value != "" {
			values[key] = value
		}
	}
	for _, key := range hostParameters {
		read(key)
	}
	if core := values["kernel.core_pattern"]; strings.ContainsAny(core, "|@ ") {
		delete(values, "kernel.core_pattern")
	}
	if values["vm.overcommit_memory"] != limitedCommit {
		read("vm.overcommit_ratio")
	} else if limit := commitLimit(dir); limit != "" {
		values["vm.overcommit_kbytes"] = limit // a share of the guest's memory would be less
	}
	return values
}

// commitLimit is how much memory the host's kernel promises at most, in KiB; empty: it does not tell.
func commitLimit(dir string) string {
	f, err := os.Open(filepath.Join(dir, "meminfo"))
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if words := strings.Fields(s.Text()); len(words) > 1 && words[0] == "CommitLimit:" {
			return words[1]
		}
	}
	return ""
}
