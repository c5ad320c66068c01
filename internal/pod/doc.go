// Package pod is the heart of runv: one VM, the containers in it, their processes,
// and the order in which all of it begins and ends.
//
// # One owner
//
// The goroutine of Pod.Run owns the pod. It alone reads and writes the records of
// pod, containers and processes; everything else that happens - a request, an event
// of the agent, the VM's death - is an input to it. It never blocks. A
// request therefore has three parts: it is admitted on the pod's goroutine (policy.go says
// whether a container in this status can be asked for it), it calls the agent from
// the caller's goroutine with no lock held, and its outcome is committed on the
// pod's goroutine again. One operation at a time changes a container.
//
// # States
//
// State changes are checked against the tables in state.go, which are (kept
// equal by a test):
//
//	pod        idle      -> starting stopping
//	pod        starting  -> running stopping
//	pod        running   -> stopping
//	pod        stopping  -> stopped
//	pod        stopped   ->
//	container  creating  -> created stopped
//	container  created   -> running paused stopped
//	container  running   -> paused stopped
//	container  paused    -> created running stopped
//	container  stopped   ->
//	process    creating  -> created running exited
//	process    created   -> running exited
//	process    running   -> exited
//	process    exited    ->
//
// A pod begins idle. Its first container starts the boot of the VM; the mounts of the
// container are made meanwhile. When no container is left that has not
// stopped, the VM is shut down, and Run returns once every exit was told and all output
// delivered. A VM that dies, a share that dies, an agent that breaks the protocol fail the
// pod: its processes count as killed by SIGKILL and it goes the same way.
//
// # Hooks
//
// Those of the host run on the goroutine of the request, outside of the pod's: prestart and
// createRuntime end with the request, poststart with the container, poststop with its own timeouts.
// See hooks.go for who runs poststop.
//
// # The end of a process
//
// The agent tells the exit, then that it has sent all output (Drained). The pod
// waits for the output to arrive, makes the process exited and its container
// stopped, and gives the caller a moment to take the output before it tells the stand-in and
// the journal. Output that is not taken by then is not lost: it stays in memory,
// bounded, until it is taken or the container is deleted.
//
// # Layer boundaries
//
// The pod knows VMs by hypervisor.VM, never a driver; where they come from, the
// share, the state directory and the stand-ins are interfaces that it declares itself.
// It knows no gRPC, no ttrpc service and no command line: internal/supervisor serves it.
package pod
