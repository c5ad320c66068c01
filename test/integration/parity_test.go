package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// acceptedCLI are the differences between the runcs' command lines and ours that stay, by test and step
// of its session, each with its reason. A step that is followed by "@" and an oracle's name differs from that one only.
// A difference that is not here fails the test, and so does one that is here and has gone.
var acceptedCLI = map[string]map[string]string{
	"TestCommandLineParity": {
		"exec box nosuch":                     "127, the status that callers make of the text; runc's is 255 for all",
		"exec box /nosuch":                    "127, as above",
		"exec box /plain":                     "126, for a program that is there and cannot be executed",
		"exec box /tmp":                       `126; "is a directory", as runc says since 1.2`,
		"exec --apparmor x box true":          "the flag is refused by name, with the same status",
		"exec --process-label x box true":     "the flag is refused by name, with the same status",
		"exec --cwd rel box true":             "the text names the field, with the same status",
		"exec --user x box true":              "the text names the flag, with the same status",
		"exec --cap CAP_FLY box true":         "the warning names the field",
		"exec --preserve-fds 1 box true":      "open files cannot be passed into a VM",
		"exec --cgroup nosuch box true":       "the text names no path of the guest, with the same status",
		"exec --cgroup .. box true":           "the text names the flag, with the same status",
		"exec --cgroup /.. box true":          "as above",
		"exec --cgroup nosuch/../.. box true": "as above",
		"exec --cgroup ../box/box box true":   "as above",
		"exec box":                            "the same in other words",
		"exec -d -t box true":                 `says "runv"`,
		"exec --console-socket x box true":    `says "runv"`,
		"kill box 99":                         "the number is judged before anybody is asked, with the same status",
		"kill box SIGRTMIN+3":                 "runc knows no names of real-time signals; a number does it there",
		"list --format xx":                    "the text names the flag, with the same status",
		"list --format json":                  "annotations dev.runv.*",
		"state box":                           "annotations dev.runv.*, the owner",
		"events --interval 0s --stats box":    "the text names the flag, with the same status",
		"pause box again":                     "tells the state, too",
		"ps box":                              "pids of the guest",
		"spec --rootless":                     "runv needs root",
		"checkpoint box":                      "refused by name",
		"restore box":                         "refused by name",
		"--log-format xx list":                "the text names the flag, with the same status",
		"--rootless true list -q":             "runv needs root",
		"--root nosuch list -q@runc-new":      "the new one wants the directory to be there",
		"nosuchcommand":                       "status 1, for all usage errors; runc's is 3 for this one",
		"run":                                 "one line instead of the help, with the same status",
		"run a b":                             "one line instead of the help, with the same status",
		"--nosuchflag":                        "one line instead of the help, with the same status",
		"create a/b":                          "the text says what is wrong, with the same status",
		"run with an empty id":                "the text says what is wrong, with the same status",
	},
	"TestRefusedRunsParity": {
		"run with unknown capability":      "the warning names the field",
		"run with selinuxLabel":            "the text names the field, with the same status",
		"run with apparmorProfile":         "the text names the field, with the same status",
		"run with mountLabel":              "the text names the field, with the same status",
		"run with bad rlimit":              "the text names the field, with the same status",
		"run with unknown rlimit":          "the text names the field, with the same status",
		"run with a variable that is none": "the text names the field, with the same status",
	},
}

// commandLine is one of the command lines that are compared.
type commandLine struct {
	name    string
	command func(args ...string) *exec.Cmd
}

// runtimes are the oracles, the older first, and runv as the last. The oracles' containers "box", "web" and "sandbox" have in
// truth ids that nobody else's have, since their cgroups can be at the root of a hierarchy.
func runtimes(e *harness.Env) []commandLine {
	var all []commandLine
	for _, r := range e.Runcs() {
		all = append(all, commandLine{r.Name, func(args ...string) *exec.Cmd {
			own := slices.Clone(args)
			for i, arg := range own {
				if slices.Contains([]string{"box", "web", "sandbox"}, arg) {
					own[i] += ownSuffix(r.Name)
				}
			}
			return r.Command(own...)
		}})
	}
	return append(all, commandLine{"runv", e.Command})
}

