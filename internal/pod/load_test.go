package pod_test

import (
	"context"
	"io"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/poll"

	agentv1 "runv/api/agent/v1"
	"runv/internal/pod"
	"runv/internal/standin"
	"runv/internal/state"
)

// TestManyExecsAtOnce has more streams than the agent holds before they are asked for.
func TestManyExecsAtOnce(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))

	// The agent is slow: it looks at the streams of the first execs when no more calls come.
	const execs = 50
	called := make(chan struct{}, execs)
	look := make(chan struct{})
	w.agent.exec = func() error {
		called <- struct{}{}
		<-look
		return nil
	}
	done := make(chan error, execs)
	for i := range execs {
		token := w.standIn(byte(2 + i)).token
		go func() {
			_, _, err := w.pod.Exec(context.Background(), pod.ExecRequest{
				Container: "web", Process: []byte(`{"cwd":"/","args":["true"]}`), StandIn: token,
			})
			done <- err
		}()
	}
	for range 16 {
		<-called
	}
	select {
	case <-called:
		t.Error("the agent got more calls than it has room for their streams")
	case <-time.After(50 * time.Millisecond):
	}
	close(look)
	for range execs {
		assert.NilError(t, <-done)
	}
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
}

// TestCallerLeaves has callers that go away while the agent works: what it has done stands.
func TestCallerLeaves(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	called, leave := make(chan struct{}, 1), make(chan struct{})
	w.agent.start = func() error { called <- struct{}{}; <-leave; return nil }
	w.agent.exec = w.agent.start

	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan error, 1)
	go func() { started <- w.pod.Start(ctx, "web") }()
	<-called
	cancel()
	leave <- struct{}{}
	assert.NilError(t, <-started)
	assert.Equal(t, w.status("web"), state.Running)

	ctx, cancel = context.WithCancel(t.Context())
	c := w.standIn(2)
	go func() {
		_, _, err := w.pod.Exec(ctx, pod.ExecRequest{
			Container: "web", ExecID: "job", Process: []byte(`{"cwd":"/","args":["true"]}`), StandIn: c.token,
		})
		started <- err
	}()
	<-called
	cancel()
	client := <-c.client
	assert.NilError(t, client.Close())
	leave <- struct{}{}
	assert.NilError(t, <-started)
	assert.Equal(t, <-w.agent.signals, uint32(9), "a process without stand-in is killed")
	status, _, err := w.pod.Wait(t.Context(), "web", "job")
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(137))
}

// TestRefusedExecLetsGoOfStdio waits for the end of a pipe that only the supervisor holds.
func TestRefusedExecLetsGoOfStdio(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	request := pod.ExecRequest{Container: "web", ExecID: "job", Process: []byte(`{"cwd":"/","args":["true"]}`)}
	request.StandIn = w.standIn(2).token
	_, _, err = w.pod.Exec(t.Context(), request)
	assert.NilError(t, err)
	c := w.standIn(3)
	request.StandIn = c.token
	_, _, err = w.pod.Exec(t.Context(), request)
	assert.ErrorContains(t, err, "exists")
	_, err = io.ReadAll(c.stdout)
	assert.NilError(t, err)
}

// TestFullDisk records what has happened once there is room.
func TestFullDisk(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	w.disk.full.Store(true)
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	assert.Equal(t, w.status("web"), state.Created)
	w.disk.full.Store(false)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		return poll.Compare(cmp.Equal(w.status("web"), state.Running))
	})
}

// TestBackgroundOutput has a process that leaves another one behind, which writes on.
func TestBackgroundOutput(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	c := w.standIn(2)
	_, _, err = w.pod.Exec(t.Context(), pod.ExecRequest{
		Container: "web", ExecID: "job", Process: []byte(`{"cwd":"/","args":["true"]}`), StandIn: c.token,
	})
	assert.NilError(t, err)
	stdout := w.agent.stdout["web/job"]
	_, err = io.WriteString(stdout, "early\n")
	assert.NilError(t, err)
	w.agent.send(&agentv1.Event{ContainerId: "web", ExecId: "job", Kind: &agentv1.Event_Exit{Exit: &agentv1.Exit{Status: 4}}})
	w.agent.send(&agentv1.Event{ContainerId: "web", ExecId: "job", Kind: &agentv1.Event_Drained{Drained: &agentv1.Drained{StdoutBytes: 6}}})
	client := <-c.client
	status, err := client.Wait(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, status, uint32(4))
	_, err = client.Wait(t.Context())
	assert.ErrorIs(t, err, standin.ErrGone, "the stand-in was let go")

	_, err = io.WriteString(stdout, "late\n")
	assert.NilError(t, err)
	assert.NilError(t, stdout.Close())
	out, err := io.ReadAll(c.stdout)
	assert.NilError(t, err)
	assert.Equal(t, string(out), "early\nlate\n")
}

// TestShareEndsDuringShutdown has a guest that hangs in its shutdown for want of its files.
func TestShareEndsDuringShutdown(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	hangs := make(chan struct{})
	defer close(hangs)
	w.agent.shutdown = func() {
		close(w.share.done)
		<-hangs
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // less than a guest gets
	defer cancel()
	assert.NilError(t, w.pod.Shutdown(ctx))
}

// TestWaitTellsWhatIsRecorded reads the record as soon as the end of a container is known.
func TestWaitTellsWhatIsRecorded(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	w.agent.exit("web", "", "", 6)
	_, _, err = w.pod.Wait(t.Context(), "web", "")
	assert.NilError(t, err)
	record, err := w.store.LoadContainer("web")
	assert.NilError(t, err)
	assert.Assert(t, record.ExitStatus != nil)
	assert.Equal(t, *record.ExitStatus, uint32(6))
}
