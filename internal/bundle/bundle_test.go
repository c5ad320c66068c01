package bundle_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

func encode(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	assert.NilError(t, err)
	return data
}

// with returns the default configuration with one field set to a JSON value.
// The path is in the notation of FieldError: "linux.namespaces[0].path".
func with(t testing.TB, path, value string) []byte {
	t.Helper()
	return set(t, encode(t, bundle.DefaultSpec()), path, value)
}

func set(t testing.TB, doc []byte, path, value string) []byte {
	t.Helper()
	decode := func(data string) (v any) {
		dec := json.NewDecoder(strings.NewReader(data))
		dec.UseNumber() // float64 does not hold all 64 bit numbers
		assert.NilError(t, dec.Decode(&v))
		return v
	}
	root := decode(string(doc))
	var v any
	if value != "" {
		v = decode(value)
	}
	keys := strings.FieldsFunc(path, func(r rune) bool { return strings.ContainsRune(".[]", r) })
	var put func(at any, keys []string) any
	put = func(at any, keys []string) any {
		if len(keys) == 0 {
			return v
		}
		var i int
		if _, err := fmt.Sscan(keys[0], &i); err == nil {
			list, _ := at.([]any)
			for len(list) <= i {
				list = append(list, nil)
			}
			list[i] = put(list[i], keys[1:])
			return list
		}
		m, ok := at.(map[string]any)
		if !ok {
			m = map[string]any{}
		}
		if value == "" && len(keys) == 1 {
			delete(m, keys[0])
		} else {
			m[keys[0]] = put(m[keys[0]], keys[1:])
		}
		return m
	}
	return encode(t, put(root, keys))
}

func TestDefaultSpecIsValid(t *testing.T) {
	b, err := bundle.Parse(encode(t, bundle.DefaultSpec()), "/b")
	assert.NilError(t, err)
	assert.Equal(t, b.Rootfs, "/b/rootfs")
	assert.Equal(t, len(b.Warnings), 0, "%v", b.Warnings)
	assert.Equal(t, len(b.Binds()), 0)
}

func TestDefaultSpecIsLikeRunc(t *testing.T) {
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("no runc to compare with")
	}
	dir := t.TempDir()
	cmd := exec.Command("runc", "spec")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	assert.NilError(t, err)
	theirs, ours := &specs.Spec{}, &specs.Spec{}
	assert.NilError(t, json.Unmarshal(data, theirs))
	assert.NilError(t, json.Unmarshal(encode(t, bundle.DefaultSpec()), ours))

	theirs.Version, theirs.Hostname = ours.Version, ours.Hostname
	ambient := theirs.Process.Capabilities.Ambient // before runc 1.2, though none of it can be
	theirs.Process.Capabilities.Ambient = nil
	// runc has the cgroup namespace only where the host has cgroup v2; a guest always has.
	notCgroup := cmpopts.IgnoreSliceElements(func(ns specs.LinuxNamespace) bool { return ns.Type == specs.CgroupNamespace })
	if diff := cmp.Diff(theirs, ours, notCgroup); diff != "" {
		t.Errorf("differs from runc's (-runc +runv):\n%s", diff)
	}
	b, err := bundle.Parse(data, dir)
	assert.NilError(t, err)
	assert.Equal(t, len(b.Warnings), len(ambient), "%v", b.Warnings)
}

func TestAmbientCapabilities(t *testing.T) {
	data := with(t, "process.capabilities", `{"bounding":["CAP_KILL","CAP_CHOWN"],"permitted":["CAP_KILL","CAP_CHOWN"],
		"inheritable":["CAP_CHOWN","CAP_SYS_ADMIN"],"ambient":["CAP_SYS_ADMIN","CAP_KILL","CAP_CHOWN","CAP_KILL","CAP_FLY"]}`)
	b, err := bundle.Parse(data, "/bundle")
	assert.NilError(t, err)
	assert.DeepEqual(t, b.Warnings, []string{
		`process.capabilities: unknown: ignored: "CAP_FLY"`,
		"can't raise ambient capability CAP_SYS_ADMIN: operation not permitted",
		"can't raise ambient capability CAP_KILL: operation not permitted",
	})
}

// Whatever Docker writes as "not set" must not be refused.
func TestZerosThatMeanNothing(t *testing.T) {
	data := with(t, "linux.resources", `{
		"devices": [{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":5,"access":"rwm"}],
		"memory": {"disableOOMKiller":false,"kernel":0,"kernelTCP":0,"checkBeforeUpdate":false},
		"cpu": {"shares":0,"quota":0,"period":0,"realtimeRuntime":0,"realtimePeriod":0,"burst":0,"cpus":"","idle":0},
		"pids": {"limit":0}, "blockIO": {"weight":0}, "network": {}, "hugepageLimits": [], "unified": {}, "rdma": {}}`)
	data = set(t, data, "hooks", `{"prestart":[],"poststop":null}`)
	data = set(t, data, "process.apparmorProfile", `""`)
	data = set(t, data, "linux.uidMappings", `[]`)
	_, err := bundle.Parse(data, "/b")
	assert.NilError(t, err)
}

