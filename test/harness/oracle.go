package harness

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

// The names of the oracles. Tables of differences that one of them has alone use them.
const (
	OldRunc = "runc-old" // Debian's
	NewRunc = "runc-new" // that the Makefile builds
)

// OracleNames are the names of all oracles, the older first.
func OracleNames() []string { return []string{OldRunc, NewRunc} }

// newRunc is where the Makefile builds the newer oracle, from the root of the tree.
const newRunc = "build/tools/runc@v1.5.2/runc"

// Oracle is a runc that runv is compared with. There are two, for they differ and users have both.
type Oracle struct {
	Name string // OldRunc or NewRunc; part of names of files
	Path string // of the program
}

// Oracles returns both oracles, the older first. It fails the test if one is missing.
func Oracles(t testing.TB) []Oracle {
	t.Helper()
	debian, err := exec.LookPath("runc")
	assert.NilError(t, err, "make deps installs it")
	built := filepath.Join(TreeRoot(), filepath.FromSlash(newRunc))
	_, err = os.Stat(built)
	assert.NilError(t, err, "make deps builds it")
	return []Oracle{{OldRunc, debian}, {NewRunc, built}}
}

// Version is the first line that the oracle says of its version.
func (o Oracle) Version(t testing.TB) string {
	t.Helper()
	out, err := exec.Command(o.Path, "--version").Output()
	assert.NilError(t, err)
	first, _, _ := strings.Cut(string(out), "\n")
	return first
}

// Runc is an oracle with containers of a test's own.
type Runc struct {
	Oracle
	Root string // --root

	t testing.TB
}

// Runcs returns both oracles, each with a state directory of its own below the Env's. At the test's end it
// deletes the containers that they have left.
func (e *Env) Runcs() []*Runc {
	e.t.Helper()
	var all []*Runc
	for _, o := range Oracles(e.t) {
		r := &Runc{Oracle: o, Root: filepath.Join(e.Dir, "root-of-"+o.Name), t: e.t}
		e.t.Cleanup(r.close)
		all = append(all, r)
	}
	return all
}

func (r *Runc) close() {
	entries, _ := os.ReadDir(r.Root)
	for _, entry := range entries {
		if got := r.Run("delete", "--force", entry.Name()); got.Code != 0 {
			r.t.Errorf("%s delete --force %s: %s", r.Name, entry.Name(), got.Stderr)
		}
	}
}

// Command makes a command of the oracle that the caller runs. It is killed after Timeout.
func (r *Runc) Command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	r.t.Cleanup(cancel)
	return exec.CommandContext(ctx, r.Path, append([]string{"--root", r.Root}, args...)...)
}

// Run runs the oracle without input.
func (r *Runc) Run(args ...string) Result { return Finish(r.Command(args...)) }
