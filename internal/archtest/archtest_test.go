package archtest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

const (
	module = "runv"
	root   = "../.."
)

// A goPackage is what go list tells of a package.
type goPackage struct {
	Dir          string
	ImportPath   string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	Deps         []string
	TestImports  []string
	XTestImports []string
}

// name returns the package's path in the module.
func (p goPackage) name() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

func list(t *testing.T) []goPackage {
	t.Helper()
	watchTree(t)
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e",
		"-json=Dir,ImportPath,GoFiles,TestGoFiles,XTestGoFiles,Imports,Deps,TestImports,XTestImports", "./...")
	cmd.Dir, cmd.Stderr = root, &stderr
	out, err := cmd.Output()
	assert.NilError(t, err, stderr.String())
	var packages []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	assert.Assert(t, len(packages) > 0)
	return packages
}

// watchTree looks at every directory with sources. go test repeats a result while all that the test
// has looked at is the same, but it does not see what programs look at that the test runs.
func watchTree(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if e != nil && e.IsDir() && (e.Name() == ".git" || e.Name() == "build" || e.Name() == "bin") {
			return filepath.SkipDir
		}
		return err
	})
	assert.NilError(t, err)
}

// matches tells whether a package, by its path in the module, is one that a pattern names.
func matches(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "..."); ok {
		return strings.HasPrefix(name+"/", prefix)
	}
	return pattern == name
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return matches(pattern, name) })
}

// complaint returns why a package may not import another by a rule, or "".
func (r importRule) complaint(from, imported string) string {
	switch {
	case !matchesAny(r.from, from) || matchesAny(r.except, from):
		return ""
	case strings.HasPrefix(imported, from+"/"):
		return ""
	case matchesAny(r.never, imported), r.only != nil && !matchesAny(r.only, imported):
		return from + " imports " + imported + ": " + r.why
	}
	return ""
}

func TestImportDirections(t *testing.T) {
	for _, p := range list(t) {
		for _, path := range p.Imports {
			imported, ok := strings.CutPrefix(path, module+"/")
			if !ok {
				continue
			}
			for _, rule := range importRules() {
				if complaint := rule.complaint(p.name(), imported); complaint != "" {
					t.Error(complaint)
				}
			}
		}
	}
}

func TestImportRulesNameWhatExists(t *testing.T) {
	packages := list(t)
	for _, rule := range importRules() {
		for _, pattern := range slices.Concat(rule.from, rule.except, rule.only, rule.never) {
			if !slices.ContainsFunc(packages, func(p goPackage) bool { return matches(pattern, p.name()) }) {
				t.Errorf("a rule names %s, and there is no such package: change the rule (%s)", pattern, rule.why)
			}
		}
	}
}

func TestRuleComplains(t *testing.T) {
	rule := importRule{from: []string{"a/..."}, except: []string{"a/x"}, only: []string{"b"}, never: []string{"b/c"}, why: "so"}
	for _, test := range []struct {
		from, imported string
		allowed        bool
	}{
		{"a", "b", true},
		{"a/y", "b", true},
		{"a/y", "d", false},
		{"a/y", "b/c", false},
		{"a/y", "a/y/z", true},
		{"a/y", "a/z", false},
		{"a/x", "d", true},
		{"ab", "d", true},
	} {
		assert.Check(t, (rule.complaint(test.from, test.imported) == "") == test.allowed, "%s imports %s", test.from, test.imported)
	}
}

func TestBinaries(t *testing.T) {
	packages := list(t)
	for _, rule := range binaryRules() {
		at := slices.IndexFunc(packages, func(p goPackage) bool { return p.name() == rule.program })
		if at < 0 {
			t.Errorf("a rule names the program %s, and there is none", rule.program)
			continue
		}
		for _, path := range rule.never {
			if slices.Contains(packages[at].Deps, path) {
				t.Errorf("%s contains %s: %s", rule.program, path, rule.why)
			}
			if !slices.ContainsFunc(packages, func(p goPackage) bool {
				return slices.Contains(slices.Concat(p.Deps, p.TestImports, p.XTestImports), path)
			}) {
				t.Errorf("a rule keeps %s out of %s, and nothing in the module uses it: remove the rule", path, rule.program)
			}
		}
	}
}

func TestEachPackageHasOneComment(t *testing.T) {
	for _, p := range list(t) {
		files := p.GoFiles
		if len(files) == 0 {
			files = slices.Concat(p.TestGoFiles, p.XTestGoFiles)
		}
		var commented []string
		generated := 0
		for _, name := range files {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			assert.NilError(t, err)
			switch {
			case ast.IsGenerated(f):
				generated++
			case f.Doc != nil:
				commented = append(commented, name)
			}
		}
		// The comment of a generated package is in its .proto file.
		if len(commented) != 1 && generated != len(files) {
			t.Errorf("%s: %d files have a package comment, want one that says what the package owns, who calls it and what it must not do %v",
				p.name(), len(commented), commented)
		}
	}
}