func TestHonoured(t *testing.T) {
	for path, value := range map[string]string{
		"ociVersion":                       `"1.0.0"`,
		"process.consoleSize":              `{"height":24,"width":80}`,
		"process.user":                     `{"uid":1000,"gid":1000,"umask":18,"additionalGids":[5,6]}`,
		"process.oomScoreAdj":              `-1000`,
		"process.capabilities.inheritable": `["CAP_SYS_ADMIN"]`,
		"process.env":                      `["A=","B=x=y","C= "]`,
		"process.rlimits[1]":               `{"type":"RLIMIT_CORE","soft":0,"hard":18446744073709551615}`,
		"process.scheduler":                `{"policy":"SCHED_DEADLINE","runtime":1,"deadline":2,"period":3,"flags":["SCHED_FLAG_RESET_ON_FORK"]}`,
		"process.scheduler.policy":         `"SCHED_IDLE"`,
		"process.ioPriority":               `{"class":"IOPRIO_CLASS_IDLE","priority":7}`,
		"process.execCPUAffinity":          `{"initial":"0-3,7","final":""}`,
		"process.apparmorProfile":          `"unconfined"`,
		"linux.personality":                `{"domain":"LINUX32"}`,
		"linux.memoryPolicy":               `{"mode":"MPOL_PREFERRED","nodes":"","flags":["MPOL_F_STATIC_NODES"]}`,
		"domainname":                       `"example.org"`,
		"annotations":                      `{"a":"b","c":""}`,
		"mounts[7]":                        `{"destination":"/x","type":"bind","source":"x","options":["rbind","ro","rprivate","nosuid"]}`,
		"mounts[3].options":                `["nosuid","size=10%","unheard=of","tmpcopyup"]`,
		"mounts[6].type":                   `"cgroup2"`,
		"linux.namespaces":                 `[{"type":"mount"},{"type":"network"}]`,
		"linux.rootfsPropagation":          `"rslave"`,
		"linux.sysctl":                     `{"kernel.domainname":"x","net.ipv4.ip_forward":"1","net/ipv4/conf/eth0.1/forwarding":"1","kernel.shmmax":"1","fs.mqueue.queues_max":"2"}`,
		"linux.devices":                    `[{"path":"/dev/fuse","type":"c","major":10,"minor":229,"fileMode":438,"uid":0,"gid":0},{"path":"/dev/p","type":"p"}]`,
		"linux.resources.memory":           `{"limit":67108864,"swap":-1,"reservation":1024}`,
		"linux.resources.cpu":              `{"shares":1024,"quota":-1,"period":100000}`,
		"linux.resources.pids":             `{"limit":-1}`,
		"linux.resources.cpu.burst":        `1000`,
		"linux.resources.cpu.cpus":         `"0-1,3"`,
		"linux.resources.cpu.mems":         `"0"`,
		"linux.resources.cpu.idle":         `1`,
		"linux.resources.blockIO": `{"weight":10,"weightDevice":[{"major":8,"minor":0,"weight":1000}],
			"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}],"throttleWriteBpsDevice":[{"major":4095,"minor":1048575,"rate":0}],
			"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":1}],"throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":1}]}`,
		"linux.resources.hugepageLimits":           `[{"pageSize":"2MB","limit":0},{"pageSize":"1GB","limit":18446744073709551615}]`,
		"linux.resources.rdma":                     `{"mlx5_0":{"hcaHandles":1}}`,
		"linux.resources.unified":                  `{"memory.high":"max","cgroup.max.depth":"1","io.max":"8:0 rbps=1\n8:1 wbps=1"}`,
		"linux.resources.memory.checkBeforeUpdate": `true`,
		"hooks.prestart":                           `[{"path":"/x"}]`,
		"hooks.createRuntime":                      `[{"path":"/x","args":["","a"],"env":["A=b","C"],"timeout":1}]`,
		"hooks.createContainer":                    `[{"path":"/x","timeout":2147483648}]`,
		"hooks.startContainer":                     `[{"path":"/x"},{"path":"/x"}]`,
		"hooks.poststart":                          `[{"path":"/x"}]`,
		"hooks.poststop":                           `[{"path":"/x"}]`,
		"linux.seccomp":                            `{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"flags":[],"architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`,
	} {
		// What uses uts or ipc needs the rest of the default.
		data := with(t, path, value)
		if path == "linux.namespaces" {
			data = set(t, data, "hostname", "")
		}
		b, err := bundle.Parse(data, "/b")
		assert.NilError(t, err, path)
		assert.Equal(t, len(b.Warnings), 0, "%s: %v", path, b.Warnings)
	}
}

func TestSeccomp(t *testing.T) {
	b, err := bundle.Parse(with(t, "linux.seccomp", `{}`), "/b")
	assert.NilError(t, err)
	assert.Assert(t, b.Seccomp() == nil)
	b, err = bundle.Parse(with(t, "linux.seccomp", `{"defaultAction":"SCMP_ACT_ALLOW"}`), "/b")
	assert.NilError(t, err)
	assert.Assert(t, len(b.Seccomp().Program) > 0)
	spec, err := b.GuestSpec("/g", nil, nil)
	assert.NilError(t, err)
	assert.Assert(t, !strings.Contains(string(spec), "seccomp"), "the guest gets the program only")
}

