package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	supervisorv1 "runv/api/supervisor/v1"
	"runv/internal/rpcerror"
	"runv/internal/state"
)

func TestVisible(t *testing.T) {
	for in, want := range map[string]string{
		"plain, äöü":           "plain, äöü",
		"\x1b[31mred\x1b[0m":   "^[[31mred^[[0m",
		"a\x00b\x7f":           "a^@b^?",
		"bad \xff\xc3":         `bad \xff\xc3`,
		"c1 \u009b2J":          `c1 \x9b2J`,
		"tab\tnew line\nend\r": "tab^Inew line^Jend^M",
	} {
		assert.Equal(t, visible(in), want)
	}
}

func TestVisibleWriterTakesAnyChunks(t *testing.T) {
	const in = "line\r\nä\u20ac\ttab \x1b[2J\rover\n\xff\r"
	const want = "line\nä\u20ac\ttab ^[[2J^Mover\n\\xff^M"
	for size := 1; size <= len(in); size++ {
		var out bytes.Buffer
		w := &visibleWriter{w: &out}
		for rest := in; rest != ""; {
			n := min(size, len(rest))
			_, err := w.Write([]byte(rest[:n]))
			assert.NilError(t, err)
			rest = rest[n:]
		}
		assert.NilError(t, w.flush())
		assert.Equal(t, out.String(), want, "chunks of %d", size)
	}
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]unix.Signal{
		"KILL": 9, "SIGKILL": 9, "sigkill": 9, "kill": 9, "9": 9, "0": 0, "TERM": 15, "SIGUSR1": 10, "64": 64, "RTMIN+1": 35,
	} {
		got, err := parseSignal(in)
		assert.NilError(t, err, in)
		assert.Equal(t, got, want, in)
	}
	for _, in := range []string{"XXX", "1a", "-9", "65", "SIG", ""} {
		_, err := parseSignal(in)
		assert.Error(t, err, fmt.Sprintf("unknown signal %q", in))
	}
}

func TestExitStatus(t *testing.T) {
	notFound := rpcerror.New(errdefs.ErrNotFound, `exec: "foo": executable file not found in $PATH`)
	denied := rpcerror.New(errdefs.ErrPermissionDenied, `exec: "/etc": permission denied`)
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{errNotExist, 1},
		{&usageError{"run", "bad"}, 1},
		{fmt.Errorf("create web: %w", notFound), 127},
		{fmt.Errorf("create web: %w", denied), 126},
		{&exitError{status: 255, err: errNotExist}, 255},
		{&exitError{status: 255, err: notFound}, 127},
		{&exitError{status: 255, err: denied}, 126},
		{&exitError{status: 137}, 137},
		{errors.Join(notFound, errors.New("and more")), 127},
		{rpcerror.New(errdefs.ErrPermissionDenied, "open state directory: no"), 1},
	} {
		assert.Equal(t, exitStatus(c.err), c.want, "%v", c.err)
	}
}

func TestOneLine(t *testing.T) {
	assert.Equal(t, oneLine("a: b"), "a: b")
	assert.Equal(t, oneLine("a\nb\r\nc\n"), "a; b; c")
}

func TestNamesContainer(t *testing.T) {
	assert.Assert(t, namesContainer(errors.New("create web: no"), "web"))
	assert.Assert(t, !namesContainer(errors.New("container does not exist"), "web"))
	assert.Assert(t, !namesContainer(errors.New("web"), "web"))
}

func TestProcessTable(t *testing.T) {
	now := time.Date(2026, 11, 23, 18, 30, 0, 0, time.Local)
	processes := []*supervisorv1.Process{
		{Pid: 71, ParentPid: 1, Uid: 0, StartTimeUnixNano: now.Add(-10 * time.Second).UnixNano(), CpuNanos: 5e9, Tty: "?", Command: "sh -c sleep\x1b[2J 30", Init: true},
		{Pid: 123456, ParentPid: 71, Uid: 1000, StartTimeUnixNano: now.Add(-240 * time.Hour).UnixNano(), CpuNanos: 3725e9, Tty: "pts/0", Command: "top"},
		{Pid: 9, ParentPid: 71, Uid: 4294967294, StartTimeUnixNano: now.Add(time.Hour).UnixNano(), CpuNanos: 1, Tty: "?", Command: "[clock]"},
	}
	for _, c := range []struct{ options, want string }{
		{"", `
UID        PID  PPID  C STIME TTY          TIME CMD
root        71     1 50 18:29 ?        00:00:05 sh -c sleep^[[2J 30
1000     123456    71  0 Nov13 pts/0    01:02:05 top
4294967294     9    71  0 19:30 ?        00:00:00 [clock]
`},
		{"-ef -o pid,args", `
  PID CMD
   71 sh -c sleep^[[2J 30
123456 top
    9 [clock]
`},
		{"-opid", "\n  PID\n   71\n123456\n    9\n"},
	} {
		columns, err := psColumns(strings.Fields(c.options))
		assert.NilError(t, err)
		var out bytes.Buffer
		assert.NilError(t, printProcesses(&out, processes, columns, now))
		assert.Equal(t, out.String(), c.want[1:])
	}
	for options, want := range map[string]string{
		"-x":     `ps option "-x" is not supported (-e, -f and -o are)`,
		"aux":    `ps option "aux" is not supported (-e, -f and -o are)`,
		"-o":     `ps option "-o" is not supported (-e, -f and -o are)`,
		"-o rss": `ps column "rss" is not known`,
	} {
		_, err := psColumns(strings.Fields(options))
		assert.Error(t, err, want)
	}
}

