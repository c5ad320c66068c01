package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"runv/test/harness"
)

const (
	toolsDir    = "test/conformance/runtimetools"
	toolsModule = "github.com/opencontainers/runtime-tools"

	// programTimeout bounds one program, which may start several containers.
	programTimeout = time.Minute
)

// program is one of runtime-tools' that does not pass under all runtimes, with the reason.
type program struct {
	name   string
	passes []string // names of the sides under which it passes
	flaky  []string // and of those under which it may end either way
	reason string
}

// representative programs are run by make test.
var representative = []string{
	"default", "kill", "linux_devices", "linux_masked_paths", "linux_readonly_paths", "linux_uid_mappings", "process_user",
}

// TestPrograms runs the validation programs of runtime-tools under both runcs and runv, and compares
// with the table of those that do not pass.
func TestPrograms(t *testing.T) {
	e := harness.New(t)
	names := representative
	if *allCases {
		names = programNames(t)
	}
	packages := []string{toolsModule + "/cmd/runtimetest"}
	for _, name := range names {
		packages = append(packages, toolsModule+"/validation/"+name)
	}
	bin := filepath.Join(e.Dir, "bin")
	assert.NilError(t, os.Mkdir(bin, 0o755))
	goBuild(t, toolsDir, bin+"/", packages...)
	// Root of a user namespace must get to the bundles.
	assert.NilError(t, os.Chmod(filepath.Dir(e.Dir), 0o755))
	all := sides(t, e.Dir)
	wrappers := map[string]string{}
	for _, s := range all {
		wrapper := filepath.Join(e.Dir, "run-"+s.name)
		wrappers[s.name] = wrapper
		script := fmt.Sprintf("#!/bin/sh\nexec '%s' \"$@\"\n", strings.Join(s.argv, "' '"))
		assert.NilError(t, os.WriteFile(wrapper, []byte(script), 0o755))
	}
	rootfs := filepath.Join(moduleDir(t), "rootfs-amd64.tar.gz")

	t.Run("programs", func(t *testing.T) {
		for _, name := range names {
			t.Run(name, func(t *testing.T) {
				if !strings.Contains(name, "cgroups") && !strings.Contains(name, "resources") { // these use one cgroup all
					t.Parallel()
				}
				expected := expectedOf(name)
				passed := map[string]bool{}
				for _, s := range all {
					dir := filepath.Join(e.Dir, name+"-"+s.name)
					assert.NilError(t, os.Mkdir(dir, 0o755))
					assert.NilError(t, os.Symlink(rootfs, filepath.Join(dir, filepath.Base(rootfs))))
					assert.NilError(t, os.Link(filepath.Join(bin, "runtimetest"), filepath.Join(dir, "runtimetest")))
					r := runProgram(t, filepath.Join(bin, name), dir, wrappers[s.name], s.name != runvName && name == "linux_ns_itype")
					passed[s.name] = r.passed()
					want := slices.Contains(expected.passes, s.name)
					if passed[s.name] != want && !slices.Contains(expected.flaky, s.name) {
						t.Errorf("%s: passes: %v, expected: %v\n%s", s.name, passed[s.name], want, r.explain())
					}
					assert.NilError(t, os.RemoveAll(dir))
				}
				results.add(name, passed, expected)
			})
		}
	})
	for _, oracle := range harness.OracleNames() {
		if out, err := exec.Command(wrappers[oracle], "list", "-q").Output(); assert.Check(t, err) {
			for id := range strings.FieldsSeq(string(out)) {
				out, err := exec.Command(wrappers[oracle], "delete", "--force", id).CombinedOutput()
				assert.Check(t, err, "%s", out)
			}
		}
	}
	// Parents of cgroups stay, and cgroups of containers that could not be made.
	for _, name := range []string{"cgrouptest", "testdir"} {
		assert.Check(t, harness.RemoveCgroups(name))
	}
}

// expectedOf is what the table of imperfect programs has for one, or that it passes everywhere.
func expectedOf(name string) program {
	if i := slices.IndexFunc(imperfect, func(p program) bool { return p.name == name }); i >= 0 {
		return imperfect[i]
	}
	return program{name: name, passes: append(harness.OracleNames(), runvName)}
}

// programNames are those that the tools' go.mod lists.
func programNames(t *testing.T) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(harness.TreeRoot(), toolsDir, "go.mod"))
	assert.NilError(t, err)
	var names []string
	for _, m := range regexp.MustCompile(`(?m)/validation/(\w+)$`).FindAllStringSubmatch(string(data), -1) {
		names = append(names, m[1])
	}
	return names
}

// moduleDir is where the tools' source is, with the root file system that they unpack.
func moduleDir(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", toolsModule)
	cmd.Dir = filepath.Join(harness.TreeRoot(), toolsDir)
	out, err := cmd.Output()
	assert.NilError(t, err)
	return strings.TrimSpace(string(out))
}

// outcome is what a program wrote, in the form of the Test Anything Protocol.
type outcome struct {
	harness.Result
	ok, notOK int
}

var (
	okLine    = regexp.MustCompile(`(?m)^\s*ok [0-9]+`)
	notOKLine = regexp.MustCompile(`(?m)^\s*not ok [0-9]+.*`)
	errorLine = regexp.MustCompile(`(?m)^\s*"error": `)
)

func newOutcome(r harness.Result) outcome {
	return outcome{r, len(okLine.FindAllString(r.Stdout, -1)), len(notOKLine.FindAllString(r.Stdout, -1))}
}

// passed tells whether nothing failed. Some programs count no tests and tell of an error only.
func (o outcome) passed() bool {
	return o.Code == 0 && o.notOK == 0 && (o.ok > 0 || !errorLine.MatchString(o.Stdout))
}

func (o outcome) explain() string {
	failed := notOKLine.FindAllString(o.Stdout, 10)
	text := fmt.Sprintf("exit status %d after %v, %d ok, not ok: %q\nstderr: %s", o.Code, o.Took.Round(time.Millisecond), o.ok, failed, o.Stderr)
	if dir := os.Getenv("CONFORMANCE_OUT"); dir != "" || o.ok < 10 {
		text += "\nstdout: " + o.Stdout
	}
	return text
}

// runProgram runs a program in dir, its bundles included, and kills it with its children when it
// takes too long. It has a mount namespace of its own if unshare: without one for the container
// runc mounts in its caller's.
func runProgram(t *testing.T, path, dir, runtime string, unshare bool) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "RUNTIME="+runtime, "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if unshare {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var stdout, stderr bytes.Buffer
	cmd.WaitDelay = time.Second // containers may hold its output
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	r := harness.Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: harness.ExitCode(err), Took: time.Since(began)}
	return newOutcome(r)
}

func TestOutcome(t *testing.T) {
	for text, want := range map[string]bool{
		"TAP version 13\nok 1 - a\nok 2 - b # SKIP x\n1..2\n":         true,
		"TAP version 13\nok 1 - a\nnot ok 2 - b\n1..2\n":              false,
		"TAP version 13\n  ---\n  {\n    \"error\": \"x\"\n  }\n1..0": false,
		"ok 1 - a\n  {\n    \"error\": \"as it must\"\n  }\n1..1":     true,
		"": true,
	} {
		assert.Equal(t, newOutcome(harness.Result{Stdout: text}).passed(), want, text)
	}
	assert.Assert(t, !newOutcome(harness.Result{Stdout: "ok 1 - a\n", Code: 1}).passed())
}