func TestRefusals(t *testing.T) {
	type row struct{ path, value, field, reason string }
	notImplemented := []row{
		{"ociVersion", `"2.0.0"`, "ociVersion", "major version 1"},
		{"ociVersion", `"0.9.0"`, "ociVersion", "major version 1"},
		{"process.apparmorProfile", `"docker-default"`, "", "no AppArmor in the guest"},
		{"process.selinuxLabel", `"system_u:object_r:x:s0"`, "", "no SELinux in the guest"},
		{"process.commandLine", `"dir"`, "", "another platform"},
		{"mounts[2].type", `"nfs"`, "", `"nfs" is not supported`},
		{"linux.namespaces[4].path", `"/proc/1/ns/mnt"`, "", "a mount namespace cannot be joined"},
		{"linux.namespaces", `[{"type":"mount"}]`, "", "a virtual machine cannot use the host's network; publish ports, or give the container a network of its own"},
		{"linux.namespaces", `[{"type":"pid"}]`, "", "without a mount namespace"},
		{"linux.seccomp.listenerPath", `"/run/agent.sock"`, "", "not supported"},
		{"linux.seccomp.listenerMetadata", `"x"`, "", "not supported"},
		{"linux.seccomp", `{"defaultAction":"SCMP_ACT_NOTIFY"}`, "linux.seccomp.defaultAction", "not supported"},
		{"linux.intelRdt", `{"closID":"x"}`, "", "cannot partition the host's caches"},
		{"linux.netDevices", `{"eth0":{}}`, "", "cannot be moved into the VM"},
		{"linux.mountLabel", `"x"`, "", "no SELinux in the guest"},
		{"linux.resources.unified", `{"cgroup.procs":"1"}`, `linux.resources.unified["cgroup.procs"]`, "controls the container"},
		{"solaris", `{}`, "", "another platform"},
		{"windows", `{"layerFolders":[]}`, "", "another platform"},
		{"zos", `{}`, "", "another platform"},
		{"freebsd", `{}`, "", "another platform"},
		{"vm", `{"kernel":{"path":"/k"}}`, "", "configured on the host"},
	}
	invalid := []row{
		{"ociVersion", "", "", "must not be empty"},
		{"ociVersion", `"one"`, "", "not a semantic version"},
		{"ociVersion", `"1.0"`, "", "not a semantic version"},
		{"process", "", "", "must be given"},
		{"process.args", "", "", "must not be empty"},
		{"process.args", `[]`, "", "must not be empty"},
		{"process.args", `"sh"`, "", "string does not fit (line 1, column "},
		{"process.args[0]", `"a\u0000b"`, "", "NUL"},
		{"process.args[0]", `"` + strings.Repeat("x", 128<<10) + `"`, "", "longer than 131071"},
		{"process.cwd", "", "", "must not be empty"},
		{"process.cwd", `"tmp"`, "", "not an absolute path"},
		{"process.cwd", `"/\u0000"`, "", "NUL"},
		{"process.env[0]", `"PATH"`, "", `"PATH" is not NAME=VALUE`},
		{"process.env[1]", `"=x"`, "", "not NAME=VALUE"},
		{"process.user.umask", `512`, "", "more than 0777"},
		{"process.user.uid", `-1`, "", "does not fit"},
		{"process.oomScoreAdj", `1001`, "", "between -1000 and 1000"},
		{"process.consoleSize", `{"height":70000,"width":80}`, "", "more than 65535"},
		{"process.rlimits[0].type", `"RLIMIT_FOO"`, "", "not known"},
		{"process.rlimits[0].soft", `2048`, "", "more than the hard limit"},
		{"process.rlimits[1]", `{"type":"RLIMIT_NOFILE","soft":1,"hard":1}`, "process.rlimits[1].type", "twice"},
		{"process.scheduler", `{}`, "process.scheduler.policy", "must not be empty"},
		{"process.scheduler", `{"policy":"SCHED_ODD"}`, "process.scheduler.policy", "not known"},
		{"process.scheduler", `{"policy":"SCHED_OTHER","nice":20}`, "process.scheduler.nice", "20 is not between -20 and 19"},
		{"process.scheduler", `{"policy":"SCHED_BATCH","nice":-21}`, "process.scheduler.nice", "-21"},
		{"process.scheduler", `{"policy":"SCHED_FIFO"}`, "process.scheduler.priority", "0 is not between 1 and 99"},
		{"process.scheduler", `{"policy":"SCHED_RR","priority":100}`, "process.scheduler.priority", "100"},
		{"process.scheduler", `{"policy":"SCHED_IDLE","priority":1}`, "process.scheduler.priority", "not for SCHED_IDLE"},
		{"process.scheduler", `{"policy":"SCHED_RR","priority":1,"period":1}`, "", "not for SCHED_RR"},
		{"process.scheduler", `{"policy":"SCHED_OTHER","flags":["SCHED_FLAG_ODD"]}`, "process.scheduler.flags", "not known"},
		{"process.ioPriority", `{"class":"IOPRIO_CLASS_BE","priority":8}`, "process.ioPriority.priority", "8 is not between 0 and 7"},
		{"process.ioPriority", `{"priority":0}`, "process.ioPriority.class", "not known"},
		{"process.execCPUAffinity", `{"initial":"x"}`, "process.execCPUAffinity.initial", `"x": "x" is not a number`},
		{"process.execCPUAffinity", `{"final":"3-1"}`, "process.execCPUAffinity.final", "counts down"},
		{"linux.personality", `{"domain":"BSD"}`, "linux.personality.domain", "not known"},
		{"linux.memoryPolicy", `{"mode":"MPOL_ODD"}`, "linux.memoryPolicy.mode", "not known"},
		{"linux.memoryPolicy", `{"mode":"MPOL_BIND","nodes":""}`, "linux.memoryPolicy.nodes", "at least one node"},
		{"linux.memoryPolicy", `{"mode":"MPOL_LOCAL","nodes":"0"}`, "linux.memoryPolicy.nodes", "takes no nodes"},
		{"linux.memoryPolicy", `{"mode":"MPOL_BIND","nodes":"1024"}`, "linux.memoryPolicy.nodes", "more than 1023"},
		{"linux.memoryPolicy", `{"mode":"MPOL_BIND","nodes":"0","flags":["x"]}`, "linux.memoryPolicy.flags", "not known"},
		{"hooks.prestart", `[{"path":""}]`, "hooks.prestart[0].path", "not an absolute path"},
		{"hooks.createRuntime", `[{"path":"/x"},{"path":"bin/x"}]`, "hooks.createRuntime[1].path", `"bin/x" is not an absolute path`},
		{"hooks.createContainer", `[{"path":"/x","timeout":0}]`, "hooks.createContainer[0].timeout", "0 is not more than 0 seconds"},
		{"hooks.startContainer", `[{"path":"/x","timeout":-1}]`, "hooks.startContainer[0].timeout", "-1 is not more"},
		{"hooks.poststart", `[{"path":"/x\u0000"}]`, "hooks.poststart[0].path", "NUL"},
		{"hooks.poststop", `[{"path":"/x","args":["x","\u0000"]}]`, "hooks.poststop[0].args[1]", "NUL"},
		{"hooks.poststop", `[{"path":"/x","env":["A=\u0000"]}]`, "hooks.poststop[0].env[0]", "NUL"},
		{"hooks.poststop", `[{"path":"/x","timeout":"1"}]`, "hooks.poststop.timeout", "does not fit"},
		{"root", "", "", "must be given"},
		{"root.path", `""`, "", "must not be empty"},
		{"root.path", `"\u0000"`, "", "NUL"},
		{"linux", "", "", "must be given"},
		{"hostname", `"` + strings.Repeat("x", 65) + `"`, "", "longer than 64"},
		{"linux.namespaces", `[{"type":"mount"},{"type":"network"}]`, "hostname", "without a uts namespace"},
		{"linux.namespaces[0].path", `"proc/1/ns/pid"`, "", "not an absolute path"},
		{"linux.namespaces[0].path", `"/proc/1/ns/pid\u0000"`, "", "holds a NUL"},
		{"annotations", `{"":"x"}`, "", "must not be empty"},
		{"mounts[0].destination", `""`, "", "must not be empty"},
		{"mounts[0].type", `""`, "", "must not be empty"},
		{"mounts[0].options", `["a\u0000"]`, "mounts[0].options[0]", "NUL"},
		{"mounts[7]", `{"destination":"/x","options":["bind"]}`, "mounts[7].source", "must not be empty"},
		{"linux.namespaces[5].type", `"pid"`, "", "given twice"},
		{"linux.namespaces[5].type", `"alien"`, "", "not known"},
		{"linux.rootfsPropagation", `"odd"`, "", "not known"},
		{"linux.maskedPaths[0]", `""`, "", "must not be empty"},
		{"linux.readonlyPaths[1]", `""`, "", "must not be empty"},
		{"linux.cgroupsPath", `"\u0000"`, "", "NUL"},
		{"linux.seccomp", `{"defaultAction":"ALLOW"}`, "linux.seccomp.defaultAction", "not known"},
		{
			"linux.seccomp", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_LOG","args":[{"op":"=="}]}]}`,
			"linux.seccomp.syscalls[0].args[0].op", `"==" is not known`,
		},
		{
			"linux.seccomp", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_LOG","args":[{"value":-1}]}]}`,
			"linux.seccomp.syscalls.args.value", "does not fit",
		},
		{"linux.sysctl", `{"kernel.panic":"1"}`, `linux.sysctl["kernel.panic"]`, "does not belong to a namespace"},
		{"linux.sysctl", `{"kernel.hostname":"x"}`, `linux.sysctl["kernel.hostname"]`, "set by hostname"},
		{"linux.sysctl", `{"net.../x":"x"}`, `linux.sysctl["net.../x"]`, "not the name"},
		{"linux.sysctl", `{"kernel/panic":"1"}`, `linux.sysctl["kernel/panic"]`, "does not belong"},
		{"linux.devices", `[{"path":"","type":"c"}]`, "linux.devices[0].path", "must not be empty"},
		{"linux.devices", `[{"path":"/x","type":"z"}]`, "linux.devices[0].type", "not one of"},
		{"linux.devices", `[{"path":"/x","type":"c","major":-1}]`, "linux.devices[0].major", "-1"},
		{"linux.devices", `[{"path":"/x","type":"c","minor":1048576}]`, "linux.devices[0].minor", "1048576"},
		{"linux.resources.devices[0].type", `"p"`, "", "not one of"},
		{"linux.resources.devices[0].access", `"x"`, "", "more than r, w and m"},
		{"linux.resources.devices[0].major", `-2`, "", "-2"},
		{"linux.resources.memory.limit", `-2`, "", "less than -1"},
		{"linux.resources.memory", `{"limit":1024,"swap":1023}`, "linux.resources.memory.swap", "less than the memory limit"},
		{"linux.resources.cpu.period", `999`, "", "between 1000 and 1000000"},
		{"linux.resources.memory", `{"swap":1024}`, "linux.resources.memory.swap", "without a memory limit"},
		{"linux.resources.cpu.quota", `999`, "", "less than 1000"},
		{"linux.resources.cpu", `{"burst":2000,"quota":1000}`, "linux.resources.cpu.burst", "more than the quota"},
		{"linux.resources.cpu.idle", `2`, "", "neither 0 nor 1"},
		{"linux.resources.cpu", `{"idle":1,"shares":2}`, "linux.resources.cpu.shares", "together with idle"},
		{"linux.resources.cpu.cpus", `"0-"`, "", "not a list"},
		{"linux.resources.cpu.cpus", `"all"`, "", "not a list"},
		{"linux.resources.cpu.cpus", `"8192"`, "", "not below 8192"},
		{"linux.resources.cpu.mems", `"3-1"`, "", "reversed"},
		{"linux.resources.pids.limit", `-2`, "", "less than -1"},
		{"linux.resources.blockIO.weight", `9`, "", "not between 10 and 1000"},
		{"linux.resources.blockIO.weightDevice[0]", `{"major":8,"minor":0,"weight":1001}`, "linux.resources.blockIO.weightDevice[0].weight", "not between"},
		{"linux.resources.blockIO.weightDevice[0]", `{"major":-1,"minor":0}`, "linux.resources.blockIO.weightDevice[0].major", "major number"},
		{"linux.resources.blockIO.throttleWriteIOPSDevice[0]", `{"major":8,"minor":1048576}`, "linux.resources.blockIO.throttleWriteIOPSDevice[0].minor", "minor number"},
		{"linux.resources.hugepageLimits[0]", `{"pageSize":"2M/","limit":1}`, "linux.resources.hugepageLimits[0].pageSize", "not a size"},
		{"linux.resources.rdma", `{"a b":{}}`, `linux.resources.rdma["a b"]`, "not the name"},
		{"linux.resources.unified", `{"../memory.max":"1"}`, `linux.resources.unified["../memory.max"]`, "not of the form"},
		{"linux.resources.unified", `{"memory":"1"}`, `linux.resources.unified["memory"]`, "not of the form"},
		{"linux.resources.unified", `{"memory.max":"\u0000"}`, `linux.resources.unified["memory.max"]`, "NUL"},
	}
	check := func(r row, kind func(error) bool) {
		t.Helper()
		field := r.field
		if field == "" {
			field = r.path
		}
		_, err := bundle.Parse(with(t, r.path, r.value), "/b")
		var fe *bundle.FieldError
		assert.Assert(t, errors.As(err, &fe), "%s: %v", r.path, err)
		assert.Equal(t, fe.Field, field)
		assert.ErrorContains(t, err, "config.json: "+field+": ")
		assert.ErrorContains(t, err, r.reason)
		assert.Assert(t, kind(err), "%s: kind of %v", r.path, err)
		assert.Assert(t, !strings.Contains(err.Error(), "\n"))
	}
	seen := map[string]bool{}
	for _, r := range notImplemented {
		check(r, errdefs.IsNotImplemented)
		seen[strings.NewReplacer("[0]", "[]", "[1]", "[]", "[2]", "[]").Replace(r.path)] = true
	}
	for _, r := range invalid {
		check(r, errdefs.IsInvalidArgument)
	}
	for _, f := range bundle.Fields() {
		if f.Support == bundle.Refused {
			assert.Assert(t, seen[f.Path], "no case for the refused field %s", f.Path)
		}
	}
}

