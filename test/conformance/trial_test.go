package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/test/compare"
	"runv/test/harness"
)

// side is a runtime under comparison.
type side struct {
	name string
	argv []string // program and global flags
	root string   // of its state
}

// runvName is the name of the side that is under test.
const runvName = "runv"

// sides are the runcs and, as the last, runv, with state directories of their own below dir.
func sides(t testing.TB, dir string) []*side {
	t.Helper()
	var all []*side
	for _, o := range harness.Oracles(t) {
		root := filepath.Join(dir, o.Name)
		all = append(all, &side{name: o.Name, root: root, argv: []string{o.Path, "--root", root}})
	}
	root := filepath.Join(dir, "root")
	return append(all, &side{name: runvName, root: root, argv: []string{filepath.Join(harness.TreeRoot(), "bin", "runv"), "--root", root}})
}

// trial is one case under one runtime: it does something and records what it sees.
type trial struct {
	testing.TB
	side   *side
	dir    string // scratch of its own
	bundle string
	id     string
	probe  string // path of the probe's binary

	mu   sync.Mutex
	seen compare.Sections
}

var ids = struct {
	sync.Mutex
	n int
}{}

// newTrial makes a bundle with the probe in it, whose program sleeps, and lets edit change it.
func newTrial(t testing.TB, s *side, dir, probe string, edit func(*trial, *specs.Spec)) *trial {
	t.Helper()
	ids.Lock()
	ids.n++
	id := fmt.Sprintf("conformance-%d-%d", os.Getpid(), ids.n)
	ids.Unlock()
	tr := &trial{TB: t, side: s, dir: dir, id: id, probe: probe}
	assert.NilError(t, os.MkdirAll(dir, 0o755))
	tr.bundle = tr.newBundle("bundle", edit)
	return tr
}

// newBundle makes another bundle of the trial.
func (t *trial) newBundle(name string, edit func(*trial, *specs.Spec)) string {
	t.Helper()
	bundle := filepath.Join(t.dir, name)
	harness.MakeRootfs(t, filepath.Join(bundle, "rootfs"))
	data, err := os.ReadFile(t.probe)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(bundle, "rootfs", "bin", "probe"), data, 0o755))
	// Of runv, because the oracle may be older than the specification.
	out, err := exec.Command(filepath.Join(harness.TreeRoot(), "bin", "runv"), "spec", "--bundle", bundle).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	config := filepath.Join(bundle, "config.json")
	data, err = os.ReadFile(config)
	assert.NilError(t, err)
	var spec specs.Spec
	assert.NilError(t, json.Unmarshal(data, &spec))
	spec.Version = "1.0.2"
	spec.Process.Terminal = false
	spec.Process.Args = []string{"sleep", "100000"}
	if edit != nil {
		edit(t, &spec)
	}
	data, err = json.Marshal(&spec)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(config, data, 0o600))
	return bundle
}

// file makes a file of the trial's scratch directory and returns its path.
func (t *trial) file(name, text string) string {
	t.Helper()
	path := filepath.Join(t.dir, name)
	assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	assert.NilError(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// command makes a command of the runtime, which is killed after a time.
func (t *trial) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), harness.Timeout)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, t.side.argv[0], append(t.side.argv[1:len(t.side.argv):len(t.side.argv)], args...)...)
	cmd.Dir = t.dir
	return cmd
}

// do runs a command of the runtime to its end.
func (t *trial) do(args ...string) harness.Result { return harness.Finish(t.command(args...)) }

// record notes lines under a name.
func (t *trial) record(name string, lines ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seen.Add(name, t.neutral(lines)...)
}

// neutral replaces names that the trials of the runtimes do not share.
func (t *trial) neutral(lines []string) []string {
	r := strings.NewReplacer(t.bundle, "BUNDLE", t.dir, "DIR", t.id, "ID")
	all := make([]string, len(lines))
	for i, line := range lines {
		all[i] = r.Replace(line)
	}
	return all
}

