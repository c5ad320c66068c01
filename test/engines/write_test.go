package engines

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"gotest.tools/v3/assert"

	"runv/test/compare"
	"runv/test/harness"
)

var results collector

// collector gathers what the tests of this run have found.
type collector struct {
	mu       sync.Mutex
	verdicts map[string]compare.Verdict // by engine/oracle/check
	needed   map[string][]string        // by engine/reason: the checks that needed it
}

func (c *collector) add(engine, oracle string, k check, v compare.Verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.verdicts == nil {
		c.verdicts = map[string]compare.Verdict{}
	}
	c.verdicts[engine+"/"+oracle+"/"+k.name] = v
}

func (c *collector) addReasons(engine string, j *compare.Judge) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.needed == nil {
		c.needed = map[string][]string{}
	}
	for i, a := range accepted {
		key := engine + "/" + a.Reason
		for _, name := range j.Cases(i) {
			if name = filepath.Base(name); !slices.Contains(c.needed[key], name) {
				c.needed[key] = append(c.needed[key], name)
			}
		}
	}
}

// introductions are the beginnings of the documents.
var introductions = map[string]string{
	"docker": `# Docker

runv is a runtime of an unmodified Docker, 20.10 or later. In ` + "`/etc/docker/daemon.json`" + `, with the path of your runv:

` + "```json" + `
{"runtimes": {"runv": {"path": "/usr/local/bin/runv"}}}
` + "```" + `

Restart Docker; then ` + "`docker run --runtime runv IMAGE`" + ` runs a container in a VM, ` + "`\"default-runtime\": \"runv\"`" + ` beside it makes that so for
all, and in a docker-compose file of version 2 a service has ` + "`runtime: runv`" + `. Containers that share a namespace (` + "`--network container:X`" + `)
share the VM.
`,
	"podman": `# Podman

runv is a runtime of an unmodified Podman, 4.3 or later: ` + "`podman --runtime /usr/local/bin/runv run IMAGE`" + `, or once for all in
` + "`/etc/containers/containers.conf`" + `:

` + "```toml" + `
[engine]
runtime = "runv"

[engine.runtimes]
runv = ["/usr/local/bin/runv"]
` + "```" + `

A pod is one VM with all its containers. Podman must be root's.
`,
}

// TestWritten runs after all others of this package. It writes the documents when that is asked for, and else
// checks that those in the tree are of these tables.
func TestWritten(t *testing.T) {
	for _, engine := range []string{"docker", "podman"} {
		t.Run(engine, func(t *testing.T) {
			if *writeDoc != "" {
				write(t, engine)
				return
			}
			data, err := os.ReadFile(filepath.Join(harness.TreeRoot(), "docs", engine+".md"))
			assert.NilError(t, err)
			doc := string(data)
			hint := "docs/" + engine + ".md is not of these tables: run make engines"
			assert.Check(t, strings.HasPrefix(doc, introductions[engine]), "%s: it begins otherwise", hint)
			want := 0
			for _, c := range checks {
				if c.of(engine) {
					want++
					assert.Check(t, strings.Contains(doc, "\n"+row(engine, c)), "%s: no %s", hint, c.name)
				}
			}
			for _, reason := range reasons(engine) {
				want++
				assert.Check(t, strings.Contains(doc, "\n"+reasonRow(engine, reason)), "%s: no %q", hint, reasonRow(engine, reason))
			}
			rows := strings.Count(doc, "\n| ") - strings.Count(doc, "\n| | |") - strings.Count(doc, "\n| check |") - strings.Count(doc, "\n| difference |")
			assert.Check(t, rows == want+5, "%s: it has %d rows, not %d", hint, rows, want+5)
		})
	}
}

