package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// TestLargeProcess starts processes whose environment is as large as the kernel takes, and larger.
func TestLargeProcess(t *testing.T) {
	e := harness.New(t)
	environment := func(bytes int) (env []string) {
		const each = 100 << 10
		for i := range bytes / each {
			env = append(env, fmt.Sprintf("V%d=%s", i, strings.Repeat("x", each)))
		}
		return append(env, "PATH=/bin")
	}
	bundle := e.Bundle([]string{"sh", "-c", "sleep 1000"}, func(s *specs.Spec) {
		s.Process.Env = environment(1500 << 10)
		s.Annotations = map[string]string{"large": strings.Repeat("y", 5<<20)}
	})
	process := func(name string, bytes int, stack uint64) string {
		p := specs.Process{Cwd: "/", Args: []string{"sh", "-c", "env | wc -c"}, Env: environment(bytes)}
		if stack != 0 {
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_STACK", Soft: stack, Hard: stack}}
		}
		data, err := json.Marshal(p)
		assert.NilError(t, err)
		path := filepath.Join(e.Dir, name)
		assert.NilError(t, os.WriteFile(path, data, 0o600))
		return path
	}
	unlimited := process("unlimited", 5900<<10, 1<<64-1)
	tooLarge := process("too-large", 5900<<10, 0)
	for _, rt := range runtimes(e) {
		r := harness.Finish(rt.command("run", "-d", "--bundle", bundle, "box"))
		assert.Equal(t, r.Code, 0, "%s: %s", rt.name, r.Stderr)
		r = harness.Finish(rt.command("exec", "box", "sh", "-c", "env | wc -c"))
		assert.Equal(t, r.Code, 0, "%s: %s", rt.name, r.Stderr)
		assert.Assert(t, len(strings.TrimSpace(r.Stdout)) == 7, "%s: %s", rt.name, r.Stdout)
		r = harness.Finish(rt.command("exec", "--process", unlimited, "box"))
		assert.Equal(t, r.Code, 0, "%s: %s", rt.name, r.Stderr)
		assert.Equal(t, strings.TrimSpace(r.Stdout)[:1], "6", rt.name)
		r = harness.Finish(rt.command("exec", "--process", tooLarge, "box"))
		assert.Assert(t, r.Code == 255 || r.Code == 1 && rt.name != "runv", "%s: %d", rt.name, r.Code) // 1 before runc 1.2
		assert.Assert(t, cmp.Contains(r.Stderr, "exec /bin/sh: argument list too long"), rt.name)
	}
}
