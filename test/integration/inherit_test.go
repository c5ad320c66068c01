package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// inheritance says what each of runv's processes, and the container's, has of harness.OddCaller. In a cell "=" is the caller's
// value, "" what is not looked at, since the program sets it for itself; runc is how the oracles' container differs from ours.
var inheritance = []struct {
	what, caller, container, supervisor, standIn, vmm, share, runc string
}{
	{"policy", "3", "=", "0", "0", "0", "0", ""},
	{"nice", "7", "=", "0", "0", "0", "0", ""},
	{"io priority", "best-effort: prio 7", "=", "none: prio 0", "none: prio 0", "none: prio 0", "none: prio 0", ""},
	{"CPUs", "0", "the VM's", "all", "all", "all", "all", "1.1 has the caller's, 1.5 all of the host"},
	{"memory policy", "bind:0", "default", "default", "default", "default", "default", "the caller's: the host's nodes are not the VM's"},
	{"timerslack_ns", "777777", "=", "50000", "50000", "", "50000", ""},
	{"personality", "00040000", "=", "00000000", "00000000", "00000000", "00000000", ""},
	{"Umask", "0077", "0022", "0022", "0022", "", "", ""},
	{"oom_score_adj", "321", "444", "=", "444", "444", "444", ""}, // 444 is process.oomScoreAdj
	{"coredump_filter", "00000001", "=", "", "", "", "", ""},
	{"Max open files", "200", "=", "hard", "hard", "hard", "", "1.1 has the hard limit for the soft one"},
	{"Max core file size", "1048576", "=", "0", "0", "0", "0", ""},
	{"Max stack size", "4194304", "=", "8388608", "8388608", "8388608", "8388608", ""},
	{"Max locked memory", "65536", "=", "hard", "hard", "hard", "hard", ""},
	{"blocked PWR", "", "", "no", "", "no", "no", "yes: a mask is between a caller and its own children"},
	{"ignored HUP", "yes", "no", "no", "no", "no", "no", "1.5: yes, as above"},
	{"NoNewPrivs", "0", "=", "0", "0", "1", "", ""},
	{"terminal", "0", "", "0", "0", "0", "0", ""},
	{"session", "the caller's", "", "own", "own", "own", "", ""},
	{"cwd", "the caller's", "", "/", "/", "/", "/", ""},
	{"variable", "yes", "no", "no", "no", "no", "no", ""},
	{"open file", "yes", "no", "no", "no", "no", "no", ""},
}

// showAttributes prints of a process in a container what attributesOf looks at.
const showAttributes = `p=/proc/PID
echo "timerslack_ns: $(cat SLACK)"
for f in personality oom_score_adj coredump_filter; do echo "$f: $(cat $p/$f)"; done
cat $p/status $p/limits
echo "stat: $(cat $p/stat)"
echo "io priority: $(ionice -p PID)"
echo "memory: $(head -n 1 $p/numa_maps)"
echo "cwd: $(readlink $p/cwd)"
echo "environ: $(tr '\0' ' ' <$p/environ)"
echo "files: $(ls -l $p/fd | tr '\n' ' ')"`

// showFor is showAttributes for a process; slack is a file that tells its timer slack, or that of a child, to who may not ask
// for others'.
func showFor(pid, slack string) string {
	return strings.NewReplacer("PID", pid, "SLACK", slack).Replace(showAttributes)
}

// attributesOf reads what showAttributes prints.
func attributesOf(t *testing.T, text string) map[string]string {
	t.Helper()
	all := map[string]string{"variable": "no", "open file": "no"}
	bit := func(name, signals string, number int) {
		n, err := strconv.ParseUint(signals, 16, 64)
		assert.NilError(t, err, "%s", signals)
		all[name] = "no"
		if n&(1<<(number-1)) != 0 {
			all[name] = "yes"
		}
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "Max ") {
			name, values := strings.TrimSpace(line[:26]), strings.Fields(line[26:])
			all[name] = values[0]
			all[name+" hard"] = values[1]
			continue
		}
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch name {
		case "Umask", "NoNewPrivs", "timerslack_ns", "personality", "oom_score_adj", "coredump_filter", "io priority", "cwd":
			all[name] = value
		case "Cpus_allowed_list":
			all["CPUs"] = value
		case "SigBlk":
			bit("blocked PWR", value, int(unix.SIGPWR))
		case "SigIgn":
			bit("ignored HUP", value, int(unix.SIGHUP))
		case "memory":
			all["memory policy"] = strings.Fields(value)[1]
		case "environ":
			if strings.Contains(" "+value, " "+harness.OddVariable+"=") {
				all["variable"] = "yes"
			}
		case "files":
			if strings.Contains(value, " "+harness.OddFile+" ") {
				all["open file"] = "yes"
			}
		case "stat":
			fields := strings.Fields(value[strings.LastIndex(value, ")")+2:]) // the first is the third of proc(5)
			all["session"], all["terminal"], all["nice"], all["policy"] = fields[3], fields[4], fields[16], fields[38]
		}
	}
	return all
}

// hostAttributes is what showAttributes would print of a process of the host.
func hostAttributes(t *testing.T, pid int) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", showFor(strconv.Itoa(pid), fmt.Sprintf("/proc/%d/timerslack_ns", pid))).Output()
	assert.NilError(t, err)
	return string(out)
}

