package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/internal/config"
	"runv/test/harness"
)

func readme(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(harness.TreeRoot(), "README.md"))
	assert.NilError(t, err)
	return string(data)
}

// TestReadmeByHand runs the commands that the quick start gives, as they stand there.
func TestReadmeByHand(t *testing.T) {
	_, rest, ok := strings.Cut(readme(t), "By hand:\n\n```\n")
	assert.Assert(t, ok)
	script, _, ok := strings.Cut(rest, "```")
	assert.Assert(t, ok)
	e := harness.New(t)
	assert.NilError(t, os.Symlink(filepath.Join(harness.TreeRoot(), "bin"), filepath.Join(e.Dir, "bin")))
	script = strings.ReplaceAll(script, "bin/runv run", "bin/runv --root "+e.Root+" run")
	// Its container is a shell on the terminal; script(1) would be another package, so it gets no
	// terminal.
	script = strings.ReplaceAll(script, "bin/runv spec --bundle web\n", "bin/runv spec --bundle web\nsed -i 's/\"terminal\": true/\"terminal\": false/' web/config.json\n")
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = e.Dir
	cmd.Stdin = strings.NewReader("echo $((6*7)) in $$\n")
	r := harness.Finish(cmd)
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.Equal(t, r.Stdout, "42 in 1\n")
}

// TestReadmeNamesWhatThereIs compares the README with the program.
func TestReadmeNamesWhatThereIs(t *testing.T) {
	text := readme(t)
	e := harness.New(t)
	help := e.OK("--help")
	for _, m := range regexp.MustCompile("(?:`|# )runv ([a-z]+)").FindAllStringSubmatch(text, -1) {
		assert.Assert(t, cmp.Regexp(`(?m)^ +`+m[1]+`\b`, help), "README names the command %s", m[1])
	}
	_, table, ok := strings.Cut(text, "## Configuration")
	assert.Assert(t, ok)
	table, _, _ = strings.Cut(table, "\n## ")
	var documented []string
	for line := range strings.SplitSeq(table, "\n") {
		if cell, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " |"); ok && strings.HasPrefix(line, "| `") {
			documented = append(documented, strings.Split(strings.ReplaceAll(cell, "`", ""), ", ")...)
		}
	}
	var known []string
	for _, k := range config.Keys() {
		known = append(known, k.Name)
	}
	slices.Sort(documented)
	slices.Sort(known)
	assert.DeepEqual(t, documented, known)
	printed := e.OK("config")
	for _, name := range known {
		assert.Assert(t, cmp.Contains(printed, name))
	}
}

// TestInstalled installs into a directory of its own and runs a container from there.
func TestInstalled(t *testing.T) {
	e := harness.New(t)
	dest := filepath.Join(e.Dir, "dest")
	install := exec.Command("make", "-s", "install", "DESTDIR="+dest, "PREFIX=/opt/runv")
	install.Dir = harness.TreeRoot()
	out, err := install.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	bundle := e.Bundle([]string{"echo", "installed"})
	e.Runv = filepath.Join(dest, "opt", "runv", "bin", "runv")
	assert.Equal(t, e.OK("run", "--bundle", bundle, "web"), "installed\n")
	r := e.Run("doctor")
	assert.Equal(t, r.Code, 0, r.Stdout)
	assert.Assert(t, cmp.Contains(r.Stdout, filepath.Join(dest, "opt", "runv", "share", "runv")))
}
