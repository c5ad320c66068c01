package pod

import (
	"fmt"
	"slices"

	"runv/internal/state"
)

// State is where the pod is in its life.
type State string

// The states of a pod.
const (
	Idle     State = "idle"     // nothing was asked yet; there is no VM
	Starting State = "starting" // the VM boots for the first container
	Running  State = "running"  // the VM serves containers
	Stopping State = "stopping" // the VM is being shut down; no more containers
	Stopped  State = "stopped"  // the VM and all that belonged to it is gone
)

// podNext is the transition table of the pod.
var podNext = map[State][]State{
	Idle:     {Starting, Stopping},
	Starting: {Running, Stopping},
	Running:  {Stopping},
	Stopping: {Stopped},
	Stopped:  {},
}

// containerNext is the transition table of a container. The states are those
// of the OCI runtime specification and, as runc has it, paused.
var containerNext = map[state.Status][]state.Status{
	"":             {state.Creating},
	state.Creating: {state.Created, state.Stopped},
	state.Created:  {state.Running, state.Paused, state.Stopped},
	state.Running:  {state.Paused, state.Stopped},
	state.Paused:   {state.Created, state.Running, state.Stopped},
	state.Stopped:  {},
}

// ProcessState is where a process is in its life.
type ProcessState string

// The states of a process.
const (
	ProcessCreating ProcessState = "creating" // the agent makes it
	ProcessCreated  ProcessState = "created"  // only the user's program is missing
	ProcessRunning  ProcessState = "running"
	ProcessExited   ProcessState = "exited"
)

// processNext is the transition table of a process.
var processNext = map[ProcessState][]ProcessState{
	"":              {ProcessCreating},
	ProcessCreating: {ProcessCreated, ProcessRunning, ProcessExited},
	ProcessCreated:  {ProcessRunning, ProcessExited},
	ProcessRunning:  {ProcessExited},
	ProcessExited:   {},
}

// transition tells whether a table allows a step. A step that it does not allow is
// a bug of this package, and is an error rather than a wrong state.
func transition[S ~string](table map[S][]S, from, to S) error {
	if slices.Contains(table[from], to) {
		return nil
	}
	return fmt.Errorf("no transition from %q to %q", from, to)
}
