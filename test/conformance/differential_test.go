package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/test/compare"
	"runv/test/harness"
)

// differential is a bundle, or something done with the command line, that all runtimes get.
type differential struct {
	name  string
	about string
	short bool // part of make test
	edit  func(*trial, *specs.Spec)
	run   func(*trial) // look, if nil
}

// look starts the container, runs the probe in it, and removes it.
func look(t *trial) {
	r := t.do("run", "--detach", "--bundle", t.bundle, t.id)
	t.recordEnd("run", r)
	if r.Code == 0 {
		t.execProbe("", "exec")
	}
	t.remove()
}

// execProbe runs the probe with a runtime's command that ends before the container's id.
func (t *trial) execProbe(prefix string, command ...string) {
	r := t.do(append(command, t.id, "/bin/probe")...)
	t.recordEnd(prefix+"exec", r)
	t.recordProbe(prefix, r.Stdout)
}

// foreground runs the container's program to its end.
func foreground(t *trial) {
	r := t.do("run", "--bundle", t.bundle, t.id)
	t.recordEnd("run", r)
	t.recordProbe("", r.Stdout)
	t.remove()
}

// TestDifferential runs each case under both runcs and runv. With -v it tells what was seen, too.
func TestDifferential(t *testing.T) {
	e := harness.New(t)
	probe := filepath.Join(e.Dir, "probe")
	goBuild(t, ".", probe, "./test/conformance/probe")
	all := sides(t, e.Dir)
	assert.Equal(t, all[len(all)-1].root, e.Root)
	j := compare.NewJudge(acceptedDifferences)
	t.Run("cases", func(t *testing.T) {
		for _, c := range differentials {
			if !c.short && !*allCases {
				continue
			}
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				seen := map[string]compare.Sections{}
				for _, s := range all {
					tr := newTrial(t, s, filepath.Join(e.Dir, c.name, s.name), probe, c.edit)
					if c.run != nil {
						c.run(tr)
					} else {
						look(tr)
					}
					seen[s.name] = tr.seen
				}
				for _, oracle := range harness.OracleNames() {
					v := j.Compare(oracle, c.name, seen[oracle], seen[runvName])
					results.addVerdict(c.name, oracle, v)
					if len(v.Unexplained) > 0 {
						t.Errorf("unexplained differences:\n%s", strings.Join(v.Unexplained, "\n"))
					}
				}
				if dir := os.Getenv("CONFORMANCE_OUT"); dir != "" {
					for name, sections := range seen {
						var b strings.Builder
						for _, section := range sections {
							fmt.Fprintf(&b, "== %s\n%s\n", section.Name, strings.Join(section.Lines, "\n"))
						}
						assert.NilError(t, os.WriteFile(filepath.Join(dir, c.name+"."+name), []byte(b.String()), 0o600))
					}
				}
			})
		}
	})
	results.addReasons(j)
	if *allCases && !t.Failed() {
		for _, stale := range j.Stale(harness.OracleNames()) {
			t.Error(stale)
		}
	}
}

// without returns the namespaces that are not of some types.
func without(list []specs.LinuxNamespace, types ...specs.LinuxNamespaceType) []specs.LinuxNamespace {
	return slices.DeleteFunc(list, func(ns specs.LinuxNamespace) bool { return slices.Contains(types, ns.Type) })
}
