package hostcgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start starts a command as its own Start does, but in the cgroup: the program has no moment outside
// of it. Under v2 clone3 puts the child there. v1 has nothing of that kind, but a child begins where the thread
// is that forks it, so this thread goes there and comes back. Without a cgroup it is the command's
// Start.
func (g *Group) Start(cmd *exec.Cmd) (err error) {
	g.mu.Lock()
	places, unified := g.places, g.unified
	g.mu.Unlock()
	if unified != "" {
		dir, err := os.OpenFile(unified, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
		defer dir.Close()
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	runtime.LockOSThread()
	defer func() {
		if leaveErr := leave(places); leaveErr != nil {
			if err == nil {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
			err = errors.Join(err, leaveErr)
			return // the thread stays locked: it ends with its goroutine
		}
		runtime.UnlockOSThread()
	}()
	for _, p := range places {
		if err := moveThread(p.in); err != nil {
			return err
		}
	}
	return cmd.Start()
}

// leave moves this thread back to where the process is.
func leave(places []place) error {
	var errs []error
	for _, p := range places {
		errs = append(errs, moveThread(p.own))
	}
	return errors.Join(errs...)
}

// moveThread moves this thread to a cgroup of v1. It names itself 0: by a number it would have to
// wait until all processes have stopped forking, which takes the kernel 15 ms.
func moveThread(dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, "tasks"), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	_, err = f.WriteString("0")
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}
