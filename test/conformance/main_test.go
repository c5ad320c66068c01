// Package conformance compares runv with runc, an old one and a new one: what programs see in the same bundle, what the
// command line answers in each state of a container, and what the validation programs of
// opencontainers/runtime-tools say of both.
//
// Each difference must be in a table here (accepted_test.go, programs_test.go), with its reason.
// `make test` runs a representative part; `make conformance` all, and writes docs/conformance.md.
package conformance

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"

	"runv/test/harness"
)

var (
	allCases = flag.Bool("all", false, "run all cases and programs, not the representative part")
	writeDoc = flag.String("write", "", "with -all: write the results to this file")
)

func TestMain(m *testing.M) { harness.Main(m) }

// goBuild builds packages, from a directory of this tree, into out.
func goBuild(t testing.TB, dir, out string, packages ...string) {
	t.Helper()
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out}, packages...)
	cmd := exec.Command("go", args...)
	cmd.Dir = filepath.Join(harness.TreeRoot(), dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	output, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", output)
}
