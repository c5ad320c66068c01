package engines

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// podmanCgroup is where Podman has its cgroups if nobody says otherwise. One cannot say it once for all.
const podmanCgroup = "libpod_parent"

// newPodman configures a Podman whose default runtime is an oracle or runv. It ends with the test.
func newPodman(t testing.TB, runtime string) *engine {
	t.Helper()
	e := newEngine(t, "podman", runtime)
	e.cgroup = podmanCgroup
	e.state = "/run/" + runtime // Podman 4.3 does not tell its clean-up of another
	for name, text := range map[string]string{
		"containers.conf": fmt.Sprintf(`
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"] # a test's machine may lack CAP_SYS_RESOURCE
log_driver = "k8s-file"

[network]
network_backend = "netavark"
network_config_dir = %[1]q
default_subnet = "10.211.0.0/24"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
stop_timeout = 1
tmp_dir = %[2]q
runtime = %[3]q

[engine.runtimes]
%[3]s = [%[4]q]
`, e.path("networks"), e.path("tmp"), runtime, e.program),
		"storage.conf": fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", e.path("data"), e.path("run")),
	} {
		assert.NilError(t, os.WriteFile(e.path(name), []byte(text), 0o600))
	}
	e.env = append(e.env, "CONTAINERS_CONF="+e.path("containers.conf"), "CONTAINERS_STORAGE_CONF="+e.path("storage.conf"), "RUNTIME="+e.program)
	e.stop = func() {
		mounts, _ := filepath.Glob(e.path("data", "*"))
		for _, dir := range mounts { // Podman keeps the directory of its layers mounted on itself
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
	e.ready()
	return e
}