// What an earlier mount shows in the container's root only the guest can look up.
func TestBindsOfEarlierMounts(t *testing.T) {
	data := with(t, "root.path", `"/b/rootfs"`)
	for i, m := range []string{
		`{"destination":"/data","source":"/host","options":["bind"]}`,
		`{"destination":"/a","source":"/b/rootfs/data/x","options":["bind"]}`,
		`{"destination":"/b","source":"rootfs/data","options":["bind"]}`,
		`{"destination":"/c","source":"/b/rootfs/database","options":["bind"]}`,
		`{"destination":"/d","source":"/b/rootfs/later/x","options":["bind"]}`,
		`{"destination":"/later","source":"/host","options":["bind"]}`,
	} {
		data = set(t, data, fmt.Sprintf("mounts[%d]", 7+i), m)
	}
	b, err := bundle.Parse(data, "/b")
	assert.NilError(t, err)
	binds := map[int]string{}
	for _, bind := range b.Binds() {
		binds[bind.Index] = "/share"
	}
	assert.DeepEqual(t, binds, map[int]string{7: "/share", 10: "/share", 11: "/share", 12: "/share"})
	guest, err := b.GuestSpec("/root", binds, nil)
	assert.NilError(t, err)
	var s specs.Spec
	assert.NilError(t, json.Unmarshal(guest, &s))
	assert.Equal(t, s.Mounts[8].Source, "/root/data/x")
	assert.Equal(t, s.Mounts[9].Source, "/root/data")
	assert.Equal(t, s.Mounts[10].Source, "/share")
	mapped := set(t, data, "mounts[8]", `{"destination":"/a","source":"/b/rootfs/data/x","options":["bind","idmap"],
		"uidMappings":[{"containerID":0,"hostID":1000,"size":1}],"gidMappings":[{"containerID":0,"hostID":1000,"size":1}]}`)
	_, err = bundle.Parse(mapped, "/b")
	assert.ErrorContains(t, err, "mounts[8]: ids of what an earlier mount shows cannot be mapped")
}

