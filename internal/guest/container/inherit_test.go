package container_test

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
)

// TestInherited gives processes something of a caller: it counts where the specification says nothing.
func TestInherited(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	const show = `ulimit -n; ulimit -c; cat /proc/self/oom_score_adj /proc/self/coredump_filter /proc/self/timerslack_ns; umask
read stat </proc/$$/stat; set -- ${stat##*) }; echo nice ${17} policy ${39}; grep NoNewPrivs /proc/self/status; uname -m`
	in := &agentv1.Inherited{
		Rlimits: []*agentv1.Rlimit{{Resource: unix.RLIMIT_NOFILE, Soft: 66, Hard: 77}, {Resource: unix.RLIMIT_CORE, Soft: 1024, Hard: 2048}},
		Nice:    6, SchedPolicy: unix.SCHED_BATCH, OomScoreAdj: 222, CoredumpFilter: new(uint32(3)), TimerSlackNs: 1234,
		Personality: 8, NoNewPrivs: true, Umask: new(uint32(0o077)),
	}
	const all = "66\n2\n222\n00000003\n1234\n%s\nnice 6 policy 3\nNoNewPrivs:\t1\ni686\n"
	for name, user := range map[string]bool{"plain": false, "user": true} {
		spec := w.spec("sleep", "1000")
		spec.Process.Rlimits, spec.Process.NoNewPrivileges = nil, false
		if user {
			w.inUserNS(spec)
		}
		w.inherited = in
		_, err := w.create(name, spec)
		assert.NilError(t, err)
		assert.NilError(t, w.start(name))
		p := w.spec("sh", "-c", show).Process
		p.Rlimits, p.NoNewPrivileges = nil, false
		run := func(id string) string {
			t.Helper()
			r, err := w.exec(name, id, p)
			assert.NilError(t, err)
			w.end(name, id)
			r.copying.Wait()
			return r.out[1].String() + r.out[2].String()
		}
		assert.Equal(t, run("a"), strings.ReplaceAll(all, "%s", "0077"), name)
		p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 50, Hard: 50}}
		p.OOMScoreAdj, p.User.Umask = new(300), new(uint32(0o007))
		assert.Equal(t, run("b"), strings.NewReplacer("66\n", "50\n", "222\n", "300\n", "%s", "0007").Replace(all), name)
		w.inherited = nil
		assert.Assert(t, strings.Contains(run("c"), " policy 0\n"))
		w.remove(name)
	}
	w.inherited = &agentv1.Inherited{Rlimits: []*agentv1.Rlimit{{Resource: 16}}}
	_, err := w.create("bad", w.spec("true"))
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}
