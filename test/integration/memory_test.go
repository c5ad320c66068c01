package integration

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// limitsOfAMachine are kernel parameters that say how much there may be of something. A kernel derives most of them from its
// machine's memory.
var limitsOfAMachine = []string{
	"fs.aio-max-nr", "fs.epoll.max_user_watches", "fs.fanotify.max_queued_events", "fs.fanotify.max_user_groups",
	"fs.fanotify.max_user_marks", "fs.file-max", "fs.inotify.max_queued_events", "fs.inotify.max_user_instances",
	"fs.inotify.max_user_watches", "fs.mount-max", "fs.nr_open", "fs.pipe-max-size", "kernel.keys.maxbytes", "kernel.keys.maxkeys",
	"kernel.keys.root_maxbytes", "kernel.keys.root_maxkeys", "kernel.pid_max", "kernel.pty.max", "kernel.threads-max",
	"net.core.somaxconn", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_max_syn_backlog", "net.ipv4.tcp_max_tw_buckets",
	"net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem", "user.max_cgroup_namespaces", "user.max_ipc_namespaces", "user.max_mnt_namespaces",
	"user.max_net_namespaces", "user.max_pid_namespaces", "user.max_time_namespaces", "user.max_user_namespaces",
	"user.max_uts_namespaces", "vm.max_map_count", "vm.overcommit_ratio",
}

// The VM is small, and nothing but its speed may tell a container so: the kernel's limits are as on the host or
// higher, what is not used may be larger than the VM, and who uses more than the container may have is killed for it.
func TestMemoryOfTheVM(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "100000"}, func(s *specs.Spec) {
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: new(int64(64 << 20))}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")

	script := "ulimit -u; ulimit -i; cat /proc/sys/vm/overcommit_memory"
	for _, key := range limitsOfAMachine {
		script += "; echo " + key + " $(cat /proc/sys/" + strings.ReplaceAll(key, ".", "/") + ")"
	}
	lines := strings.Split(strings.TrimSpace(e.OK("exec", "box", "sh", "-c", script)), "\n")
	assert.Equal(t, len(lines), 3+len(limitsOfAMachine), "%q", lines)
	threads := parameterNumbers(t, onHost(t, "kernel.threads-max"))[0]
	for _, line := range lines[:2] {
		assert.Check(t, line == "unlimited" || parameterNumbers(t, line)[0] >= threads/2, "ulimit is %s", line)
	}
	if onHost(t, "vm.overcommit_memory") == "2" {
		assert.Check(t, cmp.Equal(lines[2], "2"))
	} else {
		assert.Check(t, cmp.Equal(lines[2], "1"))
	}
	for _, line := range lines[3:] {
		key, value, _ := strings.Cut(line, " ")
		host, guest := parameterNumbers(t, onHost(t, key)), parameterNumbers(t, value)
		assert.Assert(t, cmp.Equal(len(guest), len(host)), key)
		for i := range host {
			if key == "net.ipv4.ip_local_port_range" && i == 0 {
				assert.Check(t, guest[i] <= host[i], "%s is %s", key, value)
				continue
			}
			assert.Check(t, guest[i] >= host[i], "%s is %s, %v on the host", key, value, host)
		}
	}

	// dd takes memory for a block, and uses none when it copies none.
	e.OK("exec", "box", "dd", "if=/dev/zero", "of=/dev/null", "bs=900M", "count=0")
	r := e.Run("exec", "box", "dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1")
	assert.Equal(t, r.Code, 137, "%s%s", r.Stdout, r.Stderr)
	e.OK("kill", "box", "KILL")
	e.AwaitStatus("box", specs.StateStopped)
	assert.Assert(t, cmp.Contains(e.OK("events", "box"), `{"type":"oom","id":"box"`))
	assert.Assert(t, cmp.Contains(e.OK("console", "box"), "Memory cgroup out of memory"), "the VM had no more, before the container had too much")
}

// onHost is a kernel parameter of the host.
func onHost(t *testing.T, key string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/")))
	assert.NilError(t, err)
	return strings.TrimSpace(string(data))
}

// parameterNumbers reads numbers, of which those that are too large are the largest.
func parameterNumbers(t *testing.T, text string) (all []int64) {
	t.Helper()
	for word := range strings.FieldsSeq(text) {
		n, err := strconv.ParseUint(word, 10, 64)
		assert.NilError(t, err, fmt.Sprintf("%q", text))
		all = append(all, int64(min(n, math.MaxInt64)))
	}
	return all
}

// A VM of many pages needs more for itself than one of few: it has that beside the container's limit, too.
func TestMemoryLimitIsReachedInLargeVM(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"dd", "if=/dev/zero", "of=/dev/null", "bs=1500M", "count=1"}, func(s *specs.Spec) {
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: new(int64(1 << 30))}
	})
	e.OK("create", "--bundle", bundle, "box")
	e.OK("start", "box")
	e.AwaitStatus("box", specs.StateStopped)
	assert.Assert(t, cmp.Contains(e.OK("console", "box"), "Memory cgroup out of memory"))
}
