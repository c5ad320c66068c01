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

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Callers learn that memory ran out in a container by watching its cgroup: Docker's and Podman's report of OOMKilled
// has no other source. When it runs out in a VM, the guest's kernel kills, and the host's cgroup knows nothing
// of it. TellOOM makes the host's kernel say the same: for a moment it lowers the limit to little more than what is in
// use, and a process that is there for nothing else asks for more and is killed for it.
//
// The kernel kills who has most memory, and as if it had all that the limit allows, whoever has an oom_score_adj of 1000. But
// a process may have more memory than is counted in its cgroup, such as files that others have read first. So the victim takes
// as much beforehand as makes it the first choice for certain, or nothing is done.

const (
	// VictimFace is the first argument of the program that is killed, which calls Victim.
	VictimFace = "oomvictim"

	victimTimeout = 3 * time.Second
	victimRoom    = 2 << 20   // bytes that the lowered limit leaves
	victimMemory  = 64 << 20  // bytes that the victim asks for then: more than can be reclaimed in an instant
	victimMargin  = 32 << 20  // bytes by which the kernel must prefer it to others
	victimMost    = 256 << 20 // bytes that it may take beforehand
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
	restore, err := lowerScores(dir)
	defer restore()
	if err != nil {
		return err
	}
	size, err := victimSize(dir)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", VictimFace, strconv.FormatInt(size, 10))
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
	raise, err := lowerLimit(dir, func(limit int64) error {
		most, err := mostMemory(dir, limit, cmd.Process.Pid)
		if err == nil && limit+size < most+victimMargin {
			err = errAnother
		}
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, raise())
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

// lowerScores makes the kernel go by the memory of a cgroup's processes alone: one that is to be killed early when the host
// has no memory left, as engines say of some, could else be killed in the victim's place. restore gives them
// their scores back.
func lowerScores(dir string) (restore func(), err error) {
	before := map[int]int{}
	restore = func() {
		for pid, score := range before {
			_ = os.WriteFile(scorePath(pid), strconv.AppendInt(nil, int64(score), 10), 0) // it may have ended
		}
	}
	pids, err := cgroups.GetAllPids(dir)
	if err != nil {
		return restore, err
	}
	for _, pid := range pids {
		score, err := readScore(pid)
		if err != nil || score <= 0 {
			continue // it has ended, or comes late by itself
		}
		if err := os.WriteFile(scorePath(pid), []byte("0"), 0); err == nil {
			before[pid] = score
		} else if !errors.Is(err, os.ErrPermission) && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return restore, err
		} // else mostMemory has a look whether it is in the way
	}
	return restore, nil
}

func scorePath(pid int) string { return fmt.Sprintf("/proc/%d/oom_score_adj", pid) }

func readScore(pid int) (int, error) {
	data, err := os.ReadFile(scorePath(pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

var errAnother = errors.New("the kernel might kill another process")

// victimSize is how many bytes the victim must have for the kernel to choose it.
func victimSize(dir string) (int64, error) {
	used, _, err := readMemory(dir)
	if err != nil {
		return 0, err
	}
	most, err := mostMemory(dir, used+victimRoom+victimMost, 0)
	if err != nil {
		return 0, err
	}
	// What it has counts twice: in the limit, which follows what is in use, and by itself.
	size := max(most+2*victimMargin-used, 0) / 2
	if size > victimMost {
		return 0, errAnother
	}
	return size, nil
}

// mostMemory is what the kernel goes by, in bytes, of the process that comes first in a cgroup with this limit, one
// left out.
func mostMemory(dir string, limit int64, except int) (most int64, err error) {
	pids, err := cgroups.GetAllPids(dir)
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		if pid == except {
			continue
		}
		score, err := readScore(pid)
		if err != nil {
			continue // it has gone
		}
		most = max(most, scored(pid)+max(int64(score), 0)*(limit/1000)) // containerd's shims, for one, have 1
	}
	return most, nil
}

// scored is how much memory of a process the kernel goes by, in bytes.
func scored(pid int) (sum int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		switch fields := strings.Fields(line); {
		case len(fields) < 2:
		case fields[0] == "VmRSS:", fields[0] == "VmSwap:", fields[0] == "VmPTE:":
			n, _ := strconv.ParseInt(fields[1], 10, 64)
			sum += n << 10
		}
	}
	return sum
}

// readMemory reads how much memory a cgroup uses, and which of memoryFiles it has.
func readMemory(dir string) (used int64, files [2]string, err error) {
	for _, files = range memoryFiles {
		data, err := os.ReadFile(filepath.Join(dir, files[1]))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, files, err
		}
		used, err = strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		return used, files, err
	}
	return 0, files, errors.New("it does not tell what is in use")
}

// lowerLimit sets a cgroup's limit of memory to what is in use and a little more, unless it is lower, if check has
// nothing against what the limit is then.
func lowerLimit(dir string, check func(limit int64) error) (restore func() error, err error) {
	used, files, err := readMemory(dir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, files[0])
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	old := strings.TrimSpace(string(data))
	was, err := strconv.ParseUint(old, 10, 64)
	if err != nil || was >= unlimited {
		was = unlimited
		if files == memoryFiles[0] {
			old = "-1"
		}
	}
	for try := 0; ; try++ { // what is in use changes meanwhile
		limit := min(used+victimRoom, int64(was))
		if err := check(limit); err != nil {
			return nil, err
		}
		if uint64(limit) == was {
			return func() error { return nil }, nil
		}
		err = os.WriteFile(path, strconv.AppendInt(nil, limit, 10), 0)
		if err == nil {
			return func() error { return os.WriteFile(path, []byte(old), 0) }, nil
		}
		if !errors.Is(err, unix.EBUSY) || try == 10 {
			return nil, err
		}
		if used, _, err = readMemory(dir); err != nil {
			return nil, err
		}
	}
}

// Victim is the main function of the process that TellOOM has killed: its argument is how many bytes it takes
// beforehand. It returns only when it was not killed.
func Victim(args []string) int {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil || len(args) != 1 {
		return 1
	}
	size, err := strconv.Atoi(args[0])
	if err != nil || size < 0 || size > victimMost || touch(size) != nil {
		return 1
	}
	if _, err := os.Stdout.Write([]byte{0}); err != nil {
		return 1
	}
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return 1
	}
	_ = touch(victimMemory)
	return 1
}

// touch takes memory, for good.
func touch(size int) error {
	if size == 0 {
		return nil
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	for i := 0; i < len(memory); i += 4096 {
		memory[i] = 1
	}
	return err
}
