package pod

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/internal/state"
)

var (
	podStates       = []State{Idle, Starting, Running, Stopping, Stopped}
	containerStates = []state.Status{state.Creating, state.Created, state.Running, state.Paused, state.Stopped}
	processStates   = []ProcessState{ProcessCreating, ProcessCreated, ProcessRunning, ProcessExited}
)

// rows renders a transition table as the package comment shows it.
func rows[S ~string](name string, states []S, table map[S][]S) string {
	var b strings.Builder
	for _, from := range states {
		line := fmt.Sprintf("//\t%-10s %-9s ->", name, from)
		for _, to := range table[from] {
			line += " " + string(to)
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

func TestPackageCommentShowsTheTables(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	assert.NilError(t, err)
	want := rows("pod", podStates, podNext) +
		rows("container", containerStates, containerNext) +
		rows("process", processStates, processNext)
	assert.Assert(t, strings.Contains(string(doc), want), "doc.go should have\n%s", want)
}

func TestTablesEnd(t *testing.T) {
	// Every state is reachable, and from each the end is: no pod hangs in between.
	check := func(name string, states []string, next func(string) []string, begin, end string) {
		reach := func(from string) map[string]bool {
			seen := map[string]bool{from: true}
			for todo := []string{from}; len(todo) > 0; todo = todo[1:] {
				for _, s := range next(todo[0]) {
					if !seen[s] {
						seen[s] = true
						todo = append(todo, s)
					}
				}
			}
			return seen
		}
		for _, s := range states {
			assert.Assert(t, reach(begin)[s], "%s: %s cannot be reached", name, s)
			assert.Assert(t, reach(s)[end], "%s: no way from %s to %s", name, s, end)
		}
		assert.Equal(t, len(next(end)), 0)
	}
	check("pod", strs(podStates), func(s string) []string { return strs(podNext[State(s)]) }, "idle", "stopped")
	check("container", strs(containerStates), func(s string) []string { return strs(containerNext[state.Status(s)]) }, "creating", "stopped")
	check("process", strs(processStates), func(s string) []string { return strs(processNext[ProcessState(s)]) }, "creating", "exited")
}

func strs[S ~string](in []S) (out []string) {
	for _, s := range in {
		out = append(out, string(s))
	}
	return out
}

func TestPolicyAnswersForEachVerbAndStatus(t *testing.T) {
	accepted := map[verb][]state.Status{
		verbStart:       {state.Created},
		verbExec:        {state.Created, state.Running},
		verbSignal:      {state.Created, state.Running, state.Paused},
		verbPause:       {state.Created, state.Running},
		verbResume:      {state.Paused},
		verbUpdate:      {state.Created, state.Running, state.Paused},
		verbInspect:     {state.Created, state.Running, state.Paused},
		verbJoin:        {state.Created, state.Running, state.Paused},
		verbDelete:      {state.Created, state.Stopped},
		verbForceDelete: containerStates,
	}
	assert.Equal(t, len(accepted), len(denials))
	for v, ok := range accepted {
		for _, s := range containerStates {
			err := admit(v, "web", s)
			want := false
			for _, a := range ok {
				want = want || a == s
			}
			assert.Equal(t, err == nil, want, "%s %s: %v", v, s, err)
			if err != nil {
				assert.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
				assert.Assert(t, !strings.ContainsAny(err.Error(), "{}%"), err.Error())
			}
		}
	}
	assert.ErrorContains(t, admit(verbDelete, "web", state.Running), "cannot delete container web that is not stopped: running")
}

func TestPolicyForNewContainers(t *testing.T) {
	for _, s := range podStates {
		assert.ErrorIs(t, admitCreate(s, "web", true), errdefs.ErrAlreadyExists)
		err := admitCreate(s, "web", false)
		if s == Stopping || s == Stopped {
			assert.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		} else {
			assert.NilError(t, err)
		}
	}
}