// ownSuffix makes ids of an oracle that no other oracle and no other test process has.
func ownSuffix(oracle string) string { return fmt.Sprintf("-%s-%d", oracle, os.Getpid()) }

// answer is what callers see of a command.
type answer struct {
	Code   int
	Stdout string
	Text   string // of the error
}

var (
	logrusMessage = regexp.MustCompile(`(?m)^time="[^"]*" level=(?:error|warning) msg="((?:[^"\\]|\\.)*)"`)
	runcRetries   = regexp.MustCompile(`(?m)^time="[^"]*" level=warning msg="Failed to remove cgroup \(will retry\)".*\n`)
	// What both say before the cause: the phase.
	saidFirst = regexp.MustCompile(`^(runv: )?(warning: )?(runc )?[a-z]+( [a-z0-9]+)?( failed)?: (create [a-z0-9]+: )?(unable to start container process: )?(error during container init: )?`)
	pids      = regexp.MustCompile(`"pid":[1-9][0-9]*`)
	created   = regexp.MustCompile(`"created":"[^"]*"`)
)

// answerOf is what callers see of how a command ended.
func answerOf(r harness.Result) answer {
	r.Stderr = runcRetries.ReplaceAllString(r.Stderr, "") // busy machines make runc tell of its patience
	text := strings.TrimSpace(r.Stderr)
	if m := logrusMessage.FindStringSubmatch(r.Stderr); m != nil {
		text = strings.NewReplacer(`\"`, `"`, `\n`, "\n").Replace(m[1])
	}
	return answer{Code: r.Code, Stdout: r.Stdout, Text: saidFirst.ReplaceAllString(text, "")}
}

// normalJSON drops what differs between any two runs.
func (a answer) normalJSON() answer {
	if !strings.HasPrefix(a.Stdout, "{") && !strings.HasPrefix(a.Stdout, "[") {
		return a
	}
	var v any
	if json.Unmarshal([]byte(a.Stdout), &v) != nil {
		return a
	}
	data, _ := json.Marshal(v)
	a.Stdout = created.ReplaceAllString(pids.ReplaceAllString(string(data), `"pid":N`), `"created":T`)
	return a
}

// step is one command of a session; name is its key in the table above.
type step struct {
	name string
	args []string
}

// cmds makes steps that are named as they are written, one a line.
func cmds(lines string) (steps []step) {
	for line := range strings.Lines(lines) {
		if line = strings.TrimSpace(line); line != "" {
			steps = append(steps, step{line, strings.Fields(line)})
		}
	}
	return steps
}

// session is a conversation with one of the command lines.
type session struct {
	commandLine
	t       *testing.T
	dir     string // where its commands run; of the same path for all
	names   []string
	answers []answer
}

// do runs steps and keeps the answers.
func (s *session) do(steps []step) {
	s.t.Helper()
	for _, step := range steps {
		cmd := s.command(step.args...)
		cmd.Dir = s.dir
		r := harness.Finish(cmd)
		for _, text := range []*string{&r.Stdout, &r.Stderr} {
			*text = strings.ReplaceAll(*text, ownSuffix(s.name), "")
		}
		s.names = append(s.names, step.name)
		s.answers = append(s.answers, answerOf(r).normalJSON())
	}
}

// ok runs a command that must succeed and is not compared.
func (s *session) ok(args ...string) {
	s.t.Helper()
	r := harness.Finish(s.command(args...))
	assert.Equal(s.t, r.Code, 0, "%s %v: %s", s.name, args, r.Stderr)
}

// await waits until a container has stopped.
func (s *session) awaitStopped(id string) {
	s.t.Helper()
	harness.Eventually(s.t, s.name+"'s has stopped", func() bool {
		out, _ := s.command("state", id).Output()
		return strings.Contains(string(out), `"stopped"`)
	})
}

