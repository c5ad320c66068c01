package join_test

import (
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/join"
	"runv/internal/state"
)

const (
	net    = specs.NetworkNamespace
	ipc    = specs.IPCNamespace
	uts    = specs.UTSNamespace
	pid    = specs.PIDNamespace
	user   = specs.UserNamespace
	cgroup = specs.CgroupNamespace
	timens = specs.TimeNamespace
)

// containers are a and b in one pod, c in another, d that has stopped, and e that is being created.
func containers() []state.Container {
	at := func(n int) time.Time { return time.Date(2026, 11, 26, 1, 2, n, 0, time.UTC) }
	return []state.Container{
		{ID: "c", PodID: "pod-c", Status: state.Running, Created: at(3), StandIn: state.Process{PID: 300, StartTime: 1}, NetNS: state.NetNS{Dev: 4, Ino: 30}},
		{ID: "b", PodID: "pod-a", Status: state.Running, Created: at(2), StandIn: state.Process{PID: 200, StartTime: 1}, NetNS: state.NetNS{Dev: 4, Ino: 10}},
		{
			ID: "a", PodID: "pod-a", Status: state.Running, Created: at(1), StandIn: state.Process{PID: 100, StartTime: 1}, NetNS: state.NetNS{Dev: 4, Ino: 10},
			Annotations: map[string]string{"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.cri-o.SandboxName": "k8s_a"},
		},
		{ID: "d", PodID: "pod-d", Status: state.Stopped, Created: at(4)},
		{ID: "e", PodID: "pod-e", Status: state.Creating, Created: at(5)},
	}
}

// files are what the tests' paths lead to.
var files = map[string]join.File{
	"/proc/100/ns/net":    {Type: net, Dev: 4, Ino: 10, PID: 100},
	"/proc/100/ns/ipc":    {Type: ipc, Dev: 4, Ino: 1, PID: 100, OfHost: true},
	"/proc/100/ns/uts":    {Type: uts, Dev: 4, Ino: 2, PID: 100, OfHost: true},
	"/proc/100/ns/pid":    {Type: pid, Dev: 4, Ino: 3, PID: 100, OfHost: true},
	"/proc/100/ns/user":   {Type: user, Dev: 4, Ino: 4, PID: 100, OfHost: true},
	"/proc/100/ns/cgroup": {Type: cgroup, Dev: 4, Ino: 5, PID: 100, OfHost: true},
	"/proc/100/ns/time":   {Type: timens, Dev: 4, Ino: 6, PID: 100, OfHost: true},
	"/proc/200/ns/pid":    {Type: pid, Dev: 4, Ino: 3, PID: 200, OfHost: true},
	"/proc/300/ns/ipc":    {Type: ipc, Dev: 4, Ino: 1, PID: 300, OfHost: true},
	"/proc/1/ns/pid":      {Type: pid, Dev: 4, Ino: 3, PID: 1, OfHost: true},
	"/proc/1/ns/net":      {Type: net, Dev: 4, Ino: 99, PID: 1, OfHost: true},
	"/proc/2/ns/net":      {PID: 2},
	"/proc/77/ns/net":     {Type: net, Dev: 4, Ino: 70, PID: 77},
	"/run/netns/of-a":     {Type: net, Dev: 4, Ino: 10},
	"/run/netns/of-c":     {Type: net, Dev: 4, Ino: 30},
	"/run/netns/free":     {Type: net, Dev: 4, Ino: 50},
	"/run/netns/other":    {Type: net, Dev: 5, Ino: 10},
	"/run/netns/host":     {Type: net, Dev: 4, Ino: 99, OfHost: true},
	"/run/ipcns/pinned":   {Type: ipc, Dev: 4, Ino: 60},
	"/run/ipcns/host":     {Type: ipc, Dev: 4, Ino: 1, OfHost: true},
}

func look(path string) (join.File, error) {
	f, ok := files[path]
	if !ok {
		return f, errors.New(path + ": no such file or directory")
	}
	return f, nil
}

func spec(annotations map[string]string, paths ...specs.LinuxNamespace) *specs.Spec {
	ns := append([]specs.LinuxNamespace{{Type: specs.MountNamespace}}, paths...)
	return &specs.Spec{Annotations: annotations, Linux: &specs.Linux{Namespaces: ns}}
}

