// The runtime shall not look for a CPU limit in mounts and control groups, which takes time.
//go:debug containermaxprocs=0

// Runv-agent is PID 1 of a pod's virtual machine. Under the name runv-init it is
// instead what sets up one process of a container, and under that of modprobe what the kernel
// starts when it wants a module.
package main

import (
	"fmt"
	"os"

	"runv/internal/guest"
	"runv/internal/guest/boot"
	"runv/internal/guest/stage"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if os.Args[0] == stage.Name {
		stage.Main()
	}
	if os.Args[0] == boot.ModprobePath {
		if err := boot.Modprobe(os.Args[len(os.Args)-1]); err != nil {
			os.Exit(1) // the kernel does not want to know why
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "runv-agent: runs as the first process of a virtual machine only")
		os.Exit(1)
	}
	guest.Run(version)
}