// compareSessions has the same conversation with all runtimes, one after the other so that none is in another's way, and holds
// the differences between each oracle and runv against the table.
func compareSessions(t *testing.T, e *harness.Env, converse func(*session)) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "here")
	var all []*session
	for _, rt := range runtimes(e) {
		assert.NilError(t, os.Mkdir(dir, 0o755))
		s := &session{commandLine: rt, t: t, dir: dir}
		converse(s)
		assert.NilError(t, os.RemoveAll(dir))
		all = append(all, s)
	}
	seen := map[string][]string{} // by step: the oracles from which runv differs
	ours := all[len(all)-1]
	for _, theirs := range all[:len(all)-1] {
		assert.DeepEqual(t, theirs.names, ours.names)
		for i, a := range theirs.answers {
			b, name := ours.answers[i], ours.names[i]
			if a == b {
				continue
			}
			if !slices.Contains(seen[name], theirs.name) {
				seen[name] = append(seen[name], theirs.name)
			}
			table := acceptedCLI[t.Name()]
			if table[name] == "" && table[name+"@"+theirs.name] == "" {
				t.Errorf("%s:\n%s: %+v\nrunv: %+v", name, theirs.name, a, b)
			}
		}
	}
	for key := range acceptedCLI[t.Name()] {
		name, only, _ := strings.Cut(key, "@")
		for _, oracle := range harness.OracleNames() {
			if only == "" || only == oracle {
				assert.Check(t, slices.Contains(seen[name], oracle), "%s: no difference from %s any more; change the table", name, oracle)
			}
		}
	}
}

