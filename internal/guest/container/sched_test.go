package container_test

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// TestScheduling sets all that needs no privilege that the machine of the tests may lack.
func TestScheduling(t *testing.T) {
	w := newWorld(t)
	all := w.output("all", w.spec("sh", "-c", `set -- $(grep Cpus_allowed_list /proc/self/status); echo -n $2`))
	const show = `
read stat < /proc/self/stat; set -- ${stat##*) }; echo nice ${17} priority ${38} policy ${39}
busybox ionice -p $$ | busybox sed "s,none.*,none,"
busybox uname -m
grep Cpus_allowed_list /proc/self/status
cat`
	spec := w.spec("sh", "-c", show)
	spec.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 7, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}
	spec.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
	spec.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0-1023", Final: "0"}
	spec.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
	r, err := w.create("box", spec)
	assert.NilError(t, err)
	assert.NilError(t, w.start("box"))
	bare := *spec.Process
	bare.Scheduler, bare.IOPriority, bare.ExecCPUAffinity = nil, nil, nil
	plain, err := w.exec("box", "plain", &bare)
	assert.NilError(t, err)
	bound, err := w.exec("box", "bound", spec.Process)
	assert.NilError(t, err)

	for _, tc := range []struct {
		run                       *run
		exec, sched, io, affinity string
	}{
		{plain, "plain", fmt.Sprintf("nice %d priority 0 policy 0\n", niceness(t)), "none\n", all},
		{bound, "bound", "nice 7 priority 0 policy 3\n", "best-effort: prio 6\n", "0"},
		{r, "", "nice 7 priority 0 policy 3\n", "best-effort: prio 6\n", all},
	} {
		assert.NilError(t, tc.run.stdin.Close())
		status, _ := w.end("box", tc.exec)
		tc.run.copying.Wait()
		assert.Equal(t, status, uint32(0), "%s", tc.run.out[2])
		assert.Equal(t, tc.run.out[1].String(), tc.sched+tc.io+"i686\nCpus_allowed_list:\t"+tc.affinity+"\n")
	}
}

// niceness is this process's, which what has no scheduler of its own inherits.
func niceness(t *testing.T) int {
	t.Helper()
	prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	assert.NilError(t, err)
	return 20 - prio
}

func TestBadScheduling(t *testing.T) {
	w := newWorld(t)
	for _, tc := range []struct {
		edit func(*specs.Spec)
		want string
		kind error
	}{
		{func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_ODD"} }, "process.scheduler.policy", errdefs.ErrInvalidArgument},
		{func(s *specs.Spec) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{"x"}}
		}, "process.scheduler.flags", errdefs.ErrInvalidArgument},
		{func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedISO} }, "set process.scheduler: invalid argument", errdefs.ErrInternal},
		{func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "x"} }, "process.ioPriority", errdefs.ErrInvalidArgument},
		{func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 8}
		}, "process.ioPriority", errdefs.ErrInvalidArgument},
		{func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "x"} }, "linux.personality.domain", errdefs.ErrInvalidArgument},
		{func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "x"} }, "linux.memoryPolicy.mode", errdefs.ErrInvalidArgument},
	} {
		spec := w.spec("true")
		tc.edit(spec)
		_, err := w.create("bad", spec)
		assert.ErrorContains(t, err, tc.want, "%+v", spec.Process)
		assert.ErrorIs(t, err, tc.kind)
	}
	_, err := w.create("box", w.spec("sleep", "1000"))
	assert.NilError(t, err)
	for affinity, want := range map[specs.CPUAffinity]string{
		{Initial: "x"}:  "process.execCPUAffinity.initial",
		{Final: "1023"}: "set process.execCPUAffinity.final: invalid argument",
	} {
		p := w.spec("true").Process
		p.ExecCPUAffinity = &affinity
		_, err := w.exec("box", "bad", p)
		assert.ErrorContains(t, err, want)
	}
}