// write writes an engine's document.
func write(t *testing.T, engine string) {
	var b strings.Builder
	b.WriteString(introductions[engine])
	b.WriteString(`
## What works as with runc

Each row is a script of commands that a private engine has got with each of two runcs, an old one and a new one, and with runv as its runtime on the
same machine: output, errors and exit status must be the same but for the differences below. ` + "`make engines`" + ` runs them and writes this page; the scripts are in
` + "`test/engines/checks_test.go`" + `. "Old" and "new" count the lines that only
that runc or only runv prints.

| | |
|---|---|
`)
	runcs := harness.Oracles(t)
	for _, program := range [][]string{{map[string]string{"docker": "/usr/sbin/dockerd", "podman": "/usr/bin/podman"}[engine], "--version"}, {"uname", "-r"}, {filepath.Join(harness.TreeRoot(), "bin", "runv"), "features"}} {
		out, err := exec.Command(program[0], program[1:]...).Output()
		assert.NilError(t, err)
		what := filepath.Base(program[0])
		text, _, _ := strings.Cut(string(out), "\n")
		switch what {
		case "uname":
			what, text = "the host's kernel", text+", cgroup v1"
		case "runv":
			what, text = "runv's VMs", accelerator(string(out))
		}
		fmt.Fprintf(&b, "| %s | %s |\n", what, text)
	}
	fmt.Fprintf(&b, "| the old runc | %s, Debian's |\n| the new runc | %s |\n", runcs[0].Version(t), runcs[1].Version(t))
	b.WriteString("\n| check | what it covers | lines | old | new |\n|---|---|---|---|---|\n")
	for _, c := range checks {
		if !c.of(engine) {
			continue
		}
		var verdicts []compare.Verdict
		for _, oracle := range harness.OracleNames() {
			v, ok := results.verdicts[engine+"/"+oracle+"/"+c.name]
			assert.Assert(t, ok && len(v.Unexplained) == 0, "%s: no result, or unexplained differences: nothing is written", c.name)
			verdicts = append(verdicts, v)
		}
		fmt.Fprintf(&b, "%s %d | %d | %d |\n", row(engine, c), max(verdicts[0].Lines, verdicts[1].Lines), verdicts[0].Explained, verdicts[1].Explained)
	}
	b.WriteString("\n## Differences\n\n\"From\" tells which runc differs so.\n\n| difference | from | checks |\n|---|---|---|\n")
	for _, reason := range reasons(engine) {
		where := strings.Join(results.needed[engine+"/"+reason], ", ")
		if where == "" {
			where = "some runs"
		}
		fmt.Fprintf(&b, "%s %s |\n", reasonRow(engine, reason), where)
	}
	assert.NilError(t, os.MkdirAll(*writeDoc, 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(*writeDoc, engine+".md"), []byte(b.String()), 0o644))
}

// accelerator tells from the answer of runv features how VMs run here.
func accelerator(features string) string {
	if strings.Contains(features, `"dev.runv.accel": "kvm"`) {
		return "under KVM"
	}
	return "under TCG"
}

// row is the beginning of a check's row.
func row(engine string, c check) string {
	about := c.about
	if engine == "podman" {
		about = asPodman(about)
	}
	return fmt.Sprintf("| %s | %s |", c.name, cell(about))
}

func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

// ofEngine are the differences that can be seen with an engine.
func ofEngine(engine string) []compare.Accepted {
	return slices.DeleteFunc(slices.Clone(accepted), func(a compare.Accepted) bool {
		return !strings.HasPrefix(a.Where, ".*/") && !strings.HasPrefix(a.Where, engine+"/")
	})
}

// reasonRow is the beginning of a reason's row.
func reasonRow(engine, reason string) string {
	text := "both"
	if oracles := compare.With(ofEngine(engine), reason, harness.OracleNames()); len(oracles) == 1 {
		text = map[string]string{harness.OldRunc: "the old", harness.NewRunc: "the new"}[oracles[0]]
	}
	return fmt.Sprintf("| %s | %s |", cell(reason), text)
}

// reasons lists the reasons for differences under an engine, in order.
func reasons(engine string) []string {
	var list []string
	for _, a := range ofEngine(engine) {
		if !slices.Contains(list, a.Reason) {
			list = append(list, a.Reason)
		}
	}
	return list
}
