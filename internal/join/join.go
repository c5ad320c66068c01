// Package join tells what a container shares with others: which pod its specification wants it to
// be in, and whose namespaces it is to have.
//
// A specification says so by the paths of its namespaces, which lead to those of a stand-in or to a
// network namespace that a pod is in, or by the annotations of a CRI runtime that name a sandbox.
// The command line asks which pod to call, and the pod, which may know more by then, asks again for
// itself. Find is pure; Look is the only function that looks at the system. Nothing is changed, and no
// namespace is entered.
package join

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/rpcerror"
	"runv/internal/state"
)

// Plan is what a container shares.
type Plan struct {
	// Pod is the one that the container joins. Empty: one of its own.
	Pod string
	// With is a container of that pod: the first that the specification names.
	With string
	// Containers are those whose namespaces the container is to be in, by the namespaces' types. What
	// is missing the container gets as if the specification had no path.
	Containers map[specs.LinuxNamespaceType]string
	// NetNS is the network namespace of the host that the specification gives by path, when no
	// container is in it. Zero: none.
	NetNS state.NetNS
}

// Looker is how Find looks at a path; the function Look is one.
type Looker func(path string) (File, error)

// Find tells what the specification of a new container asks for, among these containers, which are
// those that may live. The errors name the field: errdefs.ErrInvalidArgument for what cannot be,
// errdefs.ErrNotImplemented for what VMs cannot do, errdefs.ErrNotFound and
// errdefs.ErrFailedPrecondition for a sandbox that is not there or not ready.
func Find(spec *specs.Spec, containers []state.Container, look Looker) (Plan, error) {
	f := &finder{look: look, containers: slices.SortedFunc(slices.Values(containers), older)}
	f.plan.Containers = make(map[specs.LinuxNamespaceType]string)
	if err := f.annotations(spec.Annotations); err != nil {
		return Plan{}, err
	}
	if spec.Linux == nil {
		return f.plan, nil
	}
	for i, ns := range spec.Linux.Namespaces {
		if ns.Path == "" {
			continue
		}
		if err := f.namespace(fmt.Sprintf("linux.namespaces[%d].path", i), ns); err != nil {
			return Plan{}, err
		}
	}
	return f.plan, nil
}

// Asked tells whether a specification may ask for something to be shared. Without that Find need not
// be called, and nobody looked for.
func Asked(spec *specs.Spec) bool {
	for _, d := range dialects {
		if spec.Annotations[d.kind] != "" {
			return true
		}
	}
	return spec.Linux != nil && slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Path != "" })
}

func older(a, b state.Container) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
}

// finder is one call of Find.
type finder struct {
	look       Looker
	containers []state.Container // oldest first
	plan       Plan
	field      string           // that has named the plan's pod
	sandbox    *state.Container // that an annotation names
	isSandbox  bool             // an annotation says that the container is one
}

// namespace takes a namespace with a path into the plan.
func (f *finder) namespace(field string, ns specs.LinuxNamespace) error {
	if ns.Type == specs.MountNamespace {
		return refused(field, "a mount namespace cannot be joined")
	}
	file, err := f.look(ns.Path)
	if err != nil {
		return invalid(field, "%v", err)
	}
	if file.Type == "" {
		return invalid(field, "%s is not a namespace of a container of runv", ns.Path)
	}
	if file.Type != ns.Type {
		return invalid(field, "%s is a namespace of type %s, not %s", ns.Path, file.Type, ns.Type)
	}
	if c := f.standIn(file.PID); c != nil {
		return f.share(field, ns.Type, c)
	}
	if ns.Type == specs.NetworkNamespace {
		return f.network(field, ns.Path, file)
	}
	// The sandbox's namespaces may be pinned to files, which are the host's; in the VM the sandbox has
	// those of its own, which its containers share.
	switch {
	case file.PID != 0 || file.OfHost:
	case f.sandbox != nil:
		return f.share(field, ns.Type, f.sandbox)
	case f.isSandbox:
		return nil
	}
	return invalid(field, "%s is not a namespace of a container of runv", ns.Path)
}

// network takes a network namespace of the host into the plan.
func (f *finder) network(field, path string, file File) error {
	netns := state.NetNS{Path: path, Dev: file.Dev, Ino: file.Ino}
	if c := f.inNetwork(netns); c != nil {
		return f.share(field, specs.NetworkNamespace, c)
	}
	if file.OfHost {
		return refused(field, "%s is the host's: a virtual machine cannot use the host's network; "+
			"publish ports, or give the container a network of its own", path)
	}
	f.plan.NetNS = netns
	return nil
}

// inNetwork returns a container in a network namespace, preferably of the pod that is known already.
func (f *finder) inNetwork(netns state.NetNS) (found *state.Container) {
	for i := range f.containers {
		c := &f.containers[i]
		if c.NetNS.Same(netns) && (found == nil || found.PodID != f.plan.Pod && c.PodID == f.plan.Pod) {
			found = c
		}
	}
	return found
}

// standIn returns the container whose stand-in has the pid.
func (f *finder) standIn(pid int) *state.Container {
	for i := range f.containers {
		if pid != 0 && f.containers[i].StandIn.PID == pid {
			return &f.containers[i]
		}
	}
	return nil
}

// share makes the container share a namespace with another.
func (f *finder) share(field string, kind specs.LinuxNamespaceType, with *state.Container) error {
	if err := f.join(field, with); err != nil {
		return err
	}
	f.plan.Containers[kind] = with.ID
	return nil
}

// join makes the container be in the pod of another.
func (f *finder) join(field string, with *state.Container) error {
	if f.isSandbox {
		return invalid(field, "a sandbox cannot be in the pod of container %s", with.ID)
	}
	if f.plan.Pod != "" && f.plan.Pod != with.PodID {
		return invalid(field, "container %s is in another pod than container %s, which %s names", with.ID, f.plan.With, f.field)
	}
	if f.plan.Pod == "" {
		f.plan.Pod, f.plan.With, f.field = with.PodID, with.ID, field
	}
	return nil
}

func invalid(field, format string, args ...any) error {
	return rpcerror.New(errdefs.ErrInvalidArgument, field+": "+fmt.Sprintf(format, args...))
}

func refused(field, format string, args ...any) error {
	return rpcerror.New(errdefs.ErrNotImplemented, field+": "+fmt.Sprintf(format, args...))
}
