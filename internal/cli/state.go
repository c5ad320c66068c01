package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"

	"runv/internal/state"
)

func (a *app) stateCommand() *urfave.Command {
	return &urfave.Command{
		Name:      "state",
		Usage:     "print the state of a container as JSON",
		ArgsUsage: "<container-id>",
		Category:  groupInspect,
		Description: `Prints the OCI state: status is creating, created, running, paused or stopped;
pid is that of the container's stand-in on the host, 0 when it has stopped.
The annotations dev.runv.* tell the pod, the hypervisor and what executes the
guest's instructions (kvm or tcg), the guest's kernel, how many milliseconds
each phase of the start took, the cgroup of the VM on the host, which bind
mounts changed in a way that watches (inotify) in the container do not see any
more, and with which status and when the program ended.

Works from the state directory alone, also when the supervisor is dead.

Examples:
   runv state web
   runv state web | jq -r .status`,
		Action: forContainer(func(_ context.Context, _ *urfave.Command, id string) error {
			store, err := a.openStore()
			if err != nil {
				return err
			}
			c, err := loadContainer(store, id)
			if err != nil {
				return err
			}
			return a.printIndented(a.describe(store, c))
		}),
	}
}

// containerState is what state and list show: the OCI state with runc's
// additions.
type containerState struct {
	Version     string            `json:"ociVersion"`
	ID          string            `json:"id"`
	Pid         int               `json:"pid"`
	Status      string            `json:"status"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       string            `json:"owner"` // told by list, empty in state, as runc has it
}

// describe combines what the state directory knows about a container and its
// pod. A pod that cannot be read leaves its annotations out.
func (a *app) describe(store *state.Store, c state.Container) containerState {
	s := containerState{
		Version:     specs.Version, // what the state complies with
		ID:          c.ID,
		Pid:         c.StandIn.PID,
		Status:      string(store.Live(c)),
		Bundle:      c.Bundle,
		Rootfs:      c.Rootfs,
		Created:     c.Created,
		Annotations: map[string]string{},
	}
	if s.Status == string(state.Stopped) {
		s.Pid = 0
	}
	maps.Copy(s.Annotations, c.Annotations)
	s.Annotations["dev.runv.pod"] = c.PodID
	if c.ExitStatus != nil {
		s.Annotations["dev.runv.exit-status"] = strconv.FormatUint(uint64(*c.ExitStatus), 10)
	}
	if c.ExitedAt != nil {
		s.Annotations["dev.runv.exited"] = c.ExitedAt.UTC().Format(time.RFC3339Nano)
	}
	if len(c.LostWatches) > 0 {
		s.Annotations["dev.runv.lost-watches"] = strings.Join(c.LostWatches, "; ")
	}
	pod, err := store.LoadPod(c.PodID)
	if err != nil {
		a.log.Debug("pod of the container is not known", "container", c.ID, "pod", c.PodID, "error", err)
		return s
	}
	for key, value := range map[string]string{
		"dev.runv.hypervisor": pod.Driver,
		"dev.runv.accel":      pod.Accel,
		"dev.runv.accel-note": pod.AccelNote,
		"dev.runv.kernel":     pod.Kernel,
		"dev.runv.phases":     phases(pod.Phases),
		"dev.runv.failure":    pod.Failure,
		"dev.runv.cgroup":     pod.Cgroup.String(),
	} {
		if value != "" {
			s.Annotations[key] = value
		}
	}
	return s
}

// phases is "name=ms ..." in the order in which they happened.
func phases(all []state.Phase) string {
	var b strings.Builder
	for i, p := range all {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%s=%.1f", p.Name, float64(p.Duration)/float64(time.Millisecond))
	}
	return b.String()
}

// userName is the name of a user of the host, or # and the number when it has none, as under runc.
func userName(uid int) string {
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return "#" + strconv.Itoa(uid)
	}
	return u.Username
}

// openStore opens the state directory.
func (a *app) openStore() (*state.Store, error) { return state.Open(a.root) }

// loadContainer reads a container's record; an unknown one is errNotExist.
func loadContainer(store *state.Store, id string) (state.Container, error) {
	c, err := store.LoadContainer(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return c, errNotExist
	}
	return c, err
}

// printIndented writes v as JSON for people.
func (a *app) printIndented(v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.prog.Stdout, "%s\n", data)
	return err
}
