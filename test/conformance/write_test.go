package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/test/compare"
	"runv/test/harness"
)

// docPath is where the results are kept.
var docPath = filepath.Join(harness.TreeRoot(), "docs", "conformance.md")

// results are what the tests of this run have found.
var results collector

type collector struct {
	mu       sync.Mutex
	programs map[string]programResult
	verdicts map[string]map[string]compare.Verdict // by case and oracle
	reasons  map[string]map[string]bool            // reason → names of cases
}

type programResult struct {
	passed   map[string]bool // by side
	expected program
}

func (c *collector) add(name string, passed map[string]bool, expected program) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.programs == nil {
		c.programs = map[string]programResult{}
	}
	c.programs[name] = programResult{passed, expected}
}

func (c *collector) addVerdict(name, oracle string, v compare.Verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.verdicts == nil {
		c.verdicts = map[string]map[string]compare.Verdict{}
	}
	if c.verdicts[name] == nil {
		c.verdicts[name] = map[string]compare.Verdict{}
	}
	c.verdicts[name][oracle] = v
}

func (c *collector) addReasons(j *compare.Judge) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reasons = map[string]map[string]bool{}
	for i, a := range acceptedDifferences {
		for _, name := range j.Cases(i) {
			if c.reasons[a.Reason] == nil {
				c.reasons[a.Reason] = map[string]bool{}
			}
			c.reasons[a.Reason][name] = true
		}
	}
}

// TestWritten runs after all others of this package. It writes the document when that is asked
// for, and else checks that the one in the tree is of these tables.
func TestWritten(t *testing.T) {
	if *writeDoc == "" {
		checkDocument(t)
		return
	}
	if len(results.programs) != len(programNames(t)) || len(results.verdicts) != len(differentials) {
		t.Fatalf("%d programs and %d cases have results: the document tells of all or is not written", len(results.programs), len(results.verdicts))
	}
	for name, verdicts := range results.verdicts {
		for oracle, v := range verdicts {
			assert.Assert(t, len(v.Unexplained) == 0, "%s has unexplained differences from %s: nothing is written", name, oracle)
		}
	}
	var b strings.Builder
	b.WriteString(`# Conformance

What runv does differently from runc, and why. There are two runcs to compare with, since they differ and both are in use: an old one,
Debian's, and a new one. ` + "`make conformance`" + ` runs all of it under the three and writes this page; nobody edits it.

`)
	machine(t, &b)
	b.WriteString(`
## The same bundle under runc and runv

Each case is a bundle that all run, or a use of the command line. A probe in the container prints what it sees:
` + "`/proc/self/{status,limits,cgroup,mountinfo,attr,…}`" + `, those of PID 1, devices, what can be read, written and called. "Old" and
"new" count the lines that only that runc or only runv prints, for a reason that the next table lists. A difference without a reason fails the run.

| case | what it is | lines | old | new |
|---|---|---|---|---|
`)
	for _, d := range differentials {
		old, new := results.verdicts[d.name][harness.OldRunc], results.verdicts[d.name][harness.NewRunc]
		fmt.Fprintf(&b, "| %s | %s | %d | %d | %d |\n", d.name, cell(d.about), max(old.Lines, new.Lines), old.Explained, new.Explained)
	}
	b.WriteString("\n### Accepted differences\n\n\"From\" tells which runc differs so.\n\n| reason | from | cases |\n|---|---|---|\n")
	for _, reason := range reasonsInOrder() {
		cases := slices.Sorted(maps.Keys(results.reasons[reason]))
		text := strings.Join(cases, ", ")
		switch {
		case len(cases) == 0:
			text = "some runs"
		case len(cases) > len(differentials)/2:
			text = fmt.Sprintf("most (%d)", len(cases))
		}
		fmt.Fprintf(&b, "%s %s |\n", reasonRow(reason), text)
	}
	b.WriteString("\n### Fields of config.json that runv does not honour\n\n" + fieldTable())
	passed := map[string]int{}
	for _, r := range results.programs {
		for side, ok := range r.passed {
			if ok {
				passed[side]++
			}
		}
	}
	fmt.Fprintf(&b, `
## runtime-tools

The validation programs of %s %s, each under both runcs and under runv on the same machine. Of %d programs
the old runc passes %d, the new one %d, runv %d. A program passes when it ends with 0 and reports no failed test and no error.

| program | old runc | new runc | runv | reason |
|---|---|---|---|---|
`, toolsModule, toolsVersion(t), len(results.programs), passed[harness.OldRunc], passed[harness.NewRunc], passed[runvName])
	for _, name := range slices.Sorted(maps.Keys(results.programs)) {
		r := results.programs[name]
		b.WriteString(programRow(name, r.expected) + "\n")
	}
	assert.NilError(t, os.MkdirAll(filepath.Dir(*writeDoc), 0o755))
	assert.NilError(t, os.WriteFile(*writeDoc, []byte(b.String()), 0o644))
	writeReadme(t)
}