// recordProbe notes what a probe printed, each section under its name after a prefix.
func (t *trial) recordProbe(prefix, output string) {
	name := "output"
	for line := range strings.Lines(output) {
		line = strings.TrimRight(line, "\r\n")
		if s, ok := strings.CutPrefix(line, "== "); ok {
			name = s
			t.record(prefix + name)
			continue
		}
		t.record(prefix+name, line)
	}
}

// recordEnd notes how a command ended and what it said on stderr.
func (t *trial) recordEnd(name string, r harness.Result) {
	if r.Stderr != "" {
		t.Logf("%s %s: exit %d: %s", t.side.name, name, r.Code, r.Stderr)
	}
	t.record(name, ending(r))
}

// ending is the exit status and what a failed command says.
func ending(r harness.Result) string {
	if text := complaint(r.Stderr); text != "" {
		return fmt.Sprintf("exit %d: %s", r.Code, text)
	}
	return fmt.Sprintf("exit %d", r.Code)
}

// phrases are those that callers of runc look for in what it says. Anything else is only known to be an error.
var phrases = []string{
	"container does not exist", "cannot start an already running container", "cannot start a container that has stopped",
	"cannot start a container in the paused state", "cannot exec in a stopped container", "cannot exec in a paused container",
	"container not running", "is not running", "container not paused", "is not stopped", "executable file not found in $PATH", "permission denied",
	"no such file or directory", "cannot pause", "already exists", "is a directory", "not a directory", "exec format error",
	"console socket",
	"unknown signal", "invalid id format", "invalid container ID format", "container ID cannot be empty", "id cannot be empty",
}

var level = regexp.MustCompile(`level=(\w+) msg=("(?:[^"\\]|\\.)*"|\S+)`)

// complaint is what a command's stderr means to a caller.
func complaint(stderr string) string {
	var errors []string
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(line)
		if m := level.FindStringSubmatch(line); m != nil {
			if m[1] == "warning" || m[1] == "info" {
				continue
			}
			line = m[2]
		}
		if strings.HasPrefix(line, "runv: warning:") || line == "" {
			continue
		}
		errors = append(errors, line)
	}
	all := strings.Join(errors, " ")
	for _, phrase := range phrases {
		if strings.Contains(all, phrase) {
			return phrase
		}
	}
	if all != "" {
		return "an error"
	}
	return ""
}

// flatten makes one line of each leaf of a JSON document: path, type, value.
func flatten(t testing.TB, document string, value func(path string, v any) string) []string {
	t.Helper()
	var v any
	decoder := json.NewDecoder(bytes.NewReader([]byte(document)))
	decoder.UseNumber()
	if err := decoder.Decode(&v); err != nil {
		return []string{"not JSON: " + document}
	}
	var lines []string
	var walk func(string, any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				walk(path+"."+k, e)
			}
		case []any:
			for i, e := range v {
				walk(path+"["+strconv.Itoa(i)+"]", e)
			}
		default:
			lines = append(lines, strings.TrimPrefix(path, ".")+" = "+value(path, v))
		}
	}
	walk("", v)
	return sortLines(lines)
}

// awaitStatus waits until the container has a status, and tells whether it came.
func (t *trial) awaitStatus(status string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		var s struct{ Status string }
		if r := t.do("state", t.id); r.Code == 0 && json.Unmarshal([]byte(r.Stdout), &s) == nil && s.Status == status {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
	t.Fatalf("%s: container %s does not become %s", t.side.name, t.id, status)
}

// remove deletes the container, whatever its state.
func (t *trial) remove() {
	t.Helper()
	harness.ReapOrphans("probe")
	r := t.do("delete", "--force", t.id)
	assert.Check(t, r.Code == 0, "%s delete --force: %s", t.side.name, r.Stderr)
}

func sortLines(lines []string) []string {
	slices.Sort(lines)
	return lines
}
