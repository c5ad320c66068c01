package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/bundle"
	"runv/test/harness"
)

// fieldTable lists the fields of config.json that runv does not honour, as the table by which it
// judges bundles has them. Those of other platforms go without saying.
func fieldTable() string {
	var b strings.Builder
	b.WriteString("| field | when it is set | why |\n|---|---|---|\n")
	for _, f := range bundle.Fields() {
		what := map[bundle.Support]string{bundle.Refused: "refused by name", bundle.Ignored: "ignored, with a warning"}[f.Support]
		if what == "" || f.OtherPlatform() {
			continue
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.Path, what, cell(f.Note))
	}
	return b.String()
}

// readmePath is the file that repeats the table between these two lines.
var readmePath = filepath.Join(harness.TreeRoot(), "README.md")

const (
	fieldsBegin = "<!-- make conformance writes this table -->\n"
	fieldsEnd   = "<!-- until here -->\n"
)

// readme is the file's text before, in and after the table.
func readme(t *testing.T) (before, table, after string) {
	t.Helper()
	data, err := os.ReadFile(readmePath)
	assert.NilError(t, err)
	before, rest, begins := strings.Cut(string(data), fieldsBegin)
	table, after, ends := strings.Cut(rest, fieldsEnd)
	assert.Assert(t, begins && ends, "%s has no place for the table of fields", readmePath)
	return before, table, after
}

func writeReadme(t *testing.T) {
	t.Helper()
	before, _, after := readme(t)
	assert.NilError(t, os.WriteFile(readmePath, []byte(before+fieldsBegin+fieldTable()+fieldsEnd+after), 0o644))
}