func TestStatsHaveRuncsShape(t *testing.T) {
	s := statsOf(&supervisorv1.StatsResponse{
		CpuUsageNanos: 1, CpuUserNanos: 2, CpuSystemNanos: 3, CpuThrottledPeriods: 4, CpuThrottledNanos: 5,
		MemoryUsageBytes: 6, MemoryLimitBytes: 7, MemorySwapUsageBytes: 8, MemoryStat: map[string]uint64{"file": 9},
		PidsCurrent: 10, PidsLimit: 11,
	})
	data, err := json.Marshal(event{Type: "stats", ID: "web", Data: s})
	assert.NilError(t, err)
	assert.Equal(t, string(data), `{"type":"stats","id":"web","data":{`+
		`"cpu":{"usage":{"total":1,"kernel":3,"user":2},"throttling":{"throttledPeriods":4,"throttledTime":5}},`+
		`"memory":{"cache":9,"usage":{"limit":7,"usage":6,"failcnt":0},"swap":{"limit":0,"usage":8,"failcnt":0},"raw":{"file":9}},`+
		`"pids":{"current":10,"limit":11},"blkio":{},"hugetlb":{},"intel_rdt":{}}}`)
}

func TestListTable(t *testing.T) {
	created := time.Date(2026, 11, 23, 17, 44, 51, 33439861, time.UTC)
	states := []containerState{{
		Version: "1.0.2", ID: "x", Pid: 11953, Status: "running", Bundle: "/tmp/b", Rootfs: "/tmp/b/rootfs", Created: created, Owner: "root",
	}}
	var out bytes.Buffer
	assert.NilError(t, printList(&out, states, "table", false))
	assert.NilError(t, printList(&out, states, "json", false))
	assert.NilError(t, printList(&out, states, "table", true))
	assert.Equal(t, out.String(), `ID          PID         STATUS      BUNDLE      CREATED                          OWNER
x           11953       running     /tmp/b      2026-11-23T17:44:51.033439861Z   root
[{"ociVersion":"1.0.2","id":"x","pid":11953,"status":"running","bundle":"/tmp/b","rootfs":"/tmp/b/rootfs","created":"2026-11-23T17:44:51.033439861Z","owner":"root"}]
x
`)
}

func TestPhases(t *testing.T) {
	assert.Equal(t, phases(nil), "")
	assert.Equal(t, phases([]state.Phase{{Name: "boot", Duration: 1234567 * time.Microsecond}, {Name: "x", Duration: 50 * time.Microsecond}}), "boot=1234.6 x=0.1")
}

func TestPidFileAppearsWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "pid")
	assert.NilError(t, os.WriteFile(path, []byte("old and long"), 0o600))
	assert.NilError(t, writePidFile(path, 4711))
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, string(data), "4711")
	assert.ErrorContains(t, writePidFile(filepath.Join(dir, "none", "pid"), 1), "--pid-file: ")
	left, err := os.ReadDir(dir)
	assert.NilError(t, err)
	assert.Equal(t, len(left), 1)
}

func TestProcessEdit(t *testing.T) {
	p := &specs.Process{
		Terminal: true, ConsoleSize: &specs.Box{Height: 1, Width: 1}, Args: []string{"sh"}, Cwd: "/",
		Env: []string{"PATH=/bin", "A=1", "AB=2"}, User: specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}},
		Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Ambient: []string{"CAP_KILL"}},
	}
	edit := processEdit{
		args: []string{"ls", "-l"}, cwd: "/tmp", env: []string{"A=x,y=z", "NEW="}, user: "7", gids: []int64{8},
		caps: []string{"CAP_KILL", "net_admin"}, noNewPrivs: new(true),
	}
	assert.NilError(t, edit.apply(p))
	want := &specs.Process{
		Args: []string{"ls", "-l"}, Cwd: "/tmp", NoNewPrivileges: true,
		Env: []string{"PATH=/bin", "AB=2", "A=x,y=z", "NEW="}, User: specs.User{UID: 7, GID: 2, AdditionalGids: []uint32{3, 8}},
		Capabilities: &specs.LinuxCapabilities{
			Bounding: []string{"CAP_KILL", "CAP_NET_ADMIN"}, Effective: []string{"CAP_KILL", "CAP_NET_ADMIN"},
			Permitted: []string{"CAP_KILL", "CAP_NET_ADMIN"}, Ambient: []string{"CAP_KILL"},
		},
	}
	assert.DeepEqual(t, p, want)

	for _, c := range []struct {
		edit processEdit
		want string
	}{
		{processEdit{}, "no command given"},
		{processEdit{args: []string{"x"}, env: []string{"A"}}, "--env=A: must be NAME=VALUE"},
		{processEdit{args: []string{"x"}, user: "root"}, "--user=root: must be UID or UID:GID, in numbers"},
		{processEdit{args: []string{"x"}, user: "0:"}, "--user=0:: must be UID or UID:GID, in numbers"},
		{processEdit{args: []string{"x"}, user: "4294967295"}, "--user=4294967295: must be UID or UID:GID, in numbers"},
		{processEdit{args: []string{"x"}, gids: []int64{-1}}, "--additional-gids=-1: not a group id"},
	} {
		assert.Error(t, c.edit.apply(&specs.Process{}), c.want)
	}
}

func TestUndoRunsBackwardsOnce(t *testing.T) {
	var u undo
	var order []int
	for i := range 3 {
		u.push(func() error { order = append(order, i); return fmt.Errorf("%d", i) })
	}
	assert.Error(t, u.run(), "2\n1\n0")
	assert.NilError(t, u.run())
	assert.DeepEqual(t, order, []int{2, 1, 0})
	u.push(func() error { t.Error("released"); return nil })
	u.release()
	assert.NilError(t, u.run())
}
