package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/caller"
	"runv/internal/config"
)

const (
	// diedGrace is how long a dead supervisor may not be known to be dead.
	diedGrace = 50 * time.Millisecond
	// readyTimeout bounds the time from the start of a supervisor to its
	// listening sockets. No VM is started in it.
	readyTimeout = 10 * time.Second
	// lastWords is how much of a supervisor's log an error carries.
	lastWords = 2 << 10
	maxReady  = 16 << 10 // bytes of a supervisor's error
	readyWord = "ok"
)

// supervisorProcess is a supervisor that this command has started. It outlives
// the command unless kill is called.
type supervisorProcess struct {
	process *os.Process
	done    chan struct{} // closed when it has been reaped
	end     error         // how it ended, after done; nil: in good order
}

// launch starts the supervisor of a pod and returns when its sockets listen. It
// is a session of its own without any of our files, so that nobody who waits
// for the end of our output waits for it, and with nothing else of our caller's.
func (a *app) launch(ctx context.Context, cfg *config.Effective, podID, podDir string) (_ *supervisorProcess, err error) {
	logFile, err := os.OpenFile(filepath.Join(podDir, "supervisor.log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	defer logFile.Close()
	ready, readyWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	defer ready.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	closeInherited()
	cmd := exec.Command(self, a.supervisorArgs(cfg, podID)...)
	cmd.Args[0] = "runv"
	cmd.Dir = "/"
	cmd.Env = append(supervisorEnv(os.Environ()), absolutePaths(cfg)...)
	cmd.Stderr = logFile
	cmd.ExtraFiles = []*os.File{readyWrite}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = caller.Leave(cmd.Start)
	readyWrite.Close()
	if err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	p := &supervisorProcess{process: cmd.Process, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.end = cmd.Wait()
	}()
	if err := awaitReady(ctx, ready); err != nil {
		p.kill()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("it ended: %s", tail(logFile))
		}
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	return p, nil
}

// supervisorArgs makes the supervisor read the configuration that we have read.
func (a *app) supervisorArgs(cfg *config.Effective, podID string) []string {
	args := []string{"supervisor", "--root", a.root, "--pod", podID}
	if cfg.File != "" {
		args = append(args, "--config", absolute(cfg.File))
	}
	if a.guestDir != "" {
		args = append(args, "--guest-dir", cfg.GuestDir)
	}
	if a.systemdCgroup {
		args = append(args, "--systemd-cgroup")
	}
	if a.debug {
		args = append(args, "--debug")
	}
	return args
}

// supervisorEnv is what a supervisor gets of our environment: what it or a library of its reads. It lives long, and the
// rest, which may hold secrets, is not for it. Hooks get theirs with each request.
func supervisorEnv(all []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		switch name {
		case "PATH", "TZ", "TMPDIR", "XDG_RUNTIME_DIR":
			return false
		}
		return !slices.ContainsFunc([]string{"RUNV_", "DBUS_", "GO"}, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
	})
}

// absolutePaths are the paths that the environment gives, for a process that
// works in another directory.
func absolutePaths(cfg *config.Effective) []string {
	var env []string
	for _, k := range config.Keys() {
		path := map[string]string{
			"qemu": cfg.QEMU, "pasta": cfg.Pasta, "guest_dir": cfg.GuestDir, "kernel": cfg.Kernel, "initrd": cfg.Initrd,
		}[k.Name]
		if path != "" && cfg.Origins[k.Name].Kind == "env" {
			env = append(env, k.Env()+"="+path)
		}
	}
	return env
}

// absolute makes a path valid for a process that works in another directory.
func absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		return path // there is no working directory; the reader of the path says so
	}
	return abs
}

// awaitReady reads what a supervisor says when it listens or cannot.
// io.ErrUnexpectedEOF when it ended without a word.
func awaitReady(ctx context.Context, ready *os.File) error {
	if err := ready.SetReadDeadline(time.Now().Add(readyTimeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Now()) })
	defer stop()
	data, err := io.ReadAll(io.LimitReader(ready, maxReady))
	text := strings.TrimSpace(string(data))
	switch {
	case text == readyWord:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case text != "":
		return errors.New(text)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it does not listen after %s", readyTimeout)
	case err != nil:
		return err
	}
	return io.ErrUnexpectedEOF
}

// died tells which signal ended the supervisor, if one did. It looks for a moment,
// since who notices its end by a broken connection is quicker than who waits for it.
func (p *supervisorProcess) died() error {
	select {
	case <-p.done:
		var exit *exec.ExitError
		if errors.As(p.end, &exit) && !exit.Exited() {
			return p.end
		}
		return nil
	case <-time.After(diedGrace):
		return nil
	}
}

// await waits for the supervisor to end by itself, for a time.
func (p *supervisorProcess) await(limit time.Duration) {
	select {
	case <-p.done:
	case <-time.After(limit):
	}
}

// kill ends the supervisor, and with it all its children, and waits for it.
func (p *supervisorProcess) kill() {
	_ = p.process.Kill()
	<-p.done // SIGKILL needs no deadline
}

// tail is the last text in a log, or a word that there is none.
func tail(f *os.File) string {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err.Error()
	}
	data := make([]byte, min(end, lastWords))
	n, _ := f.ReadAt(data, end-int64(len(data)))
	if text := strings.TrimSpace(string(data[:n])); text != "" {
		return text
	}
	return "without a word"
}

// closeInherited keeps the files that our caller has left open to us from our
// children: a supervisor that inherits the end of a pipe would keep whoever
// reads the other end waiting for as long as the pod lives. Old kernels lack the
// call; there the callers' files are inherited.
func closeInherited() {
	_ = unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
}
