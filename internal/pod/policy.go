package pod

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"runv/internal/rpcerror"
	"runv/internal/state"
)

// verb is what a caller asks of a container.
type verb string

const (
	verbStart       verb = "start"
	verbExec        verb = "exec in"
	verbSignal      verb = "signal"
	verbPause       verb = "pause"
	verbResume      verb = "resume"
	verbUpdate      verb = "update"
	verbInspect     verb = "inspect" // stats, processes
	verbJoin        verb = "join"    // by another container
	verbDelete      verb = "delete"
	verbForceDelete verb = "force delete"
)

// denials says for each verb and status why the verb cannot be done; a pair that
// is absent is accepted. {id} is the container's id, {status} its status. The texts are
// runc's, since callers match them.
var denials = map[verb]map[state.Status]string{
	verbStart: {
		state.Creating: "cannot start container {id}: it is being created",
		state.Running:  "cannot start an already running container",
		state.Paused:   "cannot start a container in the paused state",
		state.Stopped:  "cannot start a container that has stopped",
	},
	verbExec: {
		state.Creating: "cannot exec in container {id}: it is being created",
		state.Paused:   "cannot exec in a paused container",
		state.Stopped:  "cannot exec in a stopped container",
	},
	verbSignal: {
		state.Creating: "container not running",
		state.Stopped:  "container not running",
	},
	verbPause: {
		state.Creating: "container not running",
		state.Paused:   "container not running: paused",
		state.Stopped:  "container not running",
	},
	verbResume: {
		state.Creating: "container not paused",
		state.Created:  "container not paused",
		state.Running:  "container not paused",
		state.Stopped:  "container not paused",
	},
	verbUpdate: {
		state.Creating: "container not running",
		state.Stopped:  "container not running",
	},
	verbInspect: {
		state.Creating: "container not running",
		state.Stopped:  "container not running",
	},
	verbJoin: {
		state.Creating: "cannot share namespaces with container {id}: it is being created",
		state.Stopped:  "cannot share namespaces with container {id}: it has stopped",
	},
	verbDelete: {
		state.Creating: "cannot delete container {id} that is not stopped: {status}",
		state.Running:  "cannot delete container {id} that is not stopped: {status}",
		state.Paused:   "cannot delete container {id} that is not stopped: {status}",
	},
	verbForceDelete: {},
}

// admit is the policy: it says whether a container in this status can be asked
// for v. It depends on nothing else.
func admit(v verb, id string, status state.Status) error {
	reason, denied := denials[v][status]
	if !denied {
		return nil
	}
	text := strings.NewReplacer("{id}", id, "{status}", string(status)).Replace(reason)
	return rpcerror.New(errdefs.ErrFailedPrecondition, text)
}

// admitCreate is the policy for a new container.
func admitCreate(pod State, id string, known bool) error {
	switch {
	case known:
		return rpcerror.New(errdefs.ErrAlreadyExists, fmt.Sprintf("container with given ID already exists: %s", id))
	case pod == Stopping || pod == Stopped:
		return rpcerror.New(errdefs.ErrFailedPrecondition, fmt.Sprintf("pod is %s", pod))
	}
	return nil
}