func TestExclusiveBinds(t *testing.T) {
	data := with(t, "mounts[7]", `{"destination":"/a","source":"/a","options":["bind"]}`)
	data = set(t, data, "mounts[8]", `{"destination":"/b","source":"/b","options":["bind"]}`)
	exclusive := func(annotation string) (got []string, err error) {
		b, err := bundle.Parse(set(t, data, "annotations", annotation), "/bundle")
		if err != nil {
			return nil, err
		}
		for _, bind := range b.Binds() {
			if bind.Exclusive {
				got = append(got, bind.Source)
			}
		}
		return got, nil
	}
	for annotation, want := range map[string][]string{
		`{"other":"/a"}`:                 nil,
		`{"dev.runv.exclusive":"/a"}`:    {"/a"},
		`{"dev.runv.exclusive":"/b,/a"}`: {"/a", "/b"},
	} {
		got, err := exclusive(annotation)
		assert.NilError(t, err)
		assert.DeepEqual(t, got, want)
	}
	for _, annotation := range []string{`{"dev.runv.exclusive":""}`, `{"dev.runv.exclusive":"/a,/proc"}`, `{"dev.runv.exclusive":"/a, /b"}`} {
		_, err := exclusive(annotation)
		assert.ErrorContains(t, err, "annotations[dev.runv.exclusive]: ")
		assert.ErrorContains(t, err, "is the destination of no bind mount")
	}
}

func TestWarnings(t *testing.T) {
	for _, r := range []struct{ path, value, want string }{
		{"process.capabilities.ambient", `["CAP_FLY","cap_kill"]`, `process.capabilities: unknown: ignored: "CAP_FLY", "cap_kill"`},
		{"linux.personality", `{"domain":"LINUX","flags":["x"]}`, "linux.personality.flags: ignored: it has no meaning: no flag is defined"},
		{"process.user.username", `"joe"`, "process.user.username: ignored: it is of another platform"},
		{"mounts[1].destination", `"dev/../x"`, `mounts[1].destination: "dev/../x" is not absolute: taken from the root`},
		{"linux.devices", `[{"path":"/dev/sda","type":"b","major":8}]`, "linux.devices[0]: block device 8:0 is the guest's, not the host's"},
		{"future", `{"a":1}`, "future: unknown field: ignored"},
		{"linux.resources.memory.kernel", `1`, "linux.resources.memory.kernel: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.memory.kernelTCP", `1`, "linux.resources.memory.kernelTCP: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.memory.swappiness", `0`, "linux.resources.memory.swappiness: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.memory.disableOOMKiller", `true`, "linux.resources.memory.disableOOMKiller: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.memory.useHierarchy", `true`, "linux.resources.memory.useHierarchy: ignored: it is always so with the guest's cgroup v2"},
		{"linux.resources.cpu.realtimeRuntime", `1`, "linux.resources.cpu.realtimeRuntime: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.cpu.realtimePeriod", `1`, "linux.resources.cpu.realtimePeriod: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.blockIO.leafWeight", `10`, "linux.resources.blockIO.leafWeight: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.blockIO.weightDevice[0]", `{"major":8,"minor":0,"leafWeight":10}`, "linux.resources.blockIO.weightDevice[0].leafWeight: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.network", `{"classID":1}`, "linux.resources.network: ignored: it does not exist in cgroup v2, which the guest has"},
		{"linux.resources.quantum", `1`, "linux.resources.quantum: unknown field: ignored"},
		{"mounts[0].extra", `1`, "mounts[0].extra: unknown field: ignored"},
		{"a\n", `1`, `"a\n": unknown field: ignored`},
	} {
		b, err := bundle.Parse(with(t, r.path, r.value), "/b")
		assert.NilError(t, err, r.path)
		assert.DeepEqual(t, b.Warnings, []string{r.want})
	}
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf(`"x%02d":1`, i))
	}
	b, err := bundle.Parse([]byte(strings.Replace(string(encode(t, bundle.DefaultSpec())), "{", "{"+strings.Join(many, ",")+",", 1)), "/b")
	assert.NilError(t, err)
	assert.Equal(t, len(b.Warnings), 17)
	assert.Equal(t, b.Warnings[16], "84 more unknown fields: ignored")
}

