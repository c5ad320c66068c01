// Command runv runs OCI containers, each pod in a virtual machine of its own.
//
// One binary has several faces: the command line that runc's callers use, and
// the processes that it starts of itself: the supervisor of a pod, the server of a
// pod's share, the stand-in of a container process, and what tells the host that memory ran out in a guest.
package main

import (
	"context"
	"os"

	"runv/internal/cli"
	"runv/internal/hostcgroup"
	"runv/internal/shareserver"
	"runv/internal/standin"
	"runv/internal/supervisor"
)

// version is set by the build.
var version string

func main() {
	os.Exit(run(os.Args))
}

func run(args []string) int {
	if len(args) > 1 {
		switch args[1] {
		case "supervisor":
			return supervisor.Main(args[2:], version)
		case shareserver.Face:
			return shareserver.Main(args[2:])
		case "standin":
			return standin.Main(args[2:])
		case hostcgroup.VictimFace:
			return hostcgroup.Victim(args[2:])
		}
	}
	return cli.Main(context.Background(), cli.Program{
		Version: version,
		Args:    args,
		Stdin:   os.Stdin,
		Stdout:  os.Stdout,
		Stderr:  os.Stderr,
	})
}
