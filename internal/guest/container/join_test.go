package container_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// joining makes a specification share namespaces with another container.
func joining(spec *specs.Spec, id string, kinds ...specs.LinuxNamespaceType) *specs.Spec {
	spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return slices.Contains(kinds, ns.Type) })
	for _, kind := range kinds {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: "container:" + id})
	}
	if slices.Contains(kinds, specs.UTSNamespace) {
		spec.Hostname = ""
	}
	return spec
}

// links are what the container's namespaces are, one in a line, in the order of namespaceFiles.
const links = "for n in cgroup ipc mnt net pid time user uts; do readlink /proc/self/ns/$n; done"

var namespaceFiles = []specs.LinuxNamespaceType{
	specs.CgroupNamespace, specs.IPCNamespace, specs.MountNamespace, specs.NetworkNamespace, specs.PIDNamespace, specs.TimeNamespace,
	specs.UserNamespace, specs.UTSNamespace,
}

// sharedKinds tells which namespaces two outputs of links have in common.
func sharedKinds(t *testing.T, a, b string) (kinds []specs.LinuxNamespaceType) {
	t.Helper()
	as, bs := strings.Fields(a), strings.Fields(b)
	assert.Equal(t, len(as), len(namespaceFiles), a)
	assert.Equal(t, len(bs), len(namespaceFiles), b)
	for i, kind := range namespaceFiles {
		if as[i] == bs[i] {
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// execOutput runs a shell script in a container.
func (w *world) execOutput(id, script string) string {
	w.t.Helper()
	w.execs++
	exec := fmt.Sprint("out", w.execs)
	e, err := w.exec(id, exec, w.spec("sh", "-c", script).Process)
	assert.NilError(w.t, err)
	status, _ := w.end(id, exec)
	e.copying.Wait()
	assert.Equal(w.t, status, uint32(0), "%s%s", e.out[1], e.out[2])
	return e.out[1].String()
}

func (w *world) remove(id string) {
	w.t.Helper()
	c, err := w.set.Get(id)
	assert.NilError(w.t, err)
	assert.NilError(w.t, c.Delete(w.t.Context()))
}

// Each kind of namespace alone, all of them, and from a container that was not started.
func TestJoin(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	_, err := w.create("a", w.spec("sleep", "1000"))
	assert.NilError(t, err)
	own := []specs.LinuxNamespaceType{specs.TimeNamespace, specs.UserNamespace}
	for i, kinds := range [][]specs.LinuxNamespaceType{
		{specs.IPCNamespace},
		{specs.UTSNamespace},
		{specs.PIDNamespace},
		{specs.CgroupNamespace},
		{specs.NetworkNamespace},
		{specs.CgroupNamespace, specs.IPCNamespace, specs.NetworkNamespace, specs.PIDNamespace, specs.UTSNamespace},
	} {
		if i == 1 {
			assert.NilError(t, w.start("a"))
		}
		id := fmt.Sprint("b", i)
		_, err := w.create(id, joining(w.spec("sleep", "1000"), "a", kinds...))
		assert.NilError(t, err)
		assert.NilError(t, w.start(id))
		want := slices.Concat(kinds, own)
		if !slices.Contains(kinds, specs.NetworkNamespace) { // the specification has none of its own
			want = append(want, specs.NetworkNamespace)
		}
		slices.Sort(want)
		assert.DeepEqual(t, sharedKinds(t, w.execOutput("a", links), w.execOutput(id, links)), want)
		w.remove(id)
	}
	w.remove("a")
	assert.Equal(t, len(w.set.All()), 0)
}

// What one of a chain of containers leaves the others keep, and a new one gets from them.
func TestNamespacesOutliveTheirOwner(t *testing.T) {
	w := newWorld(t)
	kinds := []specs.LinuxNamespaceType{specs.IPCNamespace, specs.UTSNamespace, specs.NetworkNamespace}
	spec := w.spec("sleep", "1000")
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	spec.Hostname = "first"
	_, err := w.create("a", spec)
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	_, err = w.create("b", joining(w.spec("sleep", "1000"), "a", kinds...))
	assert.NilError(t, err)
	assert.NilError(t, w.start("b"))
	before := w.execOutput("b", links)
	w.remove("a")
	_, err = w.create("c", joining(w.spec("sleep", "1000"), "a", kinds...))
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	assert.Error(t, err, `linux.namespaces: ipc: container "a" does not exist`)
	_, err = w.create("c", joining(w.spec("sleep", "1000"), "b", kinds...))
	assert.NilError(t, err)
	assert.NilError(t, w.start("c"))
	assert.Equal(t, w.execOutput("c", "cat /proc/sys/kernel/hostname"), "first\n")
	assert.Assert(t, is.Len(sharedKinds(t, before, w.execOutput("c", links)), 5))
}

// Containers with networks of their own have a loopback each.
func TestNetworksOfTheirOwn(t *testing.T) {
	w := newWorld(t)
	ours, err := os.Readlink("/proc/self/ns/net")
	assert.NilError(t, err)
	var seen []string
	for _, id := range []string{"a", "b", "c"} {
		spec := w.spec("sleep", "1000")
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
		_, err := w.create(id, spec)
		assert.NilError(t, err)
		assert.NilError(t, w.start(id))
		seen = append(seen, strings.TrimSpace(w.execOutput(id, "readlink /proc/self/ns/net")))
	}
	seen = append(seen, ours)
	slices.Sort(seen)
	assert.Equal(t, len(slices.Compact(seen)), 4)
	assert.Equal(t, w.execOutput("b", "grep -c : /proc/net/dev; busybox ip -o link | grep -c LOOPBACK,UP"), "1\n1\n")
}

// In a pid namespace that is shared all see each other, and the end of its first process is that of all.
func TestSharedPidNamespace(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", w.spec("sleep", "1000"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	// The background process is not killed by the kernel when b's own ends.
	b, err := w.create("b", joining(w.spec("sh", "-c", "busybox setsid sleep 2000 & read x"), "a", specs.PIDNamespace))
	assert.NilError(t, err)
	assert.NilError(t, w.start("b"))
	_, err = w.create("c", joining(w.spec("sleep", "3000"), "b", specs.PIDNamespace))
	assert.NilError(t, err)
	assert.NilError(t, w.start("c"))
	waitFor := func(n int) {
		t.Helper()
		script := fmt.Sprintf("i=0; while [ $(cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c ^sleep) != %d ]; do i=$((i+1)); [ $i -lt 1000 ] || exit 1; done; cat /proc/1/cmdline | tr '\\0' ' '", n)
		assert.Equal(t, w.execOutput("c", script), "sleep 1000 ")
	}
	waitFor(3)
	assert.NilError(t, b.stdin.Close())
	status, _ := w.end("b", "")
	assert.Equal(t, status, uint32(1)) // of read at the end of input
	waitFor(2)                         // and a zombie, which is a's
	w.remove("b")
	a, err := w.set.Get("a")
	assert.NilError(t, err)
	assert.NilError(t, a.Signal("", 9, false))
	for _, id := range []string{"a", "c"} {
		status, _ := w.end(id, "")
		assert.Equal(t, status, uint32(137))
	}
	_, err = w.create("d", joining(w.spec("true"), "a", specs.PIDNamespace))
	assert.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	assert.Error(t, err, `linux.namespaces: pid: cannot join namespaces of container "a": it is stopped`)
}

func TestJoinUserNamespace(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	spec := w.spec("sleep", "1000")
	w.inUserNS(spec)
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1000000}}
	_, err := w.create("a", spec)
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	all := []specs.LinuxNamespaceType{
		specs.CgroupNamespace, specs.IPCNamespace, specs.NetworkNamespace, specs.PIDNamespace, specs.TimeNamespace, specs.UserNamespace, specs.UTSNamespace,
	}
	for i, kinds := range [][]specs.LinuxNamespaceType{
		{specs.UserNamespace},
		{specs.NetworkNamespace, specs.UserNamespace},
		{specs.PIDNamespace, specs.UserNamespace},
		{specs.TimeNamespace, specs.UserNamespace},
		all,
	} {
		id := fmt.Sprint("b", i)
		spec := joining(w.spec("sh", "-c", "id -u; cat /proc/self/uid_map | tr -s ' '; echo $$; touch /tmp/"+id+"; read x"), "a", kinds...)
		if !slices.Contains(kinds, specs.NetworkNamespace) {
			spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
		}
		if !slices.Contains(kinds, specs.IPCNamespace) {
			spec.Linux.Sysctl = map[string]string{"kernel.msgmax": "7777"}
		}
		r, err := w.create(id, spec)
		assert.NilError(t, err)
		assert.NilError(t, w.start(id))
		want := slices.Clone(kinds)
		if !slices.Contains(kinds, specs.TimeNamespace) {
			assert.Equal(t, w.execOutput(id, "cut -d. -f1 /proc/uptime | grep -c '^1......$' || true"), "0\n")
		}
		assert.DeepEqual(t, sharedKinds(t, w.execOutput("a", links), w.execOutput(id, links)), want)
		if spec.Linux.Sysctl != nil {
			assert.Equal(t, w.execOutput(id, "cat /proc/sys/kernel/msgmax"), "7777\n")
		}
		_, err = r.stdin.Write([]byte("\n"))
		assert.NilError(t, err)
		status, _ := w.end(id, "")
		r.copying.Wait()
		assert.Equal(t, status, uint32(0), r.out[2])
		lines := strings.Split(r.out[1].String(), "\n")
		assert.Equal(t, lines[0], "0")
		assert.Equal(t, lines[1], " 0 100000 65536")
		assert.Equal(t, lines[2] == "1", !slices.Contains(kinds, specs.PIDNamespace), lines[2])
		w.remove(id)
	}
	// A new user namespace in the network of another.
	spec = w.spec("true")
	w.inUserNS(spec)
	assert.Assert(t, strings.Contains(w.output("c", joining(spec, "a", specs.IPCNamespace)), ""))
	for _, kind := range []specs.LinuxNamespaceType{specs.TimeNamespace, specs.CgroupNamespace} {
		spec = w.spec("true")
		w.inUserNS(spec)
		_, err = w.create("d", joining(spec, "a", kind))
		assert.ErrorIs(t, err, errdefs.ErrNotImplemented)
		assert.ErrorContains(t, err, string(kind))
	}
	spec = joining(w.spec("true"), "a", specs.UserNamespace)
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	_, err = w.create("d", spec)
	assert.Error(t, err, `linux.namespaces: user: linux.uidMappings, linux.gidMappings: are not those of container "a"`)
	_, err = w.create("d", joining(w.spec("nonesuch"), "a", specs.UserNamespace))
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	assert.ErrorContains(t, err, "executable file not found")
}

func TestJoinTimeNamespace(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	spec := w.spec("sleep", "1000")
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	_, err := w.create("a", spec)
	assert.NilError(t, err)
	_, err = w.create("b", joining(w.spec("sleep", "1000"), "a", specs.TimeNamespace))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	assert.NilError(t, w.start("b"))
	assert.DeepEqual(t, sharedKinds(t, w.execOutput("a", links), w.execOutput("b", links)),
		[]specs.LinuxNamespaceType{specs.NetworkNamespace, specs.TimeNamespace, specs.UserNamespace})
}

// networks is a set of networks whose namespaces the test makes.
type networks struct {
	mu      sync.Mutex
	netns   map[string]string // paths
	opened  map[string]int
	adopted map[string]string // what the namespace is, by id
	files   []*os.File        // of those
}

func (n *networks) Open(id string) (*os.File, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	path, ok := n.netns[id]
	if !ok {
		return nil, errdefs.ErrNotFound.WithMessage("network " + id + " does not exist")
	}
	n.opened[id]++
	return os.Open(path)
}

func (n *networks) Adopt(_ context.Context, id string, netns *os.File) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()))
	n.adopted[id] = link
	if err != nil {
		return err
	}
	fd, err := unix.FcntlInt(netns.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	n.files = append(n.files, os.NewFile(uintptr(fd), link))
	return err
}

