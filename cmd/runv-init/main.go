// The runtime shall not look for a CPU limit in mounts and control groups, which takes time.
//go:debug containermaxprocs=0

// Runv-init sets up one process of a container, and becomes it. The agent starts
// it. It is a program of its own, without the agent's RPC libraries, because
// each exec waits for it to start: their initialization takes several times
// as long as all that it does. It is linked to start in stage.EntrySymbol.
package main

import "runv/internal/guest/stage"

func main() { stage.Main() }
