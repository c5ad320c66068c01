package conformance

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// try runs a command and notes, under the state that the container is in, how it ends.
func (t *trial) try(state string, args ...string) harness.Result {
	r := t.do(args...)
	verb := strings.ReplaceAll(strings.Join(args, " "), t.id, "ID")
	t.Logf("%s, %s: %s: exit %d: %s", t.side.name, state, verb, r.Code, strings.TrimSpace(r.Stderr))
	t.record(state, verb+": "+ending(r))
	return r
}

// harmless are commands that leave a container as it is, in every state.
func (t *trial) harmless(state string) {
	id := t.id
	if state != "none" {
		t.try(state, "create", "--bundle", t.bundle, id)
		t.try(state, "run", "--bundle", t.bundle, id)
	}
	t.try(state, "kill", id, "0")
	t.try(state, "kill", id, "NOSUCH")
	t.try(state, "kill", id, "99")
	t.try(state, "ps", id)
	t.try(state, "ps", "--format", "json", id)
	t.try(state, "events", "--stats", id)
	r := t.try(state, "state", id)
	if r.Code == 0 {
		t.record(state, "status "+t.status(r))
	}
	for _, verb := range []string{"state", "start", "delete", "pause", "resume", "kill", "exec", "ps", "events", "create", "run"} {
		t.try(state, verb)
	}
}

func (t *trial) status(r harness.Result) string {
	var s specs.State
	assert.Check(t, json.Unmarshal([]byte(r.Stdout), &s))
	if s.Pid > 0 {
		return string(s.Status) + ", with a pid"
	}
	return string(s.Status) + ", without a pid"
}

// verbs tries every command in every state of a container.
func verbs(t *trial) {
	id := t.id
	// changing are those that go on to another state where they are allowed.
	changing := func(state string, verbs ...string) {
		for _, verb := range verbs {
			args := strings.Fields(verb)
			if args[0] == "exec" || args[0] == "kill" {
				args = append([]string{args[0], id}, args[1:]...)
			} else {
				args = append(args, id)
			}
			t.try(state, args...)
		}
	}
	t.harmless("none")
	changing("none", "start", "pause", "resume", "exec true", "kill KILL", "delete", "delete --force")

	t.try("creation", "create", "--bundle", t.bundle, id)
	t.harmless("created")
	changing("created", "resume", "exec true", "exec nosuch", "pause", "resume")
	t.try("start", "start", id)
	t.harmless("running")
	changing("running", "start", "resume", "delete", "exec true", "exec nosuch", "exec /etc/passwd", "exec /etc", "kill TERM")
	t.try("pausing", "pause", id)
	t.harmless("paused")
	changing("paused", "start", "pause", "exec true", "delete")
	t.try("resuming", "resume", id)
	t.try("killing", "kill", id, "KILL")
	t.awaitStatus("stopped")
	t.harmless("stopped")
	changing("stopped", "start", "pause", "resume", "exec true", "kill KILL", "kill TERM", "delete", "delete", "delete --force")

	t.try("created again", "create", "--bundle", t.bundle, id)
	changing("created again", "kill KILL")
	t.awaitStatus("stopped")
	changing("killed before the start", "start", "exec true", "delete")
	t.try("created and deleted", "create", "--bundle", t.bundle, id)
	changing("created and deleted", "delete", "state")
	t.remove()
}

// endings are programs that end in all ways, as init and as added processes.
func endings(t *trial) {
	assert.NilError(t, os.Chmod(filepath.Join(t.bundle, "rootfs", "etc", "passwd"), 0o644))
	t.rootfs("bin/noformat", "no program")
	assert.NilError(t, os.Chmod(filepath.Join(t.bundle, "rootfs", "bin", "noformat"), 0o755))
	t.rootfs("bin/nointerpreter", "#!/nosuch\n")
	assert.NilError(t, os.Chmod(filepath.Join(t.bundle, "rootfs", "bin", "nointerpreter"), 0o755))
	programs := [][]string{
		{"true"},
		{"sh", "-c", "exit 3"},
		{"sh", "-c", "exit 255"},
		{"sh", "-c", "kill -TERM $$; sleep 10"},
		{"sh", "-c", "kill -KILL $$; sleep 10"},
		{"sh", "-c", "kill -SEGV $$; sleep 10"},
		{"sh", "-c", "echo out; echo err >&2; exit 7"},
		{"nosuch"},
		{"/nosuch"},
		{"bin/true"},
		{"./bin/nosuch"},
		{"/etc/passwd"},
		{"/etc"},
		{"/bin/noformat"},
		{"/bin/nointerpreter"},
		{""},
	}
	r := t.do("run", "--detach", "--bundle", t.bundle, t.id)
	t.recordEnd("run", r)
	for i, args := range programs {
		r := t.do(append([]string{"exec", t.id}, args...)...)
		name := fmt.Sprintf("exec %d %q", i, args)
		t.recordEnd(name, r)
		t.record(name, "stdout "+r.Stdout)
	}
	t.remove()
}