func (n *networks) Shared(id string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.opened[id] > 1
}

func (n *networks) Release(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.opened[id]--
}

func TestNetworks(t *testing.T) {
	program := buildInit(t) // before there is a reaper, which would take the compiler's status
	w := newWorld(t)
	w.set.Exe = program
	in := func(spec *specs.Spec, path string) *specs.Spec {
		spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.NetworkNamespace })
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: path})
		return spec
	}
	_, err := w.create("a", in(w.spec("true"), "network:n"))
	assert.ErrorIs(t, err, errdefs.ErrNotImplemented)

	set := &networks{netns: map[string]string{"n": "/proc/self/ns/net"}, opened: map[string]int{}, adopted: map[string]string{}}
	w.set.Networks = set
	defer func() {
		for _, f := range set.files {
			assert.Check(t, f.Close())
		}
	}()
	_, err = w.create("a", in(w.spec("sleep", "1000"), "network:n"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("a"))
	_, err = w.create("b", joining(w.spec("sleep", "1000"), "a", specs.NetworkNamespace))
	assert.NilError(t, err)
	assert.Equal(t, set.opened["n"], 2)
	_, err = w.create("c", joining(w.spec("nonesuch"), "b", specs.NetworkNamespace))
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = w.create("c", in(w.spec("true"), "network:none"))
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	assert.Equal(t, set.opened["n"], 2)
	w.remove("a")
	assert.Equal(t, set.opened["n"], 1)
	w.remove("b")
	assert.Equal(t, set.opened["n"], 0)

	// A container with a user namespace must own the network's namespace.
	spec := w.spec("sleep", "1000")
	w.inUserNS(spec)
	_, err = w.create("u", in(spec, "network:n"))
	assert.NilError(t, err)
	assert.NilError(t, w.start("u"))
	assert.Equal(t, w.execOutput("u", "readlink /proc/self/ns/net"), set.adopted["n"]+"\n")
	assert.Equal(t, set.opened["n"], 1)

	// So must one that joins the user namespace of another, unless the network is that one's, or others are in it.
	for id, c := range map[string]struct {
		network string
		adopted bool
	}{"own": {"m", true}, "same": {"theirs", false}, "others": {"crowded", false}} {
		set.netns["m"], set.netns["crowded"], set.opened["crowded"] = "/proc/self/ns/net", "/proc/self/ns/net", 1
		set.netns["theirs"] = fmt.Sprintf("/proc/self/fd/%d", set.files[0].Fd())
		_, err = w.create(id, in(joining(w.spec("sleep", "1000"), "u", specs.UserNamespace), "network:"+c.network))
		assert.NilError(t, err, id)
		assert.Equal(t, set.adopted[c.network] != "", c.adopted, id)
		w.remove(id)
	}
	w.remove("u")
	assert.Equal(t, set.opened["n"], 0)
}

func TestBadNamespacePaths(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		kind       specs.LinuxNamespaceType
		path, want string
	}{
		{specs.PIDNamespace, "/proc/1/ns/pid", "names neither a container nor a network"},
		{specs.PIDNamespace, "network:n", "names neither a container nor a network"},
		{specs.MountNamespace, "container:a", "a mount namespace cannot be joined"},
		{specs.IPCNamespace, "container:", `container "" does not exist`},
	} {
		spec := w.spec("true")
		for i := range spec.Linux.Namespaces {
			if ns := &spec.Linux.Namespaces[i]; ns.Type == c.kind {
				ns.Path = c.path
			}
		}
		_, err := w.create("a", spec)
		assert.ErrorContains(t, err, c.want)
	}
}