// allCPUs is what a process has that nobody has limited, as far as the tests' cgroup lets it.
func allCPUs(t *testing.T) string {
	t.Helper()
	list := make(chan string)
	go func() {
		runtime.LockOSThread() // never unlocked
		all := unix.NewCPUSet(8192)
		all.Fill()
		if err := unix.SchedSetaffinityDynamic(0, all); err != nil {
			t.Error(err)
		}
		data, _ := os.ReadFile("/proc/thread-self/status")
		_, rest, _ := strings.Cut(string(data), "Cpus_allowed_list:")
		list <- strings.Fields(rest)[0]
	}()
	return <-list
}

// TestInherited runs containers for a caller with odd attributes. What a container's process has of them is what it has under
// runc; runv's own processes have none, since they live on for others.
func TestInherited(t *testing.T) {
	e := harness.New(t)
	own, err := os.Readlink("/proc/self/cwd")
	assert.NilError(t, err)
	bundle := e.Bundle([]string{"sh", "-c", showFor("$$", "/proc/self/timerslack_ns") + "; exec sleep 1000"}, func(s *specs.Spec) {
		s.Process.OOMScoreAdj = new(444)
		s.Process.Rlimits = nil
		s.Process.NoNewPrivileges = false
		// More CPUs than the caller has. What a cgroup of the tests' lets them have is of no matter.
		if runtime.NumCPU() > 1 {
			s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "0-1"}
		}
	})
	out := filepath.Join(e.Dir, "out")
	start := func(cmd *exec.Cmd) map[string]string {
		f, err := os.Create(out)
		assert.NilError(t, err)
		defer f.Close()
		cmd.Stdout, cmd.Stderr = f, f
		r := harness.OddCaller(cmd)
		data, readErr := os.ReadFile(out)
		assert.NilError(t, readErr)
		assert.Equal(t, r.Code, 0, "%s%s", r.Stderr, data)
		harness.Eventually(t, "the process has told of itself", func() bool {
			data, err = os.ReadFile(out)
			return err == nil && strings.Contains(string(data), "files:")
		})
		return attributesOf(t, string(data))
	}
	caller := start(exec.Command("sh", "-c", showFor("$$", "/proc/self/timerslack_ns")))
	container := start(e.Command("run", "--detach", "--bundle", bundle, "box"))
	pod := e.Pod("box")
	of := func(pid int) map[string]string { return attributesOf(t, hostAttributes(t, pid)) }
	columns := []struct {
		name string
		has  map[string]string
		pid  int
	}{
		{"caller", caller, 0},
		{"container", container, 0},
		{"supervisor", of(pod.Supervisor.PID), pod.Supervisor.PID},
		{"stand-in", of(e.State("box").Pid), e.State("box").Pid},
		{"VMM", of(pod.VM[0].PID), pod.VM[0].PID},
	}
	for _, share := range pod.VM[1:] {
		columns = append(columns, struct {
			name string
			has  map[string]string
			pid  int
		}{"share's server", of(share.PID), share.PID})
	}
	all := allCPUs(t)
	for _, row := range inheritance {
		for i, column := range columns {
			want := []string{row.caller, row.container, row.supervisor, row.standIn, row.vmm, row.share}[min(i, 5)]
			has := column.has[row.what]
			switch want {
			case "":
				continue
			case "=":
				want = row.caller
			case "all":
				want = all
			case "the VM's":
				want = "0"
				if runtime.NumCPU() > 1 {
					want = "0-1"
				}
			case "hard":
				want = column.has[row.what+" hard"]
			case "own":
				want = strconv.Itoa(column.pid)
			case "the caller's":
				want = map[string]string{"cwd": own, "session": caller["session"]}[row.what]
			}
			assert.Check(t, has == want, "%s of the %s: %q, not %q", row.what, column.name, has, want)
		}
	}

	// exec: as much of its own caller, and the umask, too.
	executed := start(e.Command("exec", "box", "sh", "-c", showFor("$$", "/proc/self/timerslack_ns")))
	plain := attributesOf(t, e.OK("exec", "box", "sh", "-c", showFor("$$", "/proc/self/timerslack_ns")))
	for what, want := range map[string]string{"nice": "7", "Umask": "0077", "Max open files": "200", "timerslack_ns": "777777", "oom_score_adj": "444"} {
		assert.Check(t, executed[what] == want, "%s of the exec: %q, not %q", what, executed[what], want)
	}
	tests := attributesOf(t, hostAttributes(t, os.Getpid()))
	assert.Equal(t, plain["nice"], tests["nice"])
	assert.Equal(t, plain["timerslack_ns"], "50000")
	// Shells begin with no signal blocked, other programs with what they are given.
	blocked := func(cmd *exec.Cmd) string {
		r := harness.OddCaller(cmd)
		assert.Equal(t, r.Code, 0, r.Stderr)
		return attributesOf(t, r.Stdout)["blocked PWR"]
	}
	assert.Equal(t, blocked(exec.Command("cat", "/proc/self/status")), "yes")
	assert.Equal(t, blocked(e.Command("exec", "box", "cat", "/proc/self/status")), "no")
	e.OK("delete", "--force", "box")

	e.EditSpec(bundle, func(s *specs.Spec) { s.Linux.Resources = nil })
	sides := runtimes(e)
	for _, theirs := range sides[:len(sides)-1] {
		oracle := start(theirs.command("run", "--detach", "--bundle", bundle, "box"))
		for _, row := range inheritance {
			if row.container == "" || row.runc != "" {
				continue
			}
			assert.Check(t, oracle[row.what] == container[row.what], "%s: %q under %s, %q here", row.what, oracle[row.what], theirs.name, container[row.what])
		}
		assert.Check(t, oracle["Max open files hard"] == container["Max open files hard"])
	}
}