// inits are some of the same as PID 1, for which signals differ.
func inits(t *trial) {
	for i, args := range [][]string{
		{"sh", "-c", "echo out; echo err >&2; exit 7"},
		{"sh", "-c", "kill -TERM $$; exit 8"},
		{"nosuch"},
		{"/etc"},
		{"/bin/nointerpreter"},
	} {
		bundle := t.newBundle(fmt.Sprintf("bundle%d", i), func(t *trial, s *specs.Spec) {
			s.Process.Args = args
			path := filepath.Join(t.dir, fmt.Sprintf("bundle%d", i), "rootfs", "bin", "nointerpreter")
			assert.NilError(t, os.WriteFile(path, []byte("#!/nosuch\n"), 0o755))
		})
		r := t.do("run", "--bundle", bundle, t.id)
		name := fmt.Sprintf("run %q", args)
		t.recordEnd(name, r)
		t.record(name, "stdout "+r.Stdout)
		t.record(name, "left: "+ending(t.do("state", t.id)))
		t.remove()
	}
}

// refusals are configurations that cannot work. Only that they fail is compared, not the words.
func refusals(t *trial) {
	cases := []struct {
		name string
		edit func(*specs.Spec)
	}{
		{"no args", func(s *specs.Spec) { s.Process.Args = nil }},
		{"no cwd", func(s *specs.Spec) { s.Process.Cwd = "" }},
		{"relative cwd", func(s *specs.Spec) { s.Process.Cwd = "tmp" }},
		{"no process", func(s *specs.Spec) { s.Process = nil }},
		{"no root", func(s *specs.Spec) { s.Root = nil }},
		{"missing rootfs", func(s *specs.Spec) { s.Root.Path = "nowhere" }},
		{"empty ociVersion", func(s *specs.Spec) { s.Version = "" }},
		{"odd ociVersion", func(s *specs.Spec) { s.Version = "one" }},
		{"unknown rlimit", func(s *specs.Spec) { s.Process.Rlimits[0].Type = "RLIMIT_FUN" }},
		{"soft above hard", func(s *specs.Spec) { s.Process.Rlimits[0].Soft = s.Process.Rlimits[0].Hard + 1 }},
		{"hostname without uts", func(s *specs.Spec) { s.Linux.Namespaces = without(s.Linux.Namespaces, specs.UTSNamespace) }},
		{"unknown namespace", func(s *specs.Spec) { s.Linux.Namespaces[0].Type = "fun" }},
		{"namespace twice", func(s *specs.Spec) { s.Linux.Namespaces = append(s.Linux.Namespaces, s.Linux.Namespaces[0]) }},
		{"sysctl of the host", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.panic": "1"} }},
		{"sysctl of the hostname", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.hostname": "x"} }},
		{"network sysctl without a network", func(s *specs.Spec) {
			s.Linux.Namespaces = without(s.Linux.Namespaces, specs.NetworkNamespace)
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
		}},
		{"unknown propagation", func(s *specs.Spec) { s.Linux.RootfsPropagation = "fun" }},
		{"missing bind source", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such", Options: []string{"bind"}})
		}},
		{"unknown file system", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "funfs", Source: "fun"})
		}},
		{"bad mount data", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=fun"}})
		}},
		{"unknown device type", func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "z", Major: 1, Minor: 3}}
		}},
		{"unknown seccomp action", func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_FUN"} }},
		{"unknown seccomp architecture", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_FUN"}}
		}},
		{"seccomp argument 6", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{
				Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}},
			}}}
		}},
		{"hook that is missing", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/no/such"}}}
		}},
		{"hook that fails", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}}
		}},
		{"oomScoreAdj out of range", func(s *specs.Spec) { s.Process.OOMScoreAdj = new(1001) }},
		{"root that is a link to the outside", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/../../x", Type: "proc", Source: "proc"})
		}},
		{"unknown capability", func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_FUN"} }},
		{"empty environment variable", func(s *specs.Spec) { s.Process.Env = append(s.Process.Env, "") }},
		{"variable without a value", func(s *specs.Spec) { s.Process.Env = append(s.Process.Env, "NOVALUE") }},
	}
	for i, c := range cases {
		bundle := t.newBundle(fmt.Sprintf("bundle%d", i), func(_ *trial, s *specs.Spec) {
			s.Process.Args = []string{"true"}
			c.edit(s)
		})
		r := t.do("run", "--bundle", bundle, t.id)
		t.Logf("%s: %s: exit %d: %s", t.side.name, c.name, r.Code, strings.TrimSpace(r.Stderr))
		said := "nothing said"
		if complaint(r.Stderr) != "" {
			said = "an error said"
		}
		t.record("run", fmt.Sprintf("%s: exit %d, %s", c.name, r.Code, said))
		t.record("run", c.name+": left: "+ending(t.do("state", t.id)))
		t.remove()
	}
	for _, id := range []string{"", ".", "..", "a/b", "a b", "-a", strings.Repeat("a", 1025), "ä", "a+b_c-d.e"} {
		r := t.do("create", "--bundle", t.bundle, "--", id)
		short := id[:min(len(id), 20)]
		t.Logf("%s: %q: exit %d: %s", t.side.name, short, r.Code, strings.TrimSpace(r.Stderr))
		t.record("id", fmt.Sprintf("%q: exit %d", short, r.Code))
		if r.Code == 0 {
			r := t.do("delete", "--force", "--", id)
			assert.Check(t, r.Code == 0, "%s delete --force %s: %s", t.side.name, id, r.Stderr)
		}
	}
}