func programRow(name string, p program) string {
	row := "| " + name + " |"
	for _, side := range append(harness.OracleNames(), runvName) {
		word := "**fails**"
		switch {
		case slices.Contains(p.flaky, side):
			word = "sometimes"
		case slices.Contains(p.passes, side):
			word = "passes"
		}
		row += " " + word + " |"
	}
	return row + " " + cell(p.reason) + " |"
}

// reasonRow is the beginning of a reason's row.
func reasonRow(reason string) string {
	with := map[string]string{harness.OldRunc: "the old", harness.NewRunc: "the new"}
	oracles := compare.With(acceptedDifferences, reason, harness.OracleNames())
	text := "both"
	if len(oracles) == 1 {
		text = with[oracles[0]]
	}
	return fmt.Sprintf("| %s | %s |", cell(reason), text)
}

func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

func reasonsInOrder() []string {
	var reasons []string
	for _, a := range acceptedDifferences {
		if !slices.Contains(reasons, a.Reason) {
			reasons = append(reasons, a.Reason)
		}
	}
	return reasons
}

// machine tells what was compared with what.
func machine(t *testing.T, b *strings.Builder) {
	t.Helper()
	runcs := harness.Oracles(t)
	var host unix.Utsname
	assert.NilError(t, unix.Uname(&host))
	data, err := os.ReadFile(filepath.Join(harness.TreeRoot(), "build", "guest", "guest.json"))
	assert.NilError(t, err)
	var guest struct {
		Kernel struct{ Release string } `json:"kernel"`
	}
	assert.NilError(t, json.Unmarshal(data, &guest))
	fmt.Fprintf(b, "| | |\n|---|---|\n| the old runc | %s, Debian's |\n| the new runc | %s |\n| their kernel | %s, cgroup v1 |\n| the guest's kernel | %s, cgroup v2 |\n",
		runcs[0].Version(t), runcs[1].Version(t), text(host.Release[:]), guest.Kernel.Release)
}

func text(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

func toolsVersion(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Version}}", toolsModule)
	cmd.Dir = filepath.Join(harness.TreeRoot(), toolsDir)
	out, err := cmd.Output()
	assert.NilError(t, err)
	return strings.TrimSpace(string(out))
}

// checkDocument compares the document's lists with the tables of this package.
func checkDocument(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile(docPath)
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("nothing is written yet: make conformance")
	}
	assert.NilError(t, err)
	doc := string(data)
	const hint = "docs/conformance.md is not of these tables: run make conformance"
	for _, reason := range reasonsInOrder() {
		assert.Check(t, strings.Contains(doc, "\n"+reasonRow(reason)), "%s: no %q", hint, reasonRow(reason))
	}
	for _, d := range differentials {
		assert.Check(t, strings.Contains(doc, fmt.Sprintf("\n| %s | %s |", d.name, cell(d.about))), "%s: no case %s", hint, d.name)
	}
	for _, name := range programNames(t) {
		row := programRow(name, expectedOf(name))
		assert.Check(t, strings.Contains(doc, "\n"+row+"\n"), "%s: no %s", hint, row)
	}
	assert.Check(t, strings.Contains(doc, "\n\n"+fieldTable()+"\n"), "%s: its table of fields is another", hint)
	_, table, _ := readme(t)
	assert.Check(t, table == fieldTable(), "README.md: its table of fields is not that of runv: run make conformance")
	rows := strings.Count(doc, "\n| ") - strings.Count(doc, "\n| reason |") - strings.Count(doc, "\n| case |") - strings.Count(doc, "\n| program |") - strings.Count(doc, "\n| |") - strings.Count(doc, "\n| field |")
	want := 4 + strings.Count(fieldTable(), "\n") - 2 + len(reasonsInOrder()) + len(differentials) + len(programNames(t))
	assert.Check(t, rows == want, "%s: it has %d rows of tables, not %d", hint, rows, want)
}
