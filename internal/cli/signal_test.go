package cli_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"runv/internal/state"
)

// bundleOf makes a bundle that runs a program of the fake supervisor.
func bundleOf(t *testing.T, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	config := fmt.Sprintf(`{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["%s"],"cwd":"/"},`+
		`"root":{"path":"."},"linux":{"namespaces":[{"type":"mount"},{"type":"network"}]}}`, strings.Join(args, `","`))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600))
	return dir
}

func TestRunPassesSignalsOn(t *testing.T) {
	for sig, want := range map[unix.Signal]struct {
		status int
		stderr string
	}{
		unix.SIGTERM: {128 + 15, ""},
		unix.SIGINT:  {128 + 2, ""},
		unix.SIGHUP:  {128 + 1, ""},
		unix.SIGUSR1: {128 + 10, ""},
		// The fake takes this one as an order to die.
		unix.SIGUSR2: {137, "runv: run web: supervisor has gone, and the container's processes with it\n"},
	} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			root := t.TempDir()
			cmd := exec.CommandContext(t.Context(), "runv", "--root", root, "run", "--bundle", bundleOf(t, "wait"), "web")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			assert.NilError(t, err)
			assert.NilError(t, cmd.Start())
			line, err := bufio.NewReader(stdout).ReadString('\n')
			assert.NilError(t, err, stderr.String())
			assert.Equal(t, line, "waiting\n")
			assert.NilError(t, cmd.Process.Signal(sig))
			assert.ErrorContains(t, cmd.Wait(), fmt.Sprintf("exit status %d", want.status))
			assert.Equal(t, stderr.String(), want.stderr)
			left, err := os.ReadDir(filepath.Join(root, "pods"))
			assert.NilError(t, err)
			assert.Equal(t, len(left), 0)
		})
	}
}

func TestCreateThatIsInterruptedLeavesNothing(t *testing.T) {
	root := t.TempDir()
	store, err := state.Open(root)
	assert.NilError(t, err)
	cmd := exec.CommandContext(t.Context(), "runv", "--root", root, "create", "--bundle", bundleOf(t, "cat"), "web")
	cmd.Env = append(os.Environ(), "RUNV_FAKE=hangs")
	// The stand-in holds our end of the pipe for as long as it lives.
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	assert.NilError(t, cmd.Start())
	awaitListening(t, store)
	assert.NilError(t, cmd.Process.Signal(unix.SIGTERM))
	assert.ErrorContains(t, cmd.Wait(), "exit status 1")
	assert.Assert(t, strings.HasPrefix(stderr.String(), "runv: create web: "), stderr.String())
	left, _ := store.Containers()
	assert.Equal(t, len(left), 0)
	pods, _ := store.Pods()
	assert.Equal(t, len(pods), 0)
}

// awaitListening waits for a pod whose supervisor serves.
func awaitListening(t *testing.T, store *state.Store) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		pods, err := store.Pods()
		if err != nil || len(pods) == 0 {
			return poll.Continue("no pod yet: %v", err)
		}
		if _, err := os.Stat(filepath.Join(store.PodDir(pods[0].ID), "standin.sock")); err != nil {
			return poll.Continue("%v", err)
		}
		return poll.Success()
	}, poll.WithTimeout(10*time.Second), poll.WithDelay(5*time.Millisecond))
}