func TestSyntaxErrorsNameTheirPosition(t *testing.T) {
	for data, want := range map[string]string{
		"":                      "config.json: line 1, column 1: unexpected end of JSON input",
		"{\n  \"a\": ,\n}":      "config.json: line 2, column 8: invalid character ','",
		"{\n  \"process\": {\n": "config.json: line 2, column 15: unexpected end",
		"{} {}":                 "config.json: line 1, column 4: invalid character '{' after top-level value",
		"null":                  "config.json: line 1, column 1: must be a JSON object",
		"\n [1]":                "config.json: line 2, column 2: must be a JSON object",
		"\ufeff{}":              "config.json: line 1, column 1: must be a JSON object",
		`{"root":7}`:            "config.json: root: number does not fit (line 1, column 9)",
	} {
		_, err := bundle.Parse([]byte(data), "/b")
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
	}
	_, err := bundle.Parse(make([]byte, bundle.MaxConfig+1), "/b")
	assert.ErrorContains(t, err, "config.json: larger than 67108864 bytes")
	_, err = bundle.Parse([]byte("{}"), "b")
	assert.ErrorContains(t, err, "not an absolute path")

	big := with(t, "annotations", `{"a":"`+strings.Repeat("x", 5<<20)+`"}`)
	_, err = bundle.Parse(big, "/b")
	assert.NilError(t, err, "annotations do not go to the guest")
	arg := `"` + strings.Repeat("y", 100<<10) + `"`
	big = with(t, "process.args", "["+strings.Repeat(arg+",", 500)+arg+"]")
	_, err = bundle.Parse(big, "/b")
	assert.ErrorContains(t, err, "for the guest are more than")
}

// write makes a bundle on disk.
func write(t *testing.T, config []byte) string {
	t.Helper()
	dir := t.TempDir()
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "rootfs"), 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o644))
	return dir
}

func TestLoad(t *testing.T) {
	dir := write(t, with(t, "mounts[7]", `{"destination":"/x","source":"data","options":["bind"]}`))
	_, err := bundle.Load(dir)
	assert.Error(t, err, "config.json: mounts[7].source: "+dir+"/data: no such file or directory")
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "data"), nil, 0o600))
	b, err := bundle.Load(dir)
	assert.NilError(t, err)
	assert.Equal(t, b.Dir, dir)
	assert.Equal(t, b.Rootfs, dir+"/rootfs")

	t.Chdir(dir)
	b, err = bundle.Load(".")
	assert.NilError(t, err)
	assert.Equal(t, b.Rootfs, dir+"/rootfs")

	assert.NilError(t, os.Remove("data"))
	assert.NilError(t, unix.Mkfifo("data", 0o600))
	b, err = bundle.Load(".")
	assert.NilError(t, err)
	assert.Equal(t, len(b.Warnings), 1)
	assert.Assert(t, strings.HasPrefix(b.Warnings[0], "mounts[7].source: "), b.Warnings[0])

	assert.NilError(t, os.Remove("rootfs"))
	_, err = bundle.Load(dir)
	assert.Error(t, err, "config.json: root.path: "+dir+"/rootfs: no such file or directory")
	assert.NilError(t, os.WriteFile("rootfs", nil, 0o600))
	_, err = bundle.Load(dir)
	assert.Error(t, err, "config.json: root.path: "+dir+"/rootfs: not a directory")
	assert.Assert(t, errdefs.IsInvalidArgument(err))

	assert.NilError(t, os.Remove("config.json"))
	_, err = bundle.Load(dir)
	assert.Error(t, err, "open bundle: "+dir+"/config.json: no such file")
	assert.Assert(t, errdefs.IsNotFound(err))
	assert.NilError(t, unix.Mkfifo("config.json", 0o600))
	_, err = bundle.Load(dir)
	assert.ErrorContains(t, err, "not a regular file")
	assert.NilError(t, os.Remove("config.json"))
	assert.NilError(t, os.WriteFile("config.json", make([]byte, bundle.MaxConfig+1), 0o600))
	_, err = bundle.Load(dir)
	assert.ErrorContains(t, err, "larger than")
}

func TestBinds(t *testing.T) {
	data := with(t, "mounts[7]", `{"destination":"/a","type":"none","source":"a/../b","options":["rbind","ro"]}`)
	data = set(t, data, "mounts[8]", `{"destination":"/b","type":"bind","source":"/host//b"}`)
	data = set(t, data, "mounts[9]", `{"destination":"/c","source":"/c","options":["bind","ro","rw"]}`)
	data = set(t, data, "mounts[10]", `{"destination":"/d","source":"/d","options":["rbind","rro"]}`)
	b, err := bundle.Parse(data, "/bundle")
	assert.NilError(t, err)
	assert.DeepEqual(t, b.Binds(), []bundle.Bind{
		{Index: 7, Source: "/bundle/b", Recursive: true, ReadOnly: true},
		{Index: 8, Source: "/host/b"},
		{Index: 9, Source: "/c"},
		{Index: 10, Source: "/d", Recursive: true, ReadOnly: true, ReadOnlyBelow: true},
	})
}

