package hostcgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Callers learn that memory ran out in a container by watching its cgroup: Docker's and Podman's report of OOMKilled
// has no other source. When it runs out in a VM, the guest's kernel kills, and the host's cgroup knows nothing
// of it. TellOOM makes the host's kernel say the same: for a moment it lowers the limit to little more than what is in
// use, and a process that is there for nothing else asks for more and is killed for it, before all others.

const (
	// VictimFace is the first argument of the program that is killed, which calls Victim.
	VictimFace = "oomvictim"

	victimTimeout = 3 * time.Second
	victimRoom    = 2 << 20  // bytes that the lowered limit leaves
	victimMemory  = 64 << 20 // bytes that the victim asks for: more than can be reclaimed in an instant
)

// memoryFiles are the files of the limit and of what is in use, of v1 and of v2.
var memoryFiles = [][2]string{{"memory.limit_in_bytes", "memory.usage_in_bytes"}, {"memory.max", "memory.current"}}

// TellOOM makes the cgroup's watchers see that memory ran out. It takes a few milliseconds, 6 seconds at most, does
// nothing without a cgroup or a memory controller, and does not count for OOM.
func (g *Group) TellOOM() error {
	g.mu.Lock()
	dir := ""
	if g.manager != nil {
		dir = g.manager.Path("memory")
	}
	g.mu.Unlock()
	if !isCgroup(dir) {
		return nil
	}
	if err := g.tellOOM(dir); err != nil {
		return fmt.Errorf("tell of want of memory in %s: %w", dir, err)
	}
	return nil
}

func (g *Group) tellOOM(dir string) (err error) {
	cmd := exec.Command("/proc/self/exe", VictimFace)
	cmd.Args[0] = "runv"
	cmd.Env = []string{"GOMAXPROCS=1", "GOTRACEBACK=none"}
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer readyR.Close()
	cmd.Stdout = readyW
	goR, goW, err := os.Pipe()
	if err != nil {
		return errors.Join(err, readyW.Close())
	}
	defer goW.Close()
	cmd.Stdin = goR
	err = g.Start(cmd)
	_ = readyW.Close()
	_ = goR.Close()
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	defer func() {
		_ = cmd.Process.Kill()
		<-ended
	}()
	if err := readyR.SetReadDeadline(time.Now().Add(victimTimeout)); err != nil {
		return err
	}
	if _, err := io.ReadFull(readyR, make([]byte, 1)); err != nil {
		return fmt.Errorf("start a process: %w", err)
	}

	g.mu.Lock()
	defer g.mu.Unlock()
	if g.manager == nil {
		return nil // removed meanwhile
	}
	restore, err := lowerLimit(dir)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, restore())
		g.kills = g.oomKills()
	}()
	if _, err := goW.Write([]byte{0}); err != nil {
		return err
	}
	select {
	case <-ended:
	case <-time.After(victimTimeout):
		return fmt.Errorf("the kernel killed nothing in %s", victimTimeout)
	}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
		return errors.New("the kernel killed nothing")
	}
	return nil
}

// lowerLimit sets a cgroup's limit of memory to what is in use and a little more, unless it is lower.
func lowerLimit(dir string) (restore func() error, err error) {
	for _, files := range memoryFiles {
		path := filepath.Join(dir, files[0])
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		old := strings.TrimSpace(string(data))
		if files[0] == memoryFiles[0][0] {
			if n, err := strconv.ParseUint(old, 10, 64); err == nil && n >= unlimited {
				old = "-1"
			}
		}
		restore = func() error { return os.WriteFile(path, []byte(old), 0) }
		for try := 0; ; try++ { // what is in use changes meanwhile
			data, err := os.ReadFile(filepath.Join(dir, files[1]))
			if err != nil {
				return nil, err
			}
			used, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
			if err != nil {
				return nil, err
			}
			limit := used + victimRoom
			if n, err := strconv.ParseInt(old, 10, 64); err == nil && n >= 0 && n <= limit {
				return func() error { return nil }, nil
			}
			err = os.WriteFile(path, strconv.AppendInt(nil, limit, 10), 0)
			if err == nil {
				return restore, nil
			}
			if !errors.Is(err, unix.EBUSY) || try == 10 {
				return nil, err
			}
		}
	}
	return nil, errors.New("there is no limit of memory to set")
}

// Victim is the main function of the process that TellOOM has killed. It returns only when it was not.
func Victim() int {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil {
		return 1
	}
	if _, err := os.Stdout.Write([]byte{0}); err != nil {
		return 1
	}
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return 1
	}
	memory, err := unix.Mmap(-1, 0, victimMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 1
	}
	for i := 0; i < len(memory); i += 4096 {
		memory[i] = 1
	}
	return 1
}
