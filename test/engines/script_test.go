package engines

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"runv/test/compare"
	"runv/test/harness"
)

// A check is a script of shell commands, which all runtimes get.
type check struct {
	name   string
	about  string        // what it covers, for the document
	only   string        // docker or podman; both if empty
	short  string        // the engines with which it is part of make test
	alone  bool          // not beside other checks, for it disturbs them
	harms  bool          // runc would change the host by it, so only runv gets it: each line has to succeed and to say nothing
	limit  time.Duration // of a line; harness.Timeout if 0
	image  bool          // it needs the image systemd
	script string        // one command a line; for Podman "docker" is read as "podman"
}

// lib are the functions that scripts have beside the engine's commands.
const lib = `
# await COMMAND...: until it succeeds, for a minute at most
await() { n=0; until "$@" >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 600 ] || { echo "did not happen: $*"; return 1; }; sleep 0.1; done; }
# says TEXT COMMAND...: whether its output has the text
says() { text=$1; shift; "$@" 2>&1 | grep -qF -- "$text"; }
# quiet COMMAND...: its exit status only
quiet() { "$@" >/dev/null 2>&1; }
# field NAME FORMAT: what inspect tells of a container
field() { docker inspect --format "$2" "$1"; }
# is VALUE NAME FORMAT: whether inspect tells this
is() { [ "$(field "$2" "$3" 2>&1)" = "$1" ]; }
# fetch URL: over HTTP, once the server answers; each connection is a new one
fetch() { n=0; until timeout 10 busybox wget -q -O - "$1" 2>/dev/null; do n=$((n+1)); [ $n -lt 100 ] || return 1; sleep 0.1; done; }
`

// of tells whether the check is one of an engine's.
func (c check) of(engine string) bool { return c.only == "" || c.only == engine }

// lines are the commands of a check's script, as the engine has them.
func (c check) lines(engine string) []string {
	script := strings.ReplaceAll(c.script, "\\\n", "")
	if engine == "podman" {
		script = asPodman(script)
	}
	var lines []string
	for line := range strings.Lines(script) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

var dockerWord = regexp.MustCompile(`\bdocker\b`)

func asPodman(text string) string { return dockerWord.ReplaceAllString(text, "podman") }

// run runs a check's script line by line, whatever the lines' exit status, and returns what was seen.
func (e *engine) run(t testing.TB, c check) compare.Sections {
	t.Helper()
	dir := e.path("checks", c.name)
	assert.NilError(t, os.MkdirAll(dir, 0o755))
	prelude := lib
	if e.name == "podman" {
		prelude = asPodman(lib)
	}
	var seen compare.Sections
	for i, line := range c.lines(e.name) {
		name := section(i, line)
		if f := e.builtin[line]; f != nil {
			assert.NilError(t, f(), "%s", line)
			seen.Add(name)
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), cmp.Or(c.limit, harness.Timeout))
		cmd := e.command(ctx, "sh", "-c", prelude+line)
		cmd.Dir = dir
		r := harness.Finish(cmd)
		late := ctx.Err()
		cancel()
		assert.NilError(t, late, "%s\n%s%s", name, r.Stdout, r.Stderr)
		seen.Add(name)
		for _, text := range []struct{ prefix, text string }{{"", r.Stdout}, {"stderr: ", r.Stderr}} {
			for out := range strings.Lines(text.text) {
				if noise.MatchString(out) {
					continue
				}
				seen.Add(name, text.prefix+e.neutral(strings.TrimRight(out, "\r\n \t")))
			}
		}
		if r.Code != 0 {
			seen.Add(name, fmt.Sprintf("exit status %d", r.Code))
		}
		if testing.Verbose() {
			t.Logf("%s/%s %s (%.1f s)\n%s", e.name, e.runtime, name, r.Took.Seconds(), strings.Join(seen[len(seen)-1].Lines, "\n"))
		}
	}
	return seen
}

// section is the name of what is seen of a line.
func section(i int, line string) string { return fmt.Sprintf("%d: %s", i+1, line) }

// silence is what a check sees whose lines all succeed and say nothing.
func (c check) silence(engine string) compare.Sections {
	var seen compare.Sections
	for i, line := range c.lines(engine) {
		seen.Add(section(i, line))
	}
	return seen
}

// noise is what the engines' clients say or not, as it happens: it depends on which of two of their goroutines is first,
// or on how long a program takes to die.
var noise = regexp.MustCompile(`error waiting for container: context canceled|level=warning msg="StopSignal \w+ failed to stop|failed to connect to syslog`)

var varying = []struct {
	exp *regexp.Regexp
	by  string
}{
	{regexp.MustCompile(`\b[0-9a-f]{63,64}\b`), "ID"},
	{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "ID"},
	{regexp.MustCompile(`\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( [+-]\d{4} \w+|Z|[+-]\d\d:\d\d)?`), "TIME"},
	{regexp.MustCompile(`\b(\d+ (second|minute)s?|Less than a second|About a minute)( ago)?`), "TIME"},
	{regexp.MustCompile(`/proc/\d+/`), "/proc/PID/"},
	{regexp.MustCompile(`\b[\d.]+ seconds, [\d.]+[KMG]?B/s`), "TIME"}, // of dd
	// Both say which step failed, and then the same cause.
	{regexp.MustCompile(`(OCI runtime \w+ failed: )(?:runc create failed: |exec failed: )unable to start container process: `), "$1"},
	{regexp.MustCompile(`(OCI runtime \w+ failed: )(?:create|exec) ID: `), "$1"},
	{regexp.MustCompile(`(Error: (?:OCI runtime error: )?)runc-(?:old|new): (?:runc create failed: |exec failed: )unable to start container process: `), "${1}"},
	{regexp.MustCompile(`(Error: (?:OCI runtime error: )?)runv: runv: (?:create|exec) ID: `), "${1}"},
}

// neutral replaces what differs between two runs of a command.
func (e *engine) neutral(line string) string {
	line = strings.ReplaceAll(line, e.dir, "DIR")
	for _, v := range varying {
		line = v.exp.ReplaceAllString(line, v.by)
	}
	return line
}
