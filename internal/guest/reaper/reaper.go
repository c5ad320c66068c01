// Package reaper is the agent's only wait for child processes. PID 1 inherits
// every orphan of the guest, so no other code may call wait: it would race for
// the same children.
//
// internal/guest runs it, internal/guest/container starts its processes through it.
package reaper

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// Reaper reaps all children of this process.
type Reaper struct {
	log *slog.Logger

	// mu is held while a child is started and while children are reaped, so that
	// a child that ends at once is known before its status arrives.
	mu      sync.Mutex
	waiting map[int]func(status uint32) // by pid
}

// New makes a reaper. It reaps nothing until Run.
func New(log *slog.Logger) *Reaper {
	return &Reaper{log: log, waiting: make(map[int]func(uint32))}
}

// Start calls start, which forks and returns the child's pid, and has exited
// called once with the child's status: 0..255, 128+n after signal n. exited runs
// on the reaper's goroutine and must not block.
func (r *Reaper) Start(start func() (pid int, err error), exited func(status uint32)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := start()
	if err != nil {
		return 0, err
	}
	r.waiting[pid] = exited
	return pid, nil
}

// Run reaps until ctx ends.
func (r *Reaper) Run(ctx context.Context) {
	sigs := make(chan os.Signal, 1) // one is enough: a signal says "at least one"
	signal.Notify(sigs, unix.SIGCHLD)
	defer signal.Stop(sigs)
	for {
		r.reap()
		select {
		case <-ctx.Done():
			return
		case <-sigs:
		}
	}
}

type exit struct {
	call   func(uint32)
	status uint32
}

// reap takes all children that have ended.
func (r *Reaper) reap() {
	for _, e := range r.collect() {
		e.call(e.status)
	}
}

func (r *Reaper) collect() (exits []exit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if pid <= 0 {
			return exits // none has ended, or there are none
		}
		if !ws.Exited() && !ws.Signaled() {
			continue
		}
		call, ok := r.waiting[pid]
		if !ok {
			r.log.Debug("reaped an orphan", "pid", pid)
			continue
		}
		delete(r.waiting, pid)
		exits = append(exits, exit{call: call, status: status(ws)})
	}
}

func status(ws unix.WaitStatus) uint32 {
	if ws.Signaled() {
		return 128 + uint32(ws.Signal())
	}
	return uint32(ws.ExitStatus())
}
