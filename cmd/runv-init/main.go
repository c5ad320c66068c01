// Runv-init sets up one process of a container, and becomes it. The agent starts
// it. It is a program of its own, without the agent's RPC libraries, because
// each exec waits for it to start: their initialization takes several times
// as long as all that it does.
package main

// The runtime would look for a CPU limit of its own in the mounts and control groups.
//go:debug containermaxprocs=0

import "runv/internal/guest/stage"

func main() { stage.Main() }
