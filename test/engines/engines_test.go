package engines

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"gotest.tools/v3/assert"

	"runv/test/compare"
	"runv/test/harness"
)

// TestDocker runs the checks with Docker, under both runcs and under runv.
func TestDocker(t *testing.T) { compareRuntimes(t, "docker", newDocker) }

// TestPodman runs the checks with Podman, under both runcs and under runv.
func TestPodman(t *testing.T) { compareRuntimes(t, "podman", newPodman) }

func compareRuntimes(t *testing.T, engine string, start func(testing.TB, string) *engine) {
	seen := map[string]map[string]compare.Sections{} // by runtime and check
	for _, runtime := range append(harness.OracleNames(), "runv") {
		t.Run(runtime, func(t *testing.T) {
			e := start(t, runtime)
			seen[runtime] = runChecks(t, e)
			if runtime == "runv" {
				t.Run("readme", func(t *testing.T) { runReadme(t, e) })
			}
		})
	}
	j := compare.NewJudge(accepted)
	for _, c := range checks {
		for _, oracle := range harness.OracleNames() {
			theirs, ours := seen[oracle][c.name], seen["runv"][c.name]
			if c.harms {
				theirs = c.silence(engine)
			}
			if theirs == nil || ours == nil {
				continue // not chosen
			}
			t.Run("compare/"+oracle+"/"+c.name, func(t *testing.T) {
				v := j.Compare(oracle, engine+"/"+c.name, theirs, ours)
				results.add(engine, oracle, c, v)
				if len(v.Unexplained) > 0 {
					t.Errorf("unexplained differences:\n%s", strings.Join(v.Unexplained, "\n"))
				}
			})
		}
	}
	results.addReasons(engine, j)
}

// runChecks runs an engine's checks, some of them at once, and returns what each has seen.
func runChecks(t *testing.T, e *engine) map[string]compare.Sections {
	var mu sync.Mutex
	seen := map[string]compare.Sections{}
	one := func(t *testing.T, c check) {
		s := e.run(t, c)
		mu.Lock()
		defer mu.Unlock()
		seen[c.name] = s
	}
	mine := func(c check, alone bool) bool {
		return c.of(e.name) && c.alone == alone && (*all || slices.Contains(strings.Fields(c.short), e.name)) && (!c.harms || e.runtime == "runv")
	}
	if slices.ContainsFunc(checks, func(c check) bool { return c.image && (mine(c, false) || mine(c, true)) }) {
		e.importSystemd()
	}
	t.Run("checks", func(t *testing.T) {
		for _, c := range checks {
			if mine(c, false) {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					one(t, c)
				})
			}
		}
	})
	for _, c := range checks {
		if mine(c, true) {
			t.Run(c.name, func(t *testing.T) { one(t, c) })
		}
	}
	return seen
}

// runReadme runs the commands that README gives for an engine, as they stand there.
func runReadme(t *testing.T, e *engine) {
	data, err := os.ReadFile(filepath.Join(harness.TreeRoot(), "README.md"))
	assert.NilError(t, err)
	_, section, ok := strings.Cut(string(data), "\n## Docker and Podman\n")
	assert.Assert(t, ok)
	section, _, _ = strings.Cut(section, "\n## ")
	n := 0
	for line := range strings.Lines(section) {
		if !strings.HasPrefix(line, e.name+" ") {
			continue
		}
		n++
		line = strings.ReplaceAll(strings.TrimSpace(line), "/usr/local/bin/runv", e.program)
		e.ok("sh", "-c", line)
	}
	assert.Assert(t, n > 2, "README has %d commands", n)
}
