package pod

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/state"
)

func TestScores(t *testing.T) {
	var pids [3]int
	for i := range pids {
		cmd := exec.Command("sleep", "1000")
		assert.NilError(t, cmd.Start())
		t.Cleanup(func() {
			assert.Check(t, cmd.Process.Kill())
			_ = cmd.Wait()
		})
		pids[i] = cmd.Process.Pid
	}
	scores := func() (all string) {
		for _, pid := range pids {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
			assert.NilError(t, err)
			all += strings.TrimSpace(string(data)) + " "
		}
		return all
	}
	of := func(pid, score int) *container {
		return &container{record: state.Container{Status: state.Running, StandIn: state.Process{PID: pid}}, oomScore: score}
	}
	p := &Pod{
		log:        slog.New(slog.DiscardHandler),
		containers: map[string]*container{"a": of(pids[0], 100), "b": of(pids[1], 300)},
	}
	p.record.VM = []state.Process{{PID: pids[2]}}
	p.setScores()
	assert.Equal(t, scores(), "100 300 300 ")
	p.containers["b"].record.Status = state.Stopped
	p.setScores()
	assert.Equal(t, scores(), "100 300 100 ")
	p.containers["a"].record.Status = state.Stopped
	p.setScores()
	assert.Equal(t, scores(), "100 300 100 ")
}