// TestCommandLineParity is a session of all commands under both runcs and under runv.
func TestCommandLineParity(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sleep", "1000"})
	assert.NilError(t, os.WriteFile(filepath.Join(bundle, "rootfs", "plain"), []byte("no program"), 0o644))
	process := filepath.Join(e.Dir, "process.json")
	assert.NilError(t, os.WriteFile(process, []byte(`{"args":["grep","-E","Cap|NoNew","/proc/self/status"],"cwd":"/","env":["PATH=/bin"]}`), 0o600))
	sh := func(name, script string, flags ...string) step {
		return step{name, append(append([]string{"exec"}, flags...), "box", "sh", "-c", script)}
	}

	steps := []step{{"run -d box", []string{"run", "-d", "--bundle", bundle, "box"}}}
	steps = append(steps, cmds(`
		exec box true
		exec box nosuch
		exec box /nosuch
		exec box /plain
		exec box /tmp
		exec box
		exec nobox true
		exec --cwd /nosuch box true
		exec --cwd /plain box true
		exec --cwd rel box true
		exec --cwd /tmp box pwd
		exec --user 1000:2000 box id
		exec --user 1000 box id
		exec -u 1000:1000 -g 5 -g 7 box id
		exec --user x box true
		exec --apparmor x box true
		exec --process-label x box true
		exec --cgroup nosuch box true
		exec --cgroup / box true
		exec --cgroup nosuch/.. box true
		exec --cgroup .. box true
		exec --cgroup /.. box true
		exec --cgroup nosuch/../.. box true
		exec --cgroup ../box/box box true
		exec --cap CAP_FLY box true
		exec --cap CAP_SYS_ADMIN --cap CAP_NET_RAW box grep Cap /proc/self/status
		exec --no-new-privs box grep NoNewPrivs /proc/self/status
		exec --no-new-privs=false box grep NoNewPrivs /proc/self/status
		exec -e A=1 -e B=2 -e HOME=/x -e C= box env
		exec --preserve-fds 1 box true
		exec -d -t box true
		exec --console-socket x box true
		exec -- box echo -n
	`)...)
	steps = append(steps,
		sh("status above 255", "exit 300"),
		sh("killed by a signal", "kill -9 $$"),
		step{"exec --process", []string{"exec", "--process", process, "box"}},
		step{"exec --process and arguments", []string{"exec", "-p", process, "box", "echo", "x"}},
		sh("session and its leader", `set -- $(cat /proc/self/stat); echo $(($5 == $6)) tty $7`),
		step{"create box", []string{"create", "--bundle", bundle, "box"}},
	)
	steps = append(steps, cmds(`
		start box
		start nobox
		state nobox
		kill nobox
		delete nobox
		delete --force nobox
		pause nobox
		resume nobox
		ps nobox
		events --stats nobox
		resume box
		delete box
		kill box 0
		kill box sigwinch
		kill box SIGWINCH
		kill box winch
		kill box 28
		kill box NOSUCH
		kill box 99
		kill box SIGRTMIN+3
		state box
		list -q
		list --format json
		list --format xx
		events --interval 0s --stats box
		ps box
		pause box
	`)...)
	steps = append(steps, step{"pause box again", []string{"pause", "box"}})
	steps = append(steps, cmds(`
		start box
		exec box true
		delete box
		kill box TERM
		resume box
	`)...)
	steps = append(steps, sh("SIGTERM to an init that handles none", `kill -TERM 1; sleep 0.2; grep -c sleep /proc/1/cmdline`))
	steps = append(steps, cmds(`
		kill box KILL
	`)...)
	config := t.TempDir()
	compareSessions(t, e, func(s *session) {
		s.do(steps)
		s.awaitStopped("box") // its end is told by who waits for it, not by kill
		s.do(cmds(`
			kill box KILL
			kill --all box KILL
			exec box true
			start box
			pause box
			resume box
			ps --format table box
			events --stats box
			checkpoint box
			restore box
			delete box
			delete --force box
			state box2
			spec --rootless
			--log-format xx list
			--rootless true list -q
			--rootless false list -q
			--systemd-cgroup list -q
			--root nosuch list -q
			nosuchcommand
			run
			run a b
			--nosuchflag
			create a/b
		`))
		s.do([]step{{"run with an empty id", []string{"run", ""}}})
		dir := filepath.Join(config, s.name)
		assert.NilError(t, os.Mkdir(dir, 0o755))
		for want, code := range []int{0, 1} {
			r := harness.Finish(s.command("spec", "-b", dir))
			assert.Equal(t, r.Code, code, "%s spec %d: %s", s.name, want, r.Stderr)
		}
	})
}

// TestRefusedRunsParity starts what cannot start: nothing is left and the status is runc's.
func TestRefusedRunsParity(t *testing.T) {
	e := harness.New(t)
	run := func(name string, edit func(*specs.Spec)) step {
		bundle := e.Bundle([]string{"true"}, edit)
		return step{name, []string{"run", "--bundle", bundle, "web"}}
	}
	steps := []step{
		run("run with unknown capability", func(s *specs.Spec) {
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_FLY")
		}),
		run("run with selinuxLabel", func(s *specs.Spec) { s.Process.SelinuxLabel = "a:b:c:d" }),
		run("run with apparmorProfile", func(s *specs.Spec) { s.Process.ApparmorProfile = "docker-default" }),
		run("run with mountLabel", func(s *specs.Spec) { s.Linux.MountLabel = "a:b:c:d" }),
		run("run with bad rlimit", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 2, Hard: 1}}
		}),
		run("run with unknown rlimit", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_ODD", Soft: 1, Hard: 1}}
		}),
		run("run with a variable that is none", func(s *specs.Spec) { s.Process.Env = []string{"PATH=/bin", "NONE"} }),
	}
	compareSessions(t, e, func(s *session) { s.do(steps) })
	e.CheckNothingLeft()
}

