package pod_test

import (
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/pod"
)

func TestHostParameters(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		path := filepath.Join(dir, name)
		assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		assert.NilError(t, os.WriteFile(path, []byte(text), 0o644))
	}
	write("sys/vm/overcommit_memory", "0\n")
	write("sys/vm/overcommit_ratio", "50\n")
	write("sys/kernel/core_pattern", "|/usr/lib/handler %p\n")
	write("sys/net/ipv4/tcp_rmem", "4096\t131072\t33554432\n")
	write("sys/kernel/modprobe", "/sbin/modprobe\n")
	write("meminfo", "MemTotal:       24000000 kB\nCommitLimit:    12342040 kB\n")
	assert.DeepEqual(t, pod.ReadParameters(dir), map[string]string{
		"vm.overcommit_memory": "0", "vm.overcommit_ratio": "50", "net.ipv4.tcp_rmem": "4096 131072 33554432",
	})
	// A ratio would be one of the guest's memory.
	write("sys/vm/overcommit_memory", "2\n")
	write("sys/kernel/core_pattern", "core.%p\n")
	assert.DeepEqual(t, pod.ReadParameters(dir), map[string]string{
		"vm.overcommit_memory": "2", "vm.overcommit_kbytes": "12342040", "net.ipv4.tcp_rmem": "4096 131072 33554432",
		"kernel.core_pattern": "core.%p",
	})
}
