package caller_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/caller"
)

// asChild makes the test program print what it has of its caller instead of running tests.
const asChild = "RUNV_TEST_READ"

func TestMain(m *testing.M) {
	switch os.Getenv(asChild) {
	case "":
		os.Exit(m.Run())
	case "leave":
		cmd := exec.Command(os.Args[0])
		cmd.Env, cmd.Stdout = append(os.Environ(), asChild+"=forget"), os.Stdout
		if err := caller.Leave(cmd.Run); err != nil {
			panic(err)
		}
		os.Exit(0)
	case "forget":
		caller.Forget()
	}
	in, err := caller.Read()
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(in)
	}
	if err != nil {
		panic(err)
	}
}

// child runs the test program below a shell script, and returns what it has read.
func child(t *testing.T, how, script string) (in caller.Inherited) {
	t.Helper()
	cmd := exec.Command("sh", "-c", script+`; exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), asChild+"="+how)
	out, err := cmd.Output()
	assert.NilError(t, err)
	assert.NilError(t, json.Unmarshal(out, &in))
	return in
}

func TestRead(t *testing.T) {
	in := child(t, "read", "ulimit -S -n 123; ulimit -c 7; umask 0071; echo 77 >/proc/self/oom_score_adj; echo 3 >/proc/self/coredump_filter")
	assert.Equal(t, len(in.Rlimits), 16)
	assert.Equal(t, in.Rlimits[unix.RLIMIT_NOFILE].Soft, uint64(123), "which Go's runtime has raised before main")
	assert.Assert(t, in.Rlimits[unix.RLIMIT_NOFILE].Hard > 123)
	assert.DeepEqual(t, in.Rlimits[unix.RLIMIT_CORE], caller.Rlimit{Resource: unix.RLIMIT_CORE, Soft: 7 * 512, Hard: 7 * 512})
	assert.Equal(t, in.Umask, uint32(0o071))
	assert.Equal(t, in.OOMScoreAdj, 77)
	assert.DeepEqual(t, in.CoredumpFilter, new(uint32(3)))
}

func TestLeaveAndForget(t *testing.T) {
	const odd = "ulimit -S -n 123; ulimit -c 7; umask 0071; set -- nice -n 9 taskset -c 0"
	const run = `; exec "$@" "$0"; exit 9`
	in := child(t, "read", odd+run)
	assert.Equal(t, in.Scheduler, caller.Scheduler{Nice: 9 + child(t, "read", ":").Scheduler.Nice})
	in = child(t, "leave", odd+run)
	assert.Equal(t, in.Scheduler, caller.Scheduler{})
	assert.Equal(t, in.TimerSlack, uint64(50_000))
	assert.Equal(t, in.Umask, uint32(0o022))
	files := in.Rlimits[unix.RLIMIT_NOFILE]
	assert.Equal(t, files.Soft, files.Hard)
	assert.Equal(t, in.Rlimits[unix.RLIMIT_CORE].Hard, uint64(0))
}