func at(kind specs.LinuxNamespaceType, path string) specs.LinuxNamespace {
	return specs.LinuxNamespace{Type: kind, Path: path}
}

func TestFind(t *testing.T) {
	type with = map[specs.LinuxNamespaceType]string
	cri := func(kind, id string) map[string]string {
		return map[string]string{"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": id}
	}
	for name, c := range map[string]struct {
		spec *specs.Spec
		want join.Plan
	}{
		"nothing": {spec(nil, at(net, ""), at(pid, "")), join.Plan{}},
		"the network only": {
			spec(nil, at(net, "/proc/100/ns/net"), at(ipc, ""), at(pid, "")),
			join.Plan{Pod: "pod-a", With: "a", Containers: with{net: "a"}},
		},
		"a pod's": {
			spec(nil, at(net, "/proc/100/ns/net"), at(ipc, "/proc/100/ns/ipc"), at(uts, "/proc/100/ns/uts"), at(pid, "")),
			join.Plan{Pod: "pod-a", With: "a", Containers: with{net: "a", ipc: "a", uts: "a"}},
		},
		"all": {
			spec(nil, at(user, "/proc/100/ns/user"), at(cgroup, "/proc/100/ns/cgroup"), at(timens, "/proc/100/ns/time")),
			join.Plan{Pod: "pod-a", With: "a", Containers: with{user: "a", cgroup: "a", timens: "a"}},
		},
		"of two in one pod": {
			spec(nil, at(pid, "/proc/200/ns/pid"), at(ipc, "/proc/100/ns/ipc")),
			join.Plan{Pod: "pod-a", With: "b", Containers: with{pid: "b", ipc: "a"}},
		},
		"a named network of the oldest in it": {
			spec(nil, at(net, "/run/netns/of-a")), join.Plan{Pod: "pod-a", With: "a", Containers: with{net: "a"}},
		},
		"a network that no pod is in": {
			spec(nil, at(net, "/run/netns/free")), join.Plan{NetNS: state.NetNS{Path: "/run/netns/free", Dev: 4, Ino: 50}},
		},
		"a network with another's inode": {
			spec(nil, at(net, "/run/netns/other")), join.Plan{NetNS: state.NetNS{Path: "/run/netns/other", Dev: 5, Ino: 10}},
		},
		"a process's network": {
			spec(nil, at(net, "/proc/77/ns/net")), join.Plan{NetNS: state.NetNS{Path: "/proc/77/ns/net", Dev: 4, Ino: 70}},
		},
		"another network in a pod": {
			spec(nil, at(net, "/run/netns/free"), at(pid, "/proc/100/ns/pid")),
			join.Plan{Pod: "pod-a", With: "a", Containers: with{pid: "a"}, NetNS: state.NetNS{Path: "/run/netns/free", Dev: 4, Ino: 50}},
		},
		"a container of containerd's": {spec(cri("container", "a")), join.Plan{Pod: "pod-a", With: "a"}},
		"a sandbox of containerd's": {
			spec(cri("sandbox", "z"), at(net, "/run/netns/free")),
			join.Plan{NetNS: state.NetNS{Path: "/run/netns/free", Dev: 4, Ino: 50}},
		},
		"something else of containerd's": {spec(cri("podsandbox", "a")), join.Plan{}},
		"a container of CRI-O's": {
			spec(map[string]string{"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "b", "io.kubernetes.cri-o.SandboxName": "k8s_a"}),
			join.Plan{Pod: "pod-a", With: "b"},
		},
		"a container of CRI-O's by name": {
			spec(map[string]string{"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxName": "k8s_a"}),
			join.Plan{Pod: "pod-a", With: "a"},
		},
		"a container of CRI-O's with pinned namespaces": {
			spec(map[string]string{"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "a"},
				at(net, "/run/netns/of-a"), at(ipc, "/run/ipcns/pinned")),
			join.Plan{Pod: "pod-a", With: "a", Containers: with{net: "a", ipc: "a"}},
		},
		"a sandbox of CRI-O's with pinned namespaces": {
			spec(map[string]string{"io.kubernetes.cri-o.ContainerType": "sandbox"}, at(ipc, "/run/ipcns/pinned")), join.Plan{},
		},
		"a container of no sandbox": {spec(map[string]string{"io.kubernetes.cri-o.ContainerType": "container"}), join.Plan{}},
		"a container of dockershim's": {
			spec(map[string]string{"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "a"}), join.Plan{Pod: "pod-a", With: "a"},
		},
		"a sandbox of dockershim's": {spec(map[string]string{"io.kubernetes.docker.type": "podsandbox"}), join.Plan{}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := join.Find(c.spec, containers(), look)
			assert.NilError(t, err)
			assert.Equal(t, join.Asked(c.spec), name != "nothing")
			if c.want.Containers == nil {
				c.want.Containers = with{}
			}
			assert.DeepEqual(t, got, c.want)
		})
	}
}

func TestFindRefuses(t *testing.T) {
	container := func(id string) map[string]string {
		return map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": id}
	}
	sandbox := map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "z"}
	for name, c := range map[string]struct {
		spec *specs.Spec
		kind error
		want string
	}{
		"a process of the host": {
			spec(nil, at(net, ""), at(pid, "/proc/1/ns/pid")), errdefs.ErrInvalidArgument,
			"linux.namespaces[2].path: /proc/1/ns/pid is not a namespace of a container of runv",
		},
		"a process that hides": {
			spec(nil, at(net, "/proc/2/ns/net")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: /proc/2/ns/net is not a namespace of a container of runv",
		},
		"a file that is no container's": {
			spec(nil, at(ipc, "/run/ipcns/pinned")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: /run/ipcns/pinned is not a namespace of a container of runv",
		},
		"the host's in a sandbox": {
			spec(container("a"), at(ipc, "/run/ipcns/host")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: /run/ipcns/host is not a namespace of a container of runv",
		},
		"nothing": {
			spec(nil, at(pid, "/proc/5/ns/pid")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: /proc/5/ns/pid: no such file or directory",
		},
		"another type": {
			spec(nil, at(pid, "/proc/100/ns/ipc")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: /proc/100/ns/ipc is a namespace of type ipc, not pid",
		},
		"a mount namespace": {
			&specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{at(specs.MountNamespace, "/proc/100/ns/mnt")}}}, errdefs.ErrNotImplemented,
			"linux.namespaces[0].path: a mount namespace cannot be joined",
		},
		"the host's network": {
			spec(nil, at(net, "/proc/1/ns/net")), errdefs.ErrNotImplemented,
			"linux.namespaces[1].path: /proc/1/ns/net is the host's: a virtual machine cannot use the host's network; " +
				"publish ports, or give the container a network of its own",
		},
		"the host's network by name": {
			spec(nil, at(net, "/run/netns/host")), errdefs.ErrNotImplemented,
			"linux.namespaces[1].path: /run/netns/host is the host's: a virtual machine cannot use the host's network; " +
				"publish ports, or give the container a network of its own",
		},
		"two pods": {
			spec(nil, at(pid, "/proc/100/ns/pid"), at(ipc, "/proc/300/ns/ipc")), errdefs.ErrInvalidArgument,
			"linux.namespaces[2].path: container c is in another pod than container a, which linux.namespaces[1].path names",
		},
		"two pods by a network": {
			spec(nil, at(pid, "/proc/100/ns/pid"), at(net, "/run/netns/of-c")), errdefs.ErrInvalidArgument,
			"linux.namespaces[2].path: container c is in another pod than container a, which linux.namespaces[1].path names",
		},
		"another pod than the sandbox's": {
			spec(container("c"), at(pid, "/proc/100/ns/pid")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: container a is in another pod than container c, which annotations[io.kubernetes.cri.sandbox-id] names",
		},
		"a sandbox in a pod": {
			spec(sandbox, at(pid, "/proc/100/ns/pid")), errdefs.ErrInvalidArgument,
			"linux.namespaces[1].path: a sandbox cannot be in the pod of container a",
		},
		"no such sandbox": {
			spec(container("nope")), errdefs.ErrNotFound,
			`annotations[io.kubernetes.cri.sandbox-id]: sandbox "nope" is not a container of runv`,
		},
		"a sandbox that has stopped": {
			spec(container("d")), errdefs.ErrFailedPrecondition, "annotations[io.kubernetes.cri.sandbox-id]: sandbox d has stopped",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := join.Find(c.spec, containers(), look)
			assert.Error(t, err, c.want)
			assert.ErrorIs(t, err, c.kind)
		})
	}
}