// The hooks of the host stay there.
func TestGuestHooks(t *testing.T) {
	guest := func(data []byte) (s specs.Spec) {
		b, err := bundle.Parse(data, "/b")
		assert.NilError(t, err)
		out, err := b.GuestSpec("/g/rootfs", nil, nil)
		assert.NilError(t, err)
		assert.NilError(t, json.Unmarshal(out, &s))
		return s
	}
	data := set(t, with(t, "annotations", `{"a":"b"}`), "hooks", `{
		"prestart":[{"path":"/1"}], "createRuntime":[{"path":"/2"}], "poststart":[{"path":"/5"}], "poststop":[{"path":"/6"}]}`)
	s := guest(data)
	assert.Assert(t, s.Hooks == nil)
	assert.Equal(t, len(s.Annotations), 0)
	data = set(t, data, "hooks.createContainer", `[{"path":"/3","args":["a"],"env":["A=b"],"timeout":5}]`)
	data = set(t, data, "hooks.startContainer", `[{"path":"/4"}]`)
	s = guest(data)
	assert.DeepEqual(t, s.Hooks, &specs.Hooks{
		CreateContainer: []specs.Hook{{Path: "/3", Args: []string{"a"}, Env: []string{"A=b"}, Timeout: new(5)}},
		StartContainer:  []specs.Hook{{Path: "/4"}},
	})
	assert.DeepEqual(t, s.Annotations, map[string]string{"a": "b"})
}

func TestGuestSpec(t *testing.T) {
	data := with(t, "mounts[7]", `{"destination":"/a","type":"none","source":"a","options":["rbind","ro"]}`)
	data = set(t, data, "mounts[8]", `{"destination":"/b","type":"bind","source":"/host/b"}`)
	data = set(t, data, "annotations", `{"secret":"x"}`)
	data = set(t, data, "linux.cgroupsPath", `"/pod/x"`)
	data = set(t, data, "process.user.username", `"joe"`)
	data = set(t, data, "process.capabilities.bounding", `["CAP_KILL","CAP_FLY"]`)
	b, err := bundle.Parse(data, "/bundle")
	assert.NilError(t, err)

	_, err = b.GuestSpec("/g/rootfs", map[int]string{7: "/g/7"}, nil)
	assert.ErrorContains(t, err, "mounts[8]")
	_, err = b.GuestSpec("/g/rootfs", map[int]string{7: "/g/7", 8: "g"}, nil)
	assert.ErrorContains(t, err, "mounts[8]")
	_, err = b.GuestSpec("rootfs", map[int]string{7: "/g/7", 8: "/g/8"}, nil)
	assert.ErrorContains(t, err, "guest root")

	before := encode(t, b.Spec)
	joins := map[specs.LinuxNamespaceType]string{specs.IPCNamespace: "container:a", specs.UserNamespace: "container:a"}
	out, err := b.GuestSpec("/g/rootfs", map[int]string{7: "/g/7", 8: "/g/8"}, joins)
	assert.NilError(t, err)
	assert.Equal(t, string(encode(t, b.Spec)), string(before), "the bundle itself must not change")

	var got, want specs.Spec
	assert.NilError(t, json.Unmarshal(out, &got))
	assert.NilError(t, json.Unmarshal(before, &want))
	want.Root.Path = "/g/rootfs"
	want.Mounts[7].Type, want.Mounts[7].Source = "bind", "/g/7"
	want.Mounts[8].Source, want.Mounts[8].Options = "/g/8", []string{"bind"}
	want.Annotations, want.Linux.CgroupsPath, want.Process.User.Username = nil, "", ""
	want.Process.Capabilities.Bounding = []string{"CAP_KILL"}
	for i, ns := range want.Linux.Namespaces {
		if ns.Type == specs.IPCNamespace {
			want.Linux.Namespaces[i].Path = "container:a"
		}
	}
	assert.DeepEqual(t, got, want)
}

func TestGuestSpecTellsOfMadeMountPoints(t *testing.T) {
	data := with(t, "mounts", `[{"destination":"/proc","type":"proc"},{"destination":"/new","type":"tmpfs","options":["mode=700"]},
		{"destination":"/new/","type":"tmpfs"},{"destination":"there","type":"tmpfs"},{"destination":"also","type":"tmpfs"}]`)
	b, err := bundle.Parse(data, "/bundle")
	assert.NilError(t, err)
	b.Made = []string{"/proc", "/new", "/also"}
	out, err := b.GuestSpec("/g", nil, nil)
	assert.NilError(t, err)
	var got specs.Spec
	assert.NilError(t, json.Unmarshal(out, &got))
	var options [][]string
	for _, m := range got.Mounts {
		options = append(options, m.Options)
	}
	assert.DeepEqual(t, options, [][]string{nil, {"mode=1777", "mode=700"}, nil, nil, {"mode=1777"}})
}

func TestGuestNamespaces(t *testing.T) {
	data := with(t, "linux.namespaces", `[{"type":"mount"},{"type":"network","path":"/proc/7/ns/net"},{"type":"ipc","path":"/run/ipc"},{"type":"uts"},{"type":"pid"}]`)
	b, err := bundle.Parse(data, "/b")
	assert.NilError(t, err)
	out, err := b.GuestSpec("/g", nil, map[specs.LinuxNamespaceType]string{"network": "container:a", "uts": "container:b"})
	assert.NilError(t, err)
	var got specs.Spec
	assert.NilError(t, json.Unmarshal(out, &got))
	assert.DeepEqual(t, got.Linux.Namespaces, []specs.LinuxNamespace{
		{Type: "mount"}, {Type: "network", Path: "container:a"}, {Type: "ipc"}, {Type: "uts", Path: "container:b"}, {Type: "pid"},
	})
	assert.Equal(t, b.Spec.Linux.Namespaces[1].Path, "/proc/7/ns/net", "the bundle itself must not change")
}

func TestSize(t *testing.T) {
	for resources, want := range map[string]bundle.Size{
		`null`: {},
		`{}`:   {},
		`{"cpu":{"shares":10},"memory":{"limit":-1}}`:         {},
		`{"cpu":{"quota":-1,"period":1000}}`:                  {},
		`{"cpu":{"quota":1000}}`:                              {QuotaCPUs: 1},
		`{"cpu":{"quota":100000}}`:                            {QuotaCPUs: 1},
		`{"cpu":{"quota":100001}}`:                            {QuotaCPUs: 2},
		`{"cpu":{"quota":5000,"period":2000}}`:                {QuotaCPUs: 3},
		`{"cpu":{"quota":9223372036854775807,"period":1000}}`: {QuotaCPUs: 1<<31 - 1},
		`{"cpu":{"cpus":"2-3,0"}}`:                            {SetCPUs: 4},
		`{"cpu":{"cpus":"0","quota":200000}}`:                 {SetCPUs: 1, QuotaCPUs: 2},
		`{"memory":{"limit":67108864}}`:                       {MemoryBytes: 64 << 20},
	} {
		b, err := bundle.Parse(with(t, "linux.resources", resources), "/b")
		assert.NilError(t, err, resources)
		assert.Equal(t, b.Size(), want, resources)
	}
}