// documents compares what commands print.
func documents(t *trial) {
	neutral := func(path string, v any) string {
		name := path[strings.LastIndexByte(path, '.')+1:]
		if i := strings.Index(path, "dev.runv."); i >= 0 {
			name = path[i:]
		}
		switch name {
		case "dev.runv.phases", "dev.runv.exited", "dev.runv.pod":
			return "TEXT"
		case "pid":
			if n, ok := v.(json.Number); ok && n != "0" {
				return "PID"
			}
		case "created":
			if s, ok := v.(string); ok {
				if _, err := time.Parse(time.RFC3339Nano, s); err == nil {
					return "TIME"
				}
			}
		}
		return fmt.Sprintf("%#v", v)
	}
	// It lists all that there is.
	own := *t.side
	own.root = filepath.Join(t.dir, "root")
	own.argv = []string{own.argv[0], "--root", own.root}
	t.side = &own
	kinds := func(_ string, v any) string { return fmt.Sprintf("%T", v) }
	for _, step := range [][]string{
		{"create", "--bundle", t.bundle, t.id}, {"start", t.id}, {"pause", t.id}, {"resume", t.id}, {"kill", t.id, "KILL"},
	} {
		t.recordEnd(step[0], t.do(step...))
		if step[0] == "kill" {
			t.awaitStatus("stopped")
		}
		t.record("state after "+step[0], flatten(t, t.do("state", t.id).Stdout, neutral)...)
		t.record("list after "+step[0], flatten(t, t.do("list", "-f", "json").Stdout, neutral)...)
		for line := range strings.SplitSeq(t.do("list").Stdout, "\n") {
			fields := strings.Fields(line)
			if len(fields) > 4 && fields[0] == t.id {
				line = fmt.Sprintf("ID with a pid: %v, %s %s", fields[1] != "0", fields[2], fields[3])
			}
			t.record("table after "+step[0], strings.Join(strings.Fields(line), " "))
		}
		t.record("ids after "+step[0], t.do("list", "-q").Stdout)
		if step[0] == "start" {
			t.record("stats", flatten(t, t.do("events", "--stats", t.id).Stdout, kinds)...)
			r := t.do("ps", t.id)
			lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
			t.record("ps", lines[0], fmt.Sprint(len(lines), " lines"))
			t.record("ps", flatten(t, t.do("ps", "-f", "json", t.id).Stdout, kinds)...)
			r = t.do("ps", t.id, "-o", "comm,args")
			t.record("ps", strings.Split(r.Stdout, "\n")...)
		}
	}
	t.remove()
	t.record("list of none", t.do("list").Stdout, t.do("list", "-q").Stdout, t.do("list", "-f", "json").Stdout)
	t.record("list odd", ending(t.do("list", "-f", "odd")))
	r := t.do("spec", "--bundle", t.file("spec/x", "")[:len(t.dir)+len("/spec")])
	t.recordEnd("spec", r)
	data, err := os.ReadFile(filepath.Join(t.dir, "spec", "config.json"))
	assert.Check(t, err)
	t.record("spec", flatten(t, string(data), func(_ string, v any) string { return fmt.Sprintf("%#v", v) })...)
	t.record("spec again", ending(t.do("spec", "--bundle", filepath.Join(t.dir, "spec"))))
}

