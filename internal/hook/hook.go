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

// Surroundings are what the hooks of one list have in common.
type Surroundings struct {
	// Dir is the working directory; "/" when there is none such.
	Dir string
	// State is what each hook reads on its standard input.
	State []byte
	// Env is the environment of the hooks that have none of their own.
	Env []string
	// Confine, unless nil, is called once on the calling thread, before the first hook is started. What
	// it does to the thread, such as loading a filter of system calls, holds for the hooks; after it this
	// package does nothing on that thread but start them.
	Confine func() error
}

// Run runs hooks in their order, and stops at the first that fails. Its error names the hook:
// "hooks.prestart[0] /bin/x: exit status 1: " and the end of what the hook has written. A
// hook fails when it cannot be started, does not exit with 0, or takes longer than its timeout; at
// the timeout, and when ctx ends, its process group is killed.
//
// Hooks get no file but their standard ones. They are born on the calling thread, so they get its
// namespaces, its root and its rights, and they die with it.
func Run(ctx context.Context, phase Phase, hooks []specs.Hook, s Surroundings) error {
	if s.Confine != nil && len(hooks) > 0 {
		if err := s.Confine(); err != nil {
			return err
		}
	}
	for i, h := range hooks {
		if err := context.Cause(ctx); err != nil {
			return named(phase, i, h, err)
		}
		if err := run(ctx, h, s); err != nil {
			return named(phase, i, h, err)
		}
	}
	return nil
}

// RunAll runs hooks as Run does, but all of them: the error joins those of the ones that fail. A
// hook without a timeout gets Unbounded. Surroundings have no Confine.
func RunAll(ctx context.Context, phase Phase, hooks []specs.Hook, s Surroundings) error {
	var errs []error
	for i, h := range hooks {
		if h.Timeout == nil {
			h.Timeout = new(int(Unbounded / time.Second))
		}
		if err := run(ctx, h, s); err != nil {
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

// prepared is what a hook that is to be started needs.
type prepared struct {
	dir   string
	env   []string
	stdin *os.File // a file in memory, so nobody has to wait until it is read
	out   *output
	w     *os.File  // where it writes
	files []uintptr // its descriptors 0, 1 and 2
}

func prepare(h specs.Hook, s Surroundings) (_ *prepared, err error) {
	p := &prepared{dir: s.Dir, env: h.Env}
	if st, err := os.Stat(s.Dir); err != nil || !st.IsDir() {
		p.dir = "/"
	}
	if len(p.env) == 0 {
		p.env = s.Env
	}
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memfd: %w", err)
	}
	p.stdin = os.NewFile(uintptr(fd), "state")
	defer func() {
		if err != nil {
			_ = p.stdin.Close()
		}
	}()
	if _, err := p.stdin.Write(s.State); err != nil {
		return nil, fmt.Errorf("write state: %w", err)
	}
	if _, err := p.stdin.Seek(0, 0); err != nil {
		return nil, fmt.Errorf("write state: %w", err)
	}
	if p.out, p.w, err = newOutput(); err != nil {
		return nil, err
	}
	p.files = []uintptr{p.stdin.Fd(), p.w.Fd(), p.w.Fd()}
	return p, nil
}

func (p *prepared) close() {
	_ = p.stdin.Close()
	_ = p.w.Close()
	p.out.close()
}

// run runs a hook.
func run(ctx context.Context, h specs.Hook, s Surroundings) (err error) {
	// The thread must outlive the child: its end is the parent's death to a child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if h.Timeout != nil {
		limit := timeout(h)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, fmt.Errorf("did not end within %s", limit))
		defer cancel()
	}
	here := func(f func()) { f() } // the thread has the file system that the paths are of
	if s.Confine != nil {
		here = elsewhere
	}
	var p *prepared
	here(func() { p, err = prepare(h, s) })
	if err != nil {
		return err
	}
	defer here(p.close)
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	// Not os.StartProcess: it tries out system calls that the hook does without, and a filter
	// may kill who makes them.
	pid, _, err := syscall.StartProcess(h.Path, args, &syscall.ProcAttr{
		Dir: p.dir, Env: p.env, Files: p.files,
		Sys: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL},
	})
	if err != nil {
		return err
	}
	here(func() { _ = p.w.Close() })
	if err = await(ctx, pid); err == nil {
		return nil
	}
	if text := p.out.tail(); text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// elsewhere calls f on another thread than the caller's, which is locked.
func elsewhere(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

// await waits for a hook, and kills its process group when ctx ends. The caller's thread does nothing
// but wait for it.
func await(ctx context.Context, pid int) error {
	exited, killed := make(chan struct{}), make(chan error, 1)
	result := make(chan error, 1)
	go func() {
		select {
		case <-exited:
			killed <- nil
		case <-ctx.Done():
			// It has not been waited for, so the group is still its own.
			_ = unix.Kill(-pid, unix.SIGKILL)
			killed <- context.Cause(ctx)
		}
	}()
	go func() {
		awaitExit(pid)
		close(exited)
		cause := <-killed
		var status syscall.WaitStatus
		_, err := syscall.Wait4(pid, &status, 0, nil)
		for errors.Is(err, unix.EINTR) {
			_, err = syscall.Wait4(pid, &status, 0, nil)
		}
		switch {
		case cause != nil:
			result <- cause
		case err != nil:
			result <- fmt.Errorf("wait for it: %w", err)
		case status.Signaled():
			result <- fmt.Errorf("signal: %s", status.Signal())
		case status.ExitStatus() != 0:
			result <- fmt.Errorf("exit status %d", status.ExitStatus())
		default:
			result <- nil
		}
	}()
	return <-result
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
