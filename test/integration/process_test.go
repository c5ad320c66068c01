package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// TestProcessFields looks at what a process is that sets all that process and linux can say of it,
// most of which the machine of the tests would not let runc set.
func TestProcessFields(t *testing.T) {
	e := harness.New(t)
	const show = `
read stat < /proc/self/stat; set -- ${stat##*) }; echo nice ${17} priority ${38} policy ${39}
ionice -p $$
uname -m
echo cpus $(grep Cpus_allowed_list /proc/self/status | cut -f2)
echo bound $(grep -o -m1 'bind[^ ]*' /proc/self/numa_maps)
echo oom $(cat /proc/self/oom_score_adj)
umask
id -u; id -g; id -G
echo files $(ulimit -n) $(ulimit -Hn)
cat`
	bundle := e.Bundle([]string{"sh", "-c", show}, func(s *specs.Spec) {
		p := s.Process
		p.Scheduler = &specs.Scheduler{Policy: specs.SchedRR, Priority: 42, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}
		p.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_RT, Priority: 3}
		p.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "1"}
		p.OOMScoreAdj = new(-500)
		p.User = specs.User{UID: 1000, GID: 1000, Umask: new(uint32(0o027)), AdditionalGids: []uint32{5, 2000}}
		p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 4096, Hard: 1 << 20}} // more than the agent has
		for i := range 2000 {
			p.Env = append(p.Env, "HUGE"+strings.Repeat("x", i%50)+"="+strings.Repeat("y", 500))
		}
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{
			Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes},
		}
		s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: new(int64(200_000)), Period: new(uint64(100_000))}
	})
	run := e.Command("run", "--bundle", bundle, "box")
	stdin, err := run.StdinPipe()
	assert.NilError(t, err)
	done := make(chan harness.Result, 1)
	go func() { done <- harness.Finish(run) }()
	harness.Eventually(t, "box runs", func() bool { return strings.Contains(e.Run("state", "box").Stdout, `"running"`) })

	const scheduled = "nice 0 priority 42 policy 2\nrealtime: prio 3\n"
	const same = "i686\n%s\nbound bind=static:0\noom -500\n0027\n1000\n1000\n1000 5 2000\nfiles 4096 1048576\n"
	of := func(cpus string) string { return strings.Replace(same, "%s", "cpus "+cpus, 1) }
	r := e.Run("exec", "box", "sh", "-c", show)
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Equal(t, r.Stdout, scheduled+of("1"))

	// What a process of its own does not say it has from the container's, as under runc.
	path := filepath.Join(e.Dir, "process.json")
	process := specs.Process{Args: []string{"sh", "-c", show}, Cwd: "/", Env: []string{"PATH=/bin"}, User: specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{5, 2000}}}
	write := func() {
		data, err := json.Marshal(process)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(path, data, 0o600))
	}
	write()
	r = e.Run("exec", "--process", path, "box")
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Equal(t, r.Stdout, scheduled+of("1"))

	// What the guest's kernel does not do is an error that names the field.
	for want, edit := range map[string]func(){
		"set process.scheduler: invalid argument":             func() { process.Scheduler = &specs.Scheduler{Policy: specs.SchedISO} },
		"set process.execCPUAffinity.final: invalid argument": func() { process.Scheduler, process.ExecCPUAffinity = nil, &specs.CPUAffinity{Final: "64"} },
		"set rlimit": func() {
			process.ExecCPUAffinity = nil
			process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 1 << 62}}
		},
	} {
		process.Scheduler, process.ExecCPUAffinity, process.Rlimits = nil, nil, nil
		edit()
		write()
		r = e.Run("exec", "--process", path, "box")
		assert.Equal(t, r.Code, 255)
		assert.Assert(t, cmp.Contains(r.Stderr, want))
	}
	assert.NilError(t, stdin.Close())
	r = <-done
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Equal(t, r.Stdout, scheduled+of("0-1"))
}
