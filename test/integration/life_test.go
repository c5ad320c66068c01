package integration

import (
	"bufio"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

func TestRunDeliversOutputAndStatus(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", "echo out; echo err >&2; cat; exit 7"})
	r := e.RunInput(strings.NewReader("typed\n"), "run", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 7)
	assert.Equal(t, r.Stdout, "out\ntyped\n")
	assert.Equal(t, r.Stderr, "err\n")
	e.CheckNothingLeft()
}

func TestLifeOfAContainer(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", "cat /proc/sys/kernel/random/boot_id; sleep 1000"}, func(s *specs.Spec) {
		s.Annotations = map[string]string{"org.example.color": "blue"}
	})
	out, err := os.Create(filepath.Join(e.Dir, "out"))
	assert.NilError(t, err)
	defer out.Close()
	pidFile := filepath.Join(e.Dir, "pid")
	create := e.Command("create", "--bundle", bundle, "--pid-file", pidFile, "web")
	create.Stdout = out
	r := harness.Finish(create)
	assert.Equal(t, r.Code, 0, r.Stderr)

	s := e.State("web")
	assert.Equal(t, s.Status, specs.StateCreated)
	assert.Equal(t, s.ID, "web")
	assert.Equal(t, s.Bundle, bundle)
	assert.Equal(t, s.Rootfs, filepath.Join(bundle, "rootfs"))
	assert.Equal(t, s.Annotations["org.example.color"], "blue")
	assert.Equal(t, s.Annotations["dev.runv.accel"], "tcg", "no KVM that is real where the tests run")
	pid, err := os.ReadFile(pidFile)
	assert.NilError(t, err)
	assert.Equal(t, string(pid), strconv.Itoa(s.Pid))
	assert.NilError(t, syscall.Kill(s.Pid, 0), "the stand-in lives")

	r = e.Run("create", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "web"))
	r = e.Run("delete", "missing")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "does not exist"))

	e.OK("start", "web")
	assert.Equal(t, e.State("web").Status, specs.StateRunning)
	r = e.Run("start", "web")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "cannot start an already running container"))
	r = e.Run("delete", "web")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "is not stopped: running"))

	harness.Eventually(t, "the program has written", func() bool {
		fi, err := out.Stat()
		return err == nil && fi.Size() > 0
	})
	e.OK("kill", "web", "KILL")
	e.AwaitStatus("web", specs.StateStopped)
	r = e.Run("kill", "web", "KILL")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "container not running"))
	data, err := os.ReadFile(out.Name())
	assert.NilError(t, err)
	host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	assert.NilError(t, err)
	assert.Assert(t, cmp.Regexp(`^[0-9a-f-]{36}\n$`, string(data)))
	assert.Assert(t, string(data) != string(host), "the container has a kernel of its own")
	e.OK("delete", "web")
	r = e.Run("state", "web")
	assert.Equal(t, r.Code, 1)
	e.CheckNothingLeft()
	e.OK("delete", "--force", "web")
}

func TestTwoContainersHaveTwoKernels(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "1000"})
	for _, id := range []string{"a", "b"} {
		e.OK("run", "--detach", "--bundle", bundle, id)
	}
	first := e.OK("exec", "a", "cat", "/proc/sys/kernel/random/boot_id")
	second := e.OK("exec", "b", "cat", "/proc/sys/kernel/random/boot_id")
	assert.Assert(t, first != second)
	assert.Equal(t, e.OK("list", "-q"), "a\nb\n")
	var list []struct {
		ID     string `json:"id"`
		Status string `json:"status"`
		PID    int    `json:"pid"`
	}
	assert.NilError(t, json.Unmarshal([]byte(e.OK("list", "-f", "json")), &list))
	assert.Equal(t, len(list), 2)
	assert.Equal(t, list[0].Status, "running")
	table := e.OK("list")
	assert.Assert(t, cmp.Regexp(`(?m)^ID +PID +STATUS +BUNDLE +CREATED +OWNER *$`, table))
	assert.Assert(t, cmp.Regexp(`(?m)^b +`+strconv.Itoa(list[1].PID)+` +running +`+regexp.QuoteMeta(bundle), table))
	e.OK("delete", "--force", "a")
	assert.Equal(t, e.OK("exec", "b", "echo", "still here"), "still here\n")
}

