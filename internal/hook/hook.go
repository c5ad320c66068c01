// Package hook runs the OCI hooks of a container, one list after the other as its callers say.
//
// Hooks of the host are run by a container's supervisor (internal/pod decides when), and by the
// command line when it deletes a container whose supervisor is dead; those of the container by its
// stage in the guest (internal/guest/stage). The package decides nothing about a container, and
// knows no other package of ours: it is one of the few that host and guest share.
package hook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Phase is a moment in a container's life at which hooks run, by its name in config.json.
type Phase string

// The phases, in their order.
const (
	Prestart        Phase = "prestart"
	CreateRuntime   Phase = "createRuntime"
	CreateContainer Phase = "createContainer"
	StartContainer  Phase = "startContainer"
	Poststart       Phase = "poststart"
	Poststop        Phase = "poststop"
)

const (
	// Unbounded is how long a poststop hook may run that has no timeout: nobody may
	// be left to give up on it.
	Unbounded = time.Minute
	// maxOutput is how much of the end of a hook's output an error carries.
	maxOutput = 2 << 10
	// leftover is how long the output of a hook that has ended is waited for: processes that it has
	// left in the background may hold it open for ever.
	leftover = time.Second
	// maxTimeout keeps seconds from overflowing a Duration.
	maxTimeout = 1 << 31
)

// Run runs hooks in their order, each with the state on its standard input and dir as its working
// directory ("/" when there is none such), and stops at the first that fails. Its error names the
// hook: "hooks.prestart[0] /bin/x: exit status 1: " and the end of what the hook has written. A
// hook fails when it cannot be started, does not exit with 0, or takes longer than its timeout; at
// the timeout, and when ctx ends, its process group is killed.
//
// Hooks get their own environment only, and no file but their standard ones. They are born on
// the calling thread, so they get its namespaces and its root, and they die with it.
func Run(ctx context.Context, phase Phase, hooks []specs.Hook, dir string, state []byte) error {
	for i, h := range hooks {
		if err := context.Cause(ctx); err != nil {
			return named(phase, i, h, err)
		}
		if err := run(ctx, h, dir, state); err != nil {
			return named(phase, i, h, err)
		}
	}
	return nil
}

// RunAll runs hooks as Run does, but all of them: the error joins those of the ones that fail. A
// hook without a timeout gets Unbounded.
func RunAll(ctx context.Context, phase Phase, hooks []specs.Hook, dir string, state []byte) error {
	var errs []error
	for i, h := range hooks {
		if h.Timeout == nil {
			h.Timeout = new(int(Unbounded / time.Second))
		}
		if err := run(ctx, h, dir, state); err != nil {
			errs = append(errs, named(phase, i, h, err))
		}
	}
	return errors.Join(errs...)
}

// Timeouts is how long hooks may run with their timeouts; without stands for those that have none.
func Timeouts(hooks []specs.Hook, without time.Duration) (sum time.Duration) {
	for _, h := range hooks {
		if h.Timeout == nil {
			sum += without
			continue
		}
		sum += timeout(h)
	}
	return sum
}

func timeout(h specs.Hook) time.Duration {
	return time.Duration(min(*h.Timeout, maxTimeout)) * time.Second
}

func named(phase Phase, i int, h specs.Hook, err error) error {
	return fmt.Errorf("hooks.%s[%d] %s: %w", phase, i, h.Path, err)
}

func run(ctx context.Context, h specs.Hook, dir string, state []byte) error {
	// The thread must outlive the child: its end is the parent's death to a child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if h.Timeout != nil {
		limit := timeout(h)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, fmt.Errorf("did not end within %s", limit))
		defer cancel()
	}
	p, out, err := start(h, dir, state)
	if err != nil {
		return err
	}
	defer out.close()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		awaitExit(p.Pid)
	}()
	select {
	case <-exited:
	case <-ctx.Done():
		// It has not been waited for, so the group is still its own.
		err = context.Cause(ctx)
		_ = unix.Kill(-p.Pid, unix.SIGKILL)
		<-exited
	}
	ended, waitErr := p.Wait()
	switch {
	case err != nil:
	case waitErr != nil:
		err = waitErr
	case !ended.Success():
		err = errors.New(ended.String())
	default:
		return nil
	}
	if text := out.tail(); text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// awaitExit returns when a child has ended, and leaves it to be waited for: until then its pid is
// its own.
func awaitExit(pid int) {
	for {
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// start starts a hook. Its standard input is a file in memory, so nobody has to wait until it is
// read.
func start(h specs.Hook, dir string, state []byte) (*os.Process, *output, error) {
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("make memfd: %w", err)
	}
	stdin := os.NewFile(uintptr(fd), "state")
	defer stdin.Close()
	if _, err := stdin.Write(state); err != nil {
		return nil, nil, fmt.Errorf("write state: %w", err)
	}
	if _, err := stdin.Seek(0, 0); err != nil {
		return nil, nil, fmt.Errorf("write state: %w", err)
	}
	out, w, err := newOutput()
	if err != nil {
		return nil, nil, err
	}
	defer w.Close()
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = "/"
	}
	env := h.Env
	if env == nil {
		env = []string{} // nil would be our own
	}
	p, err := os.StartProcess(h.Path, args, &os.ProcAttr{
		Dir: dir, Env: env, Files: []*os.File{stdin, w, w},
		Sys: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL},
	})
	if err != nil {
		out.close()
		return nil, nil, cause(err)
	}
	return p, out, nil
}

// cause is an error without the path, which the caller tells.
func cause(err error) error {
	if at, ok := errors.AsType[*os.PathError](err); ok {
		return at.Err
	}
	return err
}

// output is the end of what a hook writes.
type output struct {
	r    *os.File
	done chan struct{} // closed when nothing more comes
	text []byte        // after done
}

// newOutput returns the file to write to, too, which the caller closes.
func newOutput() (*output, *os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	o := &output{r: r, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			o.text = append(o.text, buf[:n]...)
			if extra := len(o.text) - maxOutput; extra > 0 {
				o.text = append(o.text[:0], o.text[extra:]...)
			}
			if err != nil {
				return
			}
		}
	}()
	return o, w, nil
}

// tail waits for the rest and returns the end of it, in one line.
func (o *output) tail() string {
	_ = o.r.SetReadDeadline(time.Now().Add(leftover))
	<-o.done
	return string(bytes.Join(bytes.Fields([]byte(strings.ToValidUTF8(string(o.text), "?"))), []byte(" ")))
}

// close ends the reading, at once.
func (o *output) close() {
	_ = o.r.Close()
	<-o.done
}
