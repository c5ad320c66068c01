package join

import (
	"fmt"

	"github.com/containerd/errdefs"

	"runv/internal/rpcerror"
	"runv/internal/state"
)

// dialect is how a CRI runtime says in annotations what a container is.
type dialect struct {
	kind               string // the key of what it is
	sandbox, container string // its values
	id, name           string // the keys of the sandbox's id and name; a runtime need not have a name
}

var dialects = []dialect{
	{ // containerd
		kind: "io.kubernetes.cri.container-type", sandbox: "sandbox", container: "container",
		id: "io.kubernetes.cri.sandbox-id",
	},
	{ // CRI-O, and Podman's kube play
		kind: "io.kubernetes.cri-o.ContainerType", sandbox: "sandbox", container: "container",
		id: "io.kubernetes.cri-o.SandboxID", name: "io.kubernetes.cri-o.SandboxName",
	},
	{ // dockershim and cri-dockerd
		kind: "io.kubernetes.docker.type", sandbox: "podsandbox", container: "container",
		id: "io.kubernetes.sandbox.id",
	},
}

// annotations finds the sandbox of a CRI runtime.
func (f *finder) annotations(all map[string]string) error {
	for _, d := range dialects {
		switch all[d.kind] {
		case d.sandbox:
			f.isSandbox = true
		case d.container:
			if err := f.inSandbox(d, all); err != nil {
				return err
			}
		}
	}
	return nil
}

// inSandbox makes the container be in the pod of its sandbox.
func (f *finder) inSandbox(d dialect, all map[string]string) error {
	key, value := d.id, all[d.id]
	is := func(c *state.Container) bool { return c.ID == value }
	if value == "" && d.name != "" {
		key, value = d.name, all[d.name]
		is = func(c *state.Container) bool {
			return c.Annotations[d.kind] == d.sandbox && c.Annotations[d.name] == value
		}
	}
	if value == "" {
		return nil // a runtime that knows no sandboxes has left it out
	}
	field := "annotations[" + key + "]"
	for i := range f.containers {
		c := &f.containers[i]
		if !is(c) {
			continue
		}
		if c.Status == state.Stopped {
			return rpcerror.New(errdefs.ErrFailedPrecondition, fmt.Sprintf("%s: sandbox %s has stopped", field, c.ID))
		}
		f.sandbox = c
		return f.join(field, c)
	}
	return rpcerror.New(errdefs.ErrNotFound, fmt.Sprintf("%s: sandbox %.255q is not a container of runv", field, value))
}
