package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"runv/internal/state"
)

// setScores tells the host's kernel whom to kill first when the host is out of memory. A container's memory is that of
// the VMM, so what the container asks for, or has of its caller, is the VMM's and its helpers'. Of several containers
// the one counts that is to go first: a sandbox that engines protect must not keep a pod alive that takes the host's
// memory. A stand-in has its container's own, where callers look for it. The supervisor keeps its caller's: it ends with the VM.
// On the pod's goroutine.
func (p *Pod) setScores() {
	most, found := 0, false
	for _, c := range p.containers {
		if c.record.Status == state.Stopped {
			continue
		}
		if !found || c.oomScore > most {
			most, found = c.oomScore, true
		}
		p.setScore(c.record.StandIn.PID, c.oomScore)
	}
	if !found {
		return
	}
	for _, proc := range p.record.VM {
		p.setScore(proc.PID, most)
	}
}

// setScore changes the score of a process, which may have ended. Without the right to lower one it stays as it is.
func (p *Pod) setScore(pid, score int) {
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	if err := os.WriteFile(path, strconv.AppendInt(nil, int64(score), 10), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.log.Debug("set OOM score", "pid", pid, "score", score, "err", err)
	}
}
