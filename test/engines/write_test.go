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
	verdicts map[string]compare.Verdict // by engine/check
	needed   map[string][]string        // by engine/reason: the checks that needed it
}

func (c *collector) add(engine string, k check, v compare.Verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.verdicts == nil {
		c.verdicts = map[string]compare.Verdict{}
	}
	c.verdicts[engine+"/"+k.name] = v
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
				assert.Check(t, strings.Contains(doc, "\n| "+cell(reason)+" |"), "%s: no %q", hint, reason)
			}
			rows := strings.Count(doc, "\n| ") - strings.Count(doc, "\n| | |") - strings.Count(doc, "\n| check |") - strings.Count(doc, "\n| difference |")
			assert.Check(t, rows == want+4, "%s: it has %d rows, not %d", hint, rows, want+4)
		})
	}
}

// write writes an engine's document.
func write(t *testing.T, engine string) {
	var b strings.Builder
	b.WriteString(introductions[engine])
	b.WriteString(`
## What works as with runc

Each row is a script of commands that a private engine has got with runc and with runv as its runtime on the same machine: their output, errors and
exit status must be the same but for the differences below. ` + "`make engines`" + ` runs them and writes this page; the scripts are in
` + "`test/engines/checks_test.go`" + `. "Differs" counts lines that only one of them prints.

| | |
|---|---|
`)
	for _, program := range [][]string{{map[string]string{"docker": "/usr/sbin/dockerd", "podman": "/usr/bin/podman"}[engine], "--version"}, {oracle(t), "--version"}, {"uname", "-r"}, {filepath.Join(harness.TreeRoot(), "bin", "runv"), "features"}} {
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
	b.WriteString("\n| check | what it covers | lines | differs |\n|---|---|---|---|\n")
	for _, c := range checks {
		if !c.of(engine) {
			continue
		}
		v, ok := results.verdicts[engine+"/"+c.name]
		assert.Assert(t, ok && len(v.Unexplained) == 0, "%s: no result, or unexplained differences: nothing is written", c.name)
		fmt.Fprintf(&b, "%s %d | %d |\n", row(engine, c), v.Lines, v.Explained)
	}
	b.WriteString("\n## Differences\n\n| difference | checks |\n|---|---|\n")
	for _, reason := range reasons(engine) {
		where := strings.Join(results.needed[engine+"/"+reason], ", ")
		if where == "" {
			where = "some runs"
		}
		fmt.Fprintf(&b, "| %s | %s |\n", cell(reason), where)
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

// reasons lists the reasons for differences under an engine, in order.
func reasons(engine string) []string {
	var list []string
	for _, a := range accepted {
		if (strings.HasPrefix(a.Where, ".*/") || strings.HasPrefix(a.Where, engine+"/")) && !slices.Contains(list, a.Reason) {
			list = append(list, a.Reason)
		}
	}
	return list
}