// terminals run the probe with a terminal that the runtime hands over.
func terminals(t *trial) {
	screen := t.withConsole("run", "run", "--detach", "--bundle", t.bundle, t.id)
	t.recordProbe("run.", screen)
	t.remove()
	t.record("without a socket", ending(t.do("run", "--detach", "--bundle", t.bundle, t.id)))
	t.remove()
	plain := t.newBundle("plain", nil)
	t.record("socket without a terminal", ending(t.do("run", "--detach", "--console-socket", "/nosuch", "--bundle", plain, t.id)))
	t.remove()
	t.record("socket that is missing", ending(t.do("run", "--detach", "--console-socket", "/nosuch", "--bundle", t.bundle, t.id)))
	t.remove()
}

// withConsole runs a command with a console socket and returns what the terminal shows until its end.
func (t *trial) withConsole(name string, args ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "console") // a socket's path must be short
	assert.NilError(t, err)
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	assert.NilError(t, err)
	defer l.Close()
	text := make(chan string, 1)
	go func() { text <- showConsole(l) }()
	r := t.do(append([]string{args[0], "--console-socket", path}, args[1:]...)...)
	t.recordEnd(name, r)
	if r.Code != 0 {
		return ""
	}
	select {
	case s := <-text:
		return s
	case <-time.After(time.Minute):
		return "the terminal does not end"
	}
}

// showConsole receives a terminal from a socket and reads it until its end.
func showConsole(l *net.UnixListener) string {
	_ = l.SetDeadline(time.Now().Add(time.Minute))
	conn, err := l.AcceptUnix()
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return err.Error()
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return "no terminal sent"
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return "no terminal sent"
	}
	master := os.NewFile(uintptr(fds[0]), "master")
	defer master.Close()
	var b strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := master.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			return b.String()
		}
	}
}

// additions are processes that are added to a container with settings of their own.
func additions(t *trial) {
	t.recordEnd("run", t.do("run", "--detach", "--bundle", t.bundle, t.id))
	for i, flags := range [][]string{
		{"--user", "1000"},
		{"--user", "1000:2000", "--additional-gids", "7", "--additional-gids", "8"},
		{"--cwd", "/tmp", "--env", "A=1", "--env", "B="},
		{"--cap", "CAP_NET_RAW", "--cap", "CAP_SYS_ADMIN"},
		{"--cap", "CAP_NET_RAW", "--user", "1000"},
		{"--no-new-privs"},
		{"--cwd", "/nosuch"},
		{"--user", "nosuch"},
	} {
		t.execProbe(fmt.Sprintf("%d %s.", i, strings.Join(flags, " ")), append([]string{"exec"}, flags...)...)
	}
	for name, p := range map[string]specs.Process{
		"user": {User: specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9, 10}}},
		"capabilities": {User: specs.User{UID: 7}, Capabilities: &specs.LinuxCapabilities{
			Bounding: []string{"CAP_KILL", "CAP_CHOWN"}, Permitted: []string{"CAP_KILL"}, Inheritable: []string{"CAP_KILL"}, Ambient: []string{"CAP_KILL"},
		}},
		"limits":   {Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 1, Hard: 2}, {Type: "RLIMIT_FSIZE", Soft: 1 << 20, Hard: 1 << 21}}},
		"oom":      {OOMScoreAdj: new(500)},
		"nothing":  {},
		"terminal": {Terminal: true, ConsoleSize: &specs.Box{Width: 91, Height: 33}, User: specs.User{UID: 1000}},
	} {
		p.Args, p.Cwd, p.Env = []string{"/bin/probe"}, "/", []string{"PATH=/bin", "TERM=linux"}
		data, err := json.Marshal(&p)
		assert.NilError(t, err)
		path := t.file(name+".json", string(data))
		prefix := "process " + name + "."
		if p.Terminal {
			t.recordProbe(prefix, t.withConsole(prefix+"exec", "exec", "--detach", "--process", path, t.id))
			continue
		}
		r := t.do("exec", "--process", path, t.id)
		t.recordEnd(prefix+"exec", r)
		t.recordProbe(prefix, r.Stdout)
	}
	t.remove()
}
