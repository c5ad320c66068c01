package engines

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// newDocker starts a dockerd whose default runtime is an oracle or runv. It ends with the test.
func newDocker(t testing.TB, runtime string) *engine {
	t.Helper()
	e := newEngine(t, "docker", runtime)
	e.cgroup = fmt.Sprintf("runv-docker-%d", os.Getpid())
	config, err := json.Marshal(map[string]any{
		"data-root":             e.path("data"),
		"exec-root":             e.path("exec"),
		"pidfile":               e.path("pid"),
		"hosts":                 []string{"unix://" + e.path("sock")},
		"runtimes":              map[string]any{runtime: map[string]any{"path": e.program}},
		"default-runtime":       runtime,
		"exec-opts":             []string{"native.cgroupdriver=cgroupfs"},
		"cgroup-parent":         "/" + e.cgroup,
		"log-level":             "warn",
		"live-restore":          true,
		"shutdown-timeout":      5,
		"bip":                   "10.209.0.1/24",
		"default-address-pools": []map[string]any{{"base": "10.210.0.0/16", "size": 24}},
	})
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(e.path("daemon.json"), config, 0o600))
	e.env = append(e.env, "DOCKER_HOST=unix://"+e.path("sock"), "DOCKER_CONFIG="+e.path("config"), "RUNTIME="+runtime)
	e.state = e.path("exec", "runtime-runc", "moby") // that of the shim, whatever the runtime
	d := &dockerd{engine: e}
	e.stop = d.stop
	e.builtin = map[string]func() error{"kill-and-restart-dockerd": d.restart}
	assert.NilError(t, d.start())
	e.ready()
	return e
}

// dockerd is the daemon, which a case may kill and start again.
type dockerd struct {
	*engine
	cmd   *exec.Cmd
	ended chan struct{} // closed when cmd has ended
}

// start starts the daemon and waits until it answers.
func (d *dockerd) start() error {
	log, err := os.OpenFile(d.path("log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd = d.command(context.Background(), "dockerd", "--config-file", d.path("daemon.json"))
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		return err
	}
	d.ended = make(chan struct{})
	go func() {
		defer close(d.ended)
		_ = d.cmd.Wait()
	}()
	deadline := time.After(time.Minute)
	for d.do("docker", "version").Code != 0 {
		select {
		case <-d.ended:
			return fmt.Errorf("dockerd has ended: %s", tail(d.path("log")))
		case <-deadline:
			return fmt.Errorf("dockerd does not answer: %s", tail(d.path("log")))
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// restart kills the daemon as a crash would, and starts it again.
func (d *dockerd) restart() error {
	if err := d.cmd.Process.Signal(unix.SIGKILL); err != nil {
		return err
	}
	<-d.ended
	// Its containerd dies with it, a little later; a new daemon would find it and use it.
	containerd, _ := os.ReadFile(d.path("exec", "containerd", "containerd.pid"))
	pid, err := strconv.Atoi(strings.TrimSpace(string(containerd)))
	if err != nil {
		return fmt.Errorf("containerd's pid: %w", err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; <-time.After(20 * time.Millisecond) {
		harness.ReapOrphans("containerd")
		if syscall.Kill(pid, 0) != nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("containerd %d lives on", pid)
		}
	}
	return d.start()
}

// stop ends the daemon, by force if it does not end by itself, and removes the mounts that it leaves.
func (d *dockerd) stop() {
	if d.Failed() {
		d.Logf("--- dockerd with %s\n%s", d.runtime, tail(d.path("log")))
	}
	if d.ended == nil {
		return
	}
	_ = d.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(30 * time.Second):
		d.Errorf("dockerd does not end at SIGTERM")
		_ = d.cmd.Process.Signal(unix.SIGKILL)
		<-d.ended
	}
	// The namespace for containers on the host's network stays, whatever the runtime, and after a kill its directory, too.
	for _, dir := range []string{d.path("exec", "netns", "default"), d.path("data")} {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
}

// tail is the end of a log.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-16<<10):])
}
