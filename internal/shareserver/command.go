package shareserver

import (
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Face is the first argument of the program that calls Main.
const Face = "share"

const (
	listenerFD = 3
	controlFD  = 4
)

// Command returns the command of a server for a directory, which must be absolute. listener is a listening unix socket that
// the VMM connects to, once. control is one end of a connection: NewClient takes over the other, and the server ends when that
// is closed. The files stay the caller's, who may close them after the start.
//
// The caller sets what the command writes to, starts it and waits for it, from a thread that lives as long as the
// server is to: that is killed when the thread ends. The server ends with status 0 when the VMM has
// hung up or control was closed.
func Command(dir string, listener, control *os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", Face,
		"--dir="+dir, "--listener="+strconv.Itoa(listenerFD), "--control="+strconv.Itoa(controlFD))
	cmd.Args[0] = "runv"
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.ExtraFiles = []*os.File{listener, control}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: unix.SIGKILL}
	return cmd
}