// Signals have the effect and the exit status that they have under runc.
func TestSignals(t *testing.T) {
	e := harness.New(t)
	trap := e.Bundle([]string{"sh", "-c", `trap "echo term; exit 143" TERM; echo ready; while :; do sleep 1; done`})
	for _, tc := range []struct {
		name   string
		send   func(t *testing.T)
		status int
		output string
	}{
		{"SIGTERM by name", func(t *testing.T) { e.OK("kill", "web", "TERM") }, 143, "ready\nterm\n"},
		{"SIGKILL by number", func(t *testing.T) { e.OK("kill", "web", "9") }, 137, "ready\n"},
		{"SIGKILL to all", func(t *testing.T) { e.OK("kill", "--all", "web", "SIGKILL") }, 137, "ready\n"},
		{"SIGTERM to the stand-in", func(t *testing.T) {
			assert.NilError(t, syscall.Kill(e.State("web").Pid, syscall.SIGTERM))
		}, 143, "ready\nterm\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := e.Command("run", "--bundle", trap, "web")
			stdout, err := cmd.StdoutPipe()
			assert.NilError(t, err)
			assert.NilError(t, cmd.Start())
			reader := bufio.NewReader(stdout)
			line, err := reader.ReadString('\n')
			assert.NilError(t, err)
			tc.send(t)
			rest, err := readAll(reader)
			assert.NilError(t, err)
			assert.Equal(t, harness.ExitCode(cmd.Wait()), tc.status)
			assert.Equal(t, line+rest, tc.output)
		})
	}
	t.Run("SIGTERM to runv run", func(t *testing.T) {
		cmd := e.Command("run", "--bundle", trap, "web")
		stdout, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		reader := bufio.NewReader(stdout)
		_, err = reader.ReadString('\n')
		assert.NilError(t, err)
		assert.NilError(t, cmd.Process.Signal(syscall.SIGTERM))
		_, err = readAll(reader)
		assert.NilError(t, err)
		assert.Equal(t, harness.ExitCode(cmd.Wait()), 143)
	})
}

func readAll(r *bufio.Reader) (string, error) {
	var b strings.Builder
	_, err := r.WriteTo(&b)
	return b.String(), err
}

func TestEventsTellTheLife(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "1000"})
	e.OK("run", "--detach", "--bundle", bundle, "web")
	var stats struct {
		Type string `json:"type"`
		ID   string `json:"id"`
		Data struct {
			Pids struct {
				Current uint64 `json:"current"`
			} `json:"pids"`
			Memory struct {
				Usage struct {
					Usage uint64 `json:"usage"`
				} `json:"usage"`
			} `json:"memory"`
		} `json:"data"`
	}
	out := e.OK("events", "--stats", "web")
	assert.NilError(t, json.Unmarshal([]byte(out), &stats), out)
	assert.Equal(t, stats.Type, "stats")
	assert.Equal(t, stats.ID, "web")
	assert.Equal(t, stats.Data.Pids.Current, uint64(1))
	assert.Assert(t, stats.Data.Memory.Usage.Usage > 0)

	ps := e.OK("ps", "web")
	assert.Assert(t, cmp.Regexp(`(?m)^UID +PID +PPID`, ps))
	assert.Assert(t, cmp.Contains(ps, "sleep 1000"))
	var pids []int
	assert.NilError(t, json.Unmarshal([]byte(e.OK("ps", "--format", "json", "web")), &pids))
	assert.DeepEqual(t, pids, []int{e.State("web").Pid})

	e.OK("pause", "web")
	assert.Equal(t, string(e.State("web").Status), "paused")
	r := e.Run("exec", "web", "true")
	assert.Equal(t, r.Code, 255)
	assert.Assert(t, cmp.Contains(r.Stderr, "cannot exec in a paused container"))
	e.OK("resume", "web")
	e.OK("exec", "web", "true")
	assert.Equal(t, string(e.State("web").Status), "running")
}

