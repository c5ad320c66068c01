// The runtime shall not look for a CPU limit in mounts and control groups, which takes time.
//go:debug containermaxprocs=0

// Runv-agent is PID 1 of a pod's virtual machine. Under the name runv-init it is
// instead what sets up one process of a container.
package main

import (
	"fmt"
	"os"

	"runv/internal/guest"
	"runv/internal/guest/stage"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if os.Args[0] == stage.Name {
		stage.Main()
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "runv-agent: runs as the first process of a virtual machine only")
		os.Exit(1)
	}
	guest.Run(version)
}