func TestMerge(t *testing.T) {
	parse := func(data string) *specs.LinuxResources {
		r, _, err := bundle.ParseResources([]byte(data))
		assert.NilError(t, err)
		return r
	}
	merged := bundle.Merge(nil, nil)
	for _, step := range []struct{ update, want string }{
		{
			`{"memory":{"limit":100,"swap":200},"cpu":{"quota":5000,"cpus":"0-1"},"blockIO":{"weight":10}}`,
			`{"memory":{"limit":100,"swap":200},"cpu":{"quota":5000,"cpus":"0-1"}}`,
		},
		{
			`{"memory":{"limit":0,"reservation":7},"cpu":{"period":1000,"shares":2},"pids":{"limit":5}}`,
			`{"memory":{"limit":100,"reservation":7,"swap":200},"cpu":{"shares":2,"quota":5000,"period":1000,"cpus":"0-1"},"pids":{"limit":5}}`,
		},
		{
			`{"memory":{"limit":-1},"cpu":{"quota":-1},"pids":{"limit":0}}`,
			`{"memory":{"limit":-1,"reservation":7,"swap":-1},"cpu":{"shares":2,"quota":-1,"period":1000,"cpus":"0-1"},"pids":{"limit":5}}`,
		},
	} {
		before, was := merged, string(encode(t, merged))
		merged = bundle.Merge(before, parse(step.update))
		assert.Equal(t, string(encode(t, merged)), step.want)
		assert.Equal(t, string(encode(t, before)), was)
	}
}

func TestParseResources(t *testing.T) {
	r, warnings, err := bundle.ParseResources([]byte(`{"memory":{"limit":1,"kernel":5},"devices":[{"allow":true,"access":"rwm"}],"blockIO":{"weight":20},"x":1}`))
	assert.NilError(t, err)
	assert.Equal(t, *r.Memory.Limit, int64(1))
	assert.Equal(t, *r.BlockIO.Weight, uint16(20))
	assert.DeepEqual(t, warnings, []string{
		"x: unknown field: ignored",
		"memory.kernel: ignored: it does not exist in cgroup v2, which the guest has",
		"devices: ignored: an update does not change them",
	})
	// What an update leaves out may have been given before.
	_, _, err = bundle.ParseResources([]byte(`{"memory":{"swap":1}}`))
	assert.NilError(t, err)
	for data, want := range map[string]string{
		`[]`:                             "resources: line 1, column 1: must be a JSON object",
		`{"memory":{"limit":"1"}}`:       "resources: memory.limit: string does not fit",
		`{"cpu":{"cpus":"x"}}`:           `resources: cpu.cpus: "x": is not a list`,
		`{"unified":{"cgroup.kill":""}}`: `resources: unified["cgroup.kill"]: is not supported`,
	} {
		_, _, err := bundle.ParseResources([]byte(data))
		assert.ErrorContains(t, err, want)
	}
}

func TestParseProcess(t *testing.T) {
	p, err := bundle.ParseProcess([]byte(`{"args":["true"],"cwd":"/","user":{"uid":5,"gid":6},"terminal":true}`))
	assert.NilError(t, err)
	assert.DeepEqual(t, p, &specs.Process{Args: []string{"true"}, Cwd: "/", Terminal: true, User: specs.User{UID: 5, GID: 6}})
	out, err := bundle.GuestProcess(p)
	assert.NilError(t, err)
	assert.Equal(t, string(out), `{"terminal":true,"user":{"uid":5,"gid":6},"args":["true"],"cwd":"/"}`)

	for data, want := range map[string]string{
		`{"cwd":"/"}`:    "process: args: must not be empty",
		`{"args":["x"]}`: "process: cwd: must not be empty",
		`{"args":["x"],"cwd":"/","apparmorProfile":"x"}`:    "process: apparmorProfile: is not supported: there is no AppArmor",
		`{"args":["x"],"cwd":"/","rlimits":[{"type":"x"}]}`: `process: rlimits[0].type: "x" is not known`,
		`{"args":["x"],"cwd":"/"`:                           "process: line 1, column 23: unexpected end",
	} {
		_, err := bundle.ParseProcess([]byte(data))
		assert.ErrorContains(t, err, want)
	}
	warnings, err := bundle.CheckProcess(&specs.Process{
		Args: []string{"x"}, Cwd: "/", Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_FLY"}},
	})
	assert.NilError(t, err)
	assert.Equal(t, len(warnings), 1)
}

func TestValidateID(t *testing.T) {
	for _, id := range []string{"a", "a.b", "..a", "A-b_c+1.2", "-", strings.Repeat("x", 255)} {
		assert.NilError(t, bundle.ValidateID(id))
	}
	for _, id := range []string{"", ".", "..", "a/b", "/", "a b", "a\n", "ä", "a\x00", "a,b", strings.Repeat("x", 256)} {
		err := bundle.ValidateID(id)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q", id)
		assert.ErrorContains(t, err, "container id ")
		assert.Assert(t, !strings.Contains(err.Error(), "\n"))
	}
}

func TestAffinityCPUs(t *testing.T) {
	for _, c := range []struct {
		affinity *specs.CPUAffinity
		want     int
	}{{nil, 0}, {&specs.CPUAffinity{}, 0}, {&specs.CPUAffinity{Initial: "0", Final: "1,3"}, 4}, {&specs.CPUAffinity{Initial: "0-7"}, 8}} {
		b := &bundle.Bundle{Spec: &specs.Spec{Process: &specs.Process{ExecCPUAffinity: c.affinity}}}
		assert.Equal(t, b.AffinityCPUs(), c.want)
	}
}