// TestEventsAreRuncs follows a container's events as readers of runc's do: stats, and one line when memory runs out.
func TestEventsAreRuncs(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
		limit := int64(32 << 20)
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	})
	e.OK("run", "--detach", "--bundle", bundle, "box")
	cmd := e.Command("events", "--interval", "100ms", "box")
	stdout, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	lines := bufio.NewScanner(stdout)
	lines.Buffer(nil, 1<<20)
	assert.Assert(t, lines.Scan(), "%v", lines.Err())
	assert.Assert(t, cmp.Regexp(`^{"type":"stats","id":"box","data":{`, lines.Text()))
	assert.Equal(t, e.Run("exec", "box", "dd", "if=/dev/zero", "of=/dev/shm/big", "bs=1M", "count=60").Code, 137)
	other := map[string]bool{}
	for lines.Scan() {
		if !strings.HasPrefix(lines.Text(), `{"type":"stats",`) {
			other[lines.Text()] = true
			e.Run("kill", "box", "KILL") // it may have ended
		}
	}
	assert.NilError(t, lines.Err())
	assert.NilError(t, cmd.Wait())
	assert.DeepEqual(t, other, map[string]bool{`{"type":"oom","id":"box"}`: true})
}

func TestConsoleShowsTheGuest(t *testing.T) {
	e := harness.New(t)
	plain := e.Bundle([]string{"sleep", "1000"})
	e.OK("--debug", "run", "--detach", "--bundle", plain, "web")
	follow := e.Command("console", "-f", "web")
	assert.NilError(t, follow.Start())
	harness.Eventually(t, "the console has text", func() bool { return strings.TrimSpace(e.OK("console", "web")) != "" })
	e.OK("delete", "--force", "web")
	assert.Equal(t, harness.ExitCode(follow.Wait()), 0, "-f ends with the VM")
}

func TestListAndStateOnAFreshMachine(t *testing.T) {
	e := harness.New(t)
	assert.Assert(t, cmp.Regexp(`^ID +PID +STATUS`, e.OK("list")))
	assert.Equal(t, e.OK("list", "-q"), "")
	_, err := os.Stat(e.Root)
	assert.Assert(t, os.IsNotExist(err), "looking creates nothing")
	r := e.Run("state", "web")
	assert.Equal(t, r.Code, 1)
	assert.Assert(t, cmp.Contains(r.Stderr, "container does not exist"))
}

// What `runc spec` gives behaves in the guest as under runc.
func TestDefaultSpecBehavesAsUnderRunc(t *testing.T) {
	e := harness.New(t)
	script := `
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Umask)' /proc/self/status
ulimit -a
cat /proc/self/oom_score_adj
env | sort
pwd
hostname
ls -l /dev | awk '{print $1,$3,$4,$5,$6,$NF}' | grep -v '^total' | sort
ls -ld /dev /proc /sys | awk '{print $1,$3,$4,$NF}'
cut -d' ' -f5- /proc/self/mountinfo | sed 's/ - / /' | awk '{print $1,$2,$(NF-2)}' | grep -v '^/ '
for f in /proc/kcore /proc/keys /proc/timer_list /sys/firmware /proc/scsi; do
	test -e $f && { ls $f | head -1; cat $f 2>/dev/null | head -c 10; echo "masked $f"; }
done
echo x > /proc/sys/kernel/hostname; echo "hostname write: $?"
touch /x; echo "root write: $?"
mknod /tmp/null c 1 3; echo "mknod: $?"
echo $$ 
`
	bundle := e.Bundle([]string{"sh", "-c", script}, func(s *specs.Spec) { s.Root.Readonly = true })
	ours := e.Run("run", "--bundle", bundle, "web")
	assert.Equal(t, ours.Code, 0, ours.Stderr)
	for _, runc := range e.Runcs() {
		theirs := runc.Run("run", "--bundle", bundle, "box"+ownSuffix(runc.Name))
		assert.Equal(t, theirs.Code, 0, "%s: %s", runc.Name, theirs.Stderr)
		assert.DeepEqual(t, normal(ours.Stdout), normal(theirs.Stdout))
	}
}

// normal drops what must differ: the host of the tests has cgroup v1, and the kernels
// have different limits of their own.
func normal(out string) []string {
	var lines []string
	for line := range strings.SplitSeq(out, "\n") {
		switch {
		case strings.HasPrefix(line, "/sys/fs/cgroup"):
		case strings.Contains(line, "/proc/kcore"), strings.Contains(line, "/proc/sysrq-trigger"): // if the kernel has them
		case strings.Contains(line, "(-i)"), strings.Contains(line, "(-u)"): // pending signals, processes: by memory
		default:
			lines = append(lines, line)
		}
	}
	return lines
}
