// Package engines drives Docker and Podman, unmodified and as Debian has them, with runv as their runtime,
// and with an old and a new runc first as the oracles. What runv does must be the same, or be a difference that accepted_test.go has
// a reason for. Each engine is private: data, sockets, cgroups and network namespace of its own, so
// that nothing of it touches an engine that the host runs.
//
// `make test` runs a representative part; `make engines` all, and writes docs/docker.md and docs/podman.md.
package engines

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"runv/test/harness"
)

var (
	all      = flag.Bool("all", false, "run all cases, not the representative part")
	writeDoc = flag.String("write", "", "with -all: write the results to docker.md and podman.md in this directory")
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == terminalName {
		os.Exit(terminal(os.Args[1:]))
	}
	harness.Main(m)
}