// TestSignalsBeforeStart sends signals to a created container.
func TestSignalsBeforeStart(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", `
		trap "echo usr1" USR1; trap "echo rtmin+3" 37; trap "echo rtmax-1" 63; trap "echo term; exit 5" TERM
		echo ready; while :; do sleep 0.05; done`})
	compareSessions(t, e, func(s *session) {
		create := s.command("create", "--bundle", bundle, "web")
		out, err := os.Create(filepath.Join(e.Dir, s.name+".out"))
		assert.NilError(t, err)
		defer out.Close()
		create.Stdout = out
		r := harness.Finish(create)
		assert.Equal(t, r.Code, 0, r.Stderr)
		// These are lost, as is what a paused one gets: it is created again afterwards.
		s.do(cmds(`
			kill web USR1
			kill web WINCH
			kill web 37
			pause web
			start web
			resume web
			kill web 0
			start web
		`))
		sees := func(text string) {
			t.Helper()
			harness.Eventually(t, s.name+" has written "+text, func() bool {
				data, err := os.ReadFile(out.Name())
				return err == nil && strings.HasSuffix(string(data), text+"\n")
			})
		}
		sees("ready")
		for _, signal := range []struct{ theirs, ours, want string }{
			{"SIGUSR1", "usr1", "usr1"},
			{"37", "SIGRTMIN+3", "rtmin+3"},
			{"63", "RTMAX-1", "rtmax-1"},
			{"37", "rtmin+3", "rtmin+3"},
			{"TERM", "sigterm", "term"},
		} {
			name := signal.theirs
			if s.name == "runv" {
				name = signal.ours
			}
			s.ok("kill", "web", name)
			sees(signal.want)
		}
		data, err := os.ReadFile(out.Name())
		assert.NilError(t, err)
		assert.Equal(t, string(data), "ready\nusr1\nrtmin+3\nrtmax-1\nrtmin+3\nterm\n")
		s.ok("delete", "--force", "web")
		s.ok("create", "--bundle", bundle, "web")
		s.ok("kill", "web", "TERM")
		s.awaitStopped("web")
		s.do(cmds(`
			start web
			kill web TERM
			delete web
		`))
	})
}

// TestFlagsOfRunc asks for help, of the runcs and of ours: whatever flag one of them has, runv has too.
func TestFlagsOfRunc(t *testing.T) {
	e := harness.New(t)
	all := runtimes(e)
	ours := all[len(all)-1]
	flagLine := regexp.MustCompile(`(?m)^\s+((?:-{1,2}[a-z-]+(?: value)?(?:, )?)+)`)
	flag := regexp.MustCompile(`-{1,2}[a-z][a-z-]*`)
	flags := func(rt commandLine, args ...string) (all []string) {
		out, err := rt.command(append(args, "--help")...).Output()
		assert.NilError(t, err, "%s %v", rt.name, args)
		for _, m := range flagLine.FindAllStringSubmatch(string(out), -1) {
			all = append(all, flag.FindAllString(m[1], -1)...)
		}
		return all
	}
	// Those that help does not show are refused by name.
	hidden := map[string]string{
		"--criu":                   "without effect since runc 1.1, too",
		"exec --apparmor":          "refused by name",
		"exec --process-label":     "refused by name",
		"spec --rootless":          "refused by name",
		"update --l3-cache-schema": "refused by name",
		"update --mem-bw-schema":   "refused by name",
	}
	for _, command := range []string{
		"", "create", "delete", "events", "exec", "kill", "list", "pause", "ps", "resume", "run", "spec", "start", "state", "features", "update",
	} {
		args := strings.Fields(command)
		has := flags(ours, args...)
		for _, theirs := range all[:len(all)-1] {
			for _, f := range flags(theirs, args...) {
				name := strings.TrimSpace(command + " " + f)
				if _, ok := hidden[name]; ok || slices.Contains(has, f) {
					continue
				}
				t.Errorf("%s has %s, and runv has not", theirs.name, name)
			}
		}
	}
}

// TestProcessesParity looks at what is left of processes: orphans, zombies, terminals.
func TestProcessesParity(t *testing.T) {
	e := harness.New(t)
	all := runtimes(e)
	bundle := e.Bundle([]string{"sleep", "1000"})
	for _, rt := range all {
		r := harness.Finish(rt.command("run", "-d", "--bundle", bundle, "box"))
		assert.Equal(t, r.Code, 0, "%s: %s", rt.name, r.Stderr)
	}
	same := func(t *testing.T, script string) {
		t.Helper()
		var out []harness.Result
		for _, rt := range all {
			out = append(out, harness.Finish(rt.command("exec", "box", "sh", "-c", script)))
		}
		for i, rt := range all[1:] {
			assert.Equal(t, out[i+1].Stdout, out[0].Stdout, rt.name)
			assert.Equal(t, out[i+1].Code, out[0].Code, rt.name)
		}
		t.Logf("all: %q", out[0].Stdout)
	}
	t.Run("an orphan is init's child", func(t *testing.T) {
		same(t, `(sleep 1111 </dev/null >/dev/null 2>&1 &); sleep 0.3
			for p in /proc/[0-9]*; do read -r s < $p/stat 2>/dev/null; case "$s" in *"(sleep) "*) set -- $s; [ $1 = 1 ] || echo parent $4;; esac; done | grep -v "parent $$"`)
	})
	t.Run("an orphan that has ended is a zombie of an init that does not reap", func(t *testing.T) {
		same(t, `(sleep 0.1 </dev/null >/dev/null 2>&1 &); sleep 0.6
			for p in /proc/[0-9]*; do read -r s < $p/stat 2>/dev/null; case "$s" in *"(sleep) Z"*) set -- $s; echo zombie of $4;; esac; done`)
	})
	t.Run("the terminal is the user's", func(t *testing.T) {
		var shown []string
		for _, rt := range all {
			pty, slave := openTerminal(t, 81, 25)
			cmd := rt.command("exec", "-t", "--user", "1000:1000", "box", "sh", "-c", `stat -c "%u:%g %a" $(tty); ls -l /proc/self/fd | wc -l; set -- $(cat /proc/self/stat); echo leads $(($5 == $6)); stty size; echo done`)
			startInTerminal(t, cmd, slave)
			s := newScreen(pty)
			s.await(t, "done\r\n")
			assert.Equal(t, harness.ExitCode(cmd.Wait()), 0)
			shown = append(shown, string(s.past))
		}
		for i, rt := range all[1:] {
			assert.Equal(t, shown[i+1], shown[0], rt.name)
		}
		t.Logf("all: %q", shown[0])
	})
	t.Run("exec --ignore-paused waits for the end of the pause", func(t *testing.T) {
		for _, rt := range all {
			assert.NilError(t, rt.command("pause", "box").Run())
			cmd := rt.command("exec", "--ignore-paused", "box", "echo", "resumed")
			stdout, err := cmd.StdoutPipe()
			assert.NilError(t, err)
			assert.NilError(t, cmd.Start())
			ended := make(chan string, 1)
			go func() {
				data, _ := io.ReadAll(stdout)
				ended <- string(data)
			}()
			select {
			case out := <-ended:
				t.Errorf("%s ran it in a paused container: %q", rt.name, out)
			case <-time.After(time.Second):
			}
			assert.NilError(t, rt.command("resume", "box").Run())
			assert.Equal(t, <-ended, "resumed\n")
			assert.NilError(t, cmd.Wait())
		}
	})
	t.Run("init's end is that of all", func(t *testing.T) {
		for _, rt := range all {
			cmd := rt.command("exec", "box", "sleep", "1000")
			assert.NilError(t, cmd.Start())
			harness.Eventually(t, "sleep runs", func() bool {
				out, _ := rt.command("exec", "box", "pidof", "sleep").Output()
				return len(strings.Fields(string(out))) >= 3
			})
			assert.NilError(t, rt.command("kill", "box", "KILL").Run())
			assert.Equal(t, harness.ExitCode(cmd.Wait()), 128+int(syscall.SIGKILL))
		}
	})
}
