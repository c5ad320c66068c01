package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/console"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu/qmp"
)

const (
	commandTimeout = 10 * time.Second // for a QMP command
	stopGrace      = 3 * time.Second  // for QEMU to obey quit
	drainTimeout   = time.Second      // to read what QEMU left in its sockets when it ended
	lostGrace      = 2 * time.Second  // from the unexpected end of the QMP connection to that of QEMU
	endGrace       = 30 * time.Second // the same when QEMU had said that it ends: it frees the guest's memory
	tailLines      = 8                // of the console and of stderr in errors
	panicLines     = 200              // of the console in which a panic is looked for
)

// vm is a running QEMU.
type vm struct {
	log     *slog.Logger
	id      string
	proc    *process
	qmp     *qmp.Client
	agent   net.Conn
	console *console.Log
	vmmLog  *console.Log
	copied  chan struct{} // closed when the console has been read to its end
	serial  *net.UnixConn
	info    hypervisor.Info
	done    chan struct{} // closed when all is over
	limits  hypervisor.Size
	slots   int           // for devices, that of the agent channel included
	resizer chan struct{} // holds a token while a Resize is at work

	mu       sync.Mutex // guards what follows; never held while waiting
	asked    bool       // Stop or Kill was called
	lost     bool       // QEMU lived on without QMP and was killed
	shutdown string     // reason in QEMU's SHUTDOWN event
	err      error      // see Err
	devices  map[string]*device
	size     hypervisor.Size
}

// newVM takes over what the launch acquired and reads the console from now on.
func newVM(log *slog.Logger, l *launch, proc *process) *vm {
	v := &vm{
		log:     log,
		id:      l.cfg.ID,
		proc:    proc,
		agent:   l.agent,
		console: l.consoleLog,
		vmmLog:  l.vmmLog,
		copied:  make(chan struct{}),
		serial:  l.console,
		info:    hypervisor.Info{PID: proc.cmd.Process.Pid, Command: proc.cmd.Args},
		done:    make(chan struct{}),
		devices: map[string]*device{},
		size:    hypervisor.Size{VCPUs: l.cfg.VCPUs, MemoryBytes: l.cfg.MemoryBytes},
		limits: hypervisor.Size{
			VCPUs: max(l.cfg.VCPUs, l.cfg.MaxVCPUs), MemoryBytes: max(l.cfg.MemoryBytes, l.cfg.MaxMemoryBytes),
		},
		resizer: make(chan struct{}, 1),
		slots:   bridges(len(l.cfg.Shares)) * bridgeSlots,
	}
	for i, s := range l.cfg.Shares {
		v.devices[s.ID] = newDevice(hypervisor.KindShare, slotOfShare(i))
	}
	go func() {
		defer close(v.copied)
		_, _ = io.Copy(v.console, v.serial) // ends with QEMU; the log never fails
	}()
	return v
}

// connect waits until QEMU can be controlled. When that fails the VM has ended.
func (v *vm) connect(ctx context.Context, conn *net.UnixConn) error {
	client, err := qmp.New(ctx, conn, v.event)
	if err == nil {
		v.qmp = client
		v.info.Version = client.Version()
		go v.supervise()
		return nil
	}
	// The usual reason is that QEMU found its configuration wanting and is about to
	// end: let it say so.
	gone := false
	if ctx.Err() == nil {
		gone = v.exits(lostGrace)
	}
	if !gone {
		err = errors.Join(err, v.proc.kill())
	}
	<-v.proc.exited
	v.release()
	if gone {
		return v.exitError(v.proc.status())
	}
	return err
}

// exits waits for QEMU's end for a while.
func (v *vm) exits(within time.Duration) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-v.proc.exited:
		return true
	case <-timer.C:
		return false
	}
}

// supervise owns the end of the VM.
func (v *vm) supervise() {
	select {
	case <-v.proc.exited:
	case <-v.qmp.Done():
		grace := lostGrace
		if v.ending() {
			grace = endGrace
		}
		if !v.exits(grace) {
			v.mu.Lock()
			v.lost = true
			v.mu.Unlock()
			if err := v.proc.kill(); err != nil {
				v.log.Error("kill VMM without QMP connection", "err", err)
			}
			<-v.proc.exited
		}
	}
	// The last events may still be unread.
	timer := time.NewTimer(drainTimeout)
	defer timer.Stop()
	select {
	case <-v.qmp.Done():
	case <-timer.C:
	}
	v.qmp.Close()
	v.release()
	err := v.verdict()
	v.mu.Lock()
	v.err = err
	v.mu.Unlock()
	v.log.Info("VM has ended", "after", time.Since(v.proc.started), "err", err)
	close(v.done)
}

// release gives back all but the process and the QMP connection. The logs stay
// readable in memory.
func (v *vm) release() {
	_ = v.serial.SetReadDeadline(time.Now().Add(drainTimeout)) // fails only when closed
	<-v.copied
	for _, c := range []io.Closer{v.serial, v.agent, v.console, v.vmmLog} {
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			v.log.Warn("close file of VM", "err", err)
		}
	}
}

// verdict tells why the VM ended, after its end.
func (v *vm) verdict() error {
	v.mu.Lock()
	asked, lost, shutdown := v.asked, v.lost, v.shutdown
	v.mu.Unlock()
	status := v.proc.status()
	_, panicked := v.lastWords()
	switch {
	case asked, shutdown == "guest-shutdown":
		return nil
	case shutdown == "guest-panic", shutdown == "guest-reset" && panicked:
		return v.exitError("guest kernel panicked")
	case shutdown == "guest-reset":
		return v.exitError("guest reset itself")
	case lost:
		return v.exitError("QMP connection lost, then " + status)
	case shutdown != "":
		return v.exitError(fmt.Sprintf("%s (%.40q)", status, shutdown))
	}
	return v.exitError(status)
}

// ending tells whether an end of QEMU is expected.
func (v *vm) ending() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.asked || v.shutdown != ""
}

// lastWords is the end of the console, or its part from a kernel's panic on. The
// guest can write there what it likes, so a panic there only chooses words.
func (v *vm) lastWords() (lines []string, panicked bool) {
	lines = v.console.Tail(panicLines)
	for i, line := range slices.Backward(lines) {
		if strings.Contains(line, "Kernel panic - not syncing") {
			return lines[min(i, max(0, len(lines)-tailLines)):][:min(tailLines, len(lines))], true
		}
	}
	return lines[max(0, len(lines)-tailLines):], false
}

func (v *vm) exitError(status string) *hypervisor.ExitError {
	lines, _ := v.lastWords()
	return &hypervisor.ExitError{
		Status:  status,
		After:   time.Since(v.proc.started),
		Stderr:  strings.Join(v.vmmLog.Tail(tailLines), "\n"),
		Console: lines,
	}
}

// event takes note of QEMU's events. It runs in the QMP reader.
func (v *vm) event(e qmp.Event) {
	var data struct {
		Reason string `json:"reason"`
		Device string `json:"device"`
	}
	if err := json.Unmarshal(e.Data, &data); err != nil && e.Data != nil {
		v.log.Warn("parse QMP event", "event", e.Name, "err", err)
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch e.Name {
	case "SHUTDOWN":
		if v.shutdown == "" {
			v.shutdown = data.Reason
		}
	case "DEVICE_DELETED":
		for id, d := range v.devices {
			if data.Device == deviceName(id) {
				d.setDeleted()
			}
		}
	}
}

// Agent implements hypervisor.VM.
func (v *vm) Agent() net.Conn { return v.agent }

// Console implements hypervisor.VM.
func (v *vm) Console() *console.Log { return v.console }

// Done implements hypervisor.VM.
func (v *vm) Done() <-chan struct{} { return v.done }

// Info implements hypervisor.VM.
func (v *vm) Info() hypervisor.Info {
	info := v.info
	info.Command = append([]string(nil), v.info.Command...)
	return info
}

// Err implements hypervisor.VM.
func (v *vm) Err() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.err
}

// Pause implements hypervisor.VM.
func (v *vm) Pause(ctx context.Context) error { return v.control(ctx, "pause", "stop") }

// Resume implements hypervisor.VM.
func (v *vm) Resume(ctx context.Context) error { return v.control(ctx, "resume", "cont") }

func (v *vm) control(ctx context.Context, verb, command string) error {
	if err := v.execute(ctx, command, nil); err != nil {
		return fmt.Errorf("%s VM %s: %w", verb, v.id, err)
	}
	return nil
}

// execute calls a QMP command that returns nothing, within commandTimeout.
func (v *vm) execute(ctx context.Context, command string, arguments any) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return v.ended(v.qmp.Execute(ctx, command, arguments, nil))
}

// ended gives the error of a call that the VM's end cut off its kind.
func (v *vm) ended(err error) error {
	if errors.Is(err, qmp.ErrClosed) {
		return hypervisor.Errorf(errdefs.ErrFailedPrecondition, "VM has ended: %w", err)
	}
	return err
}

// Stop implements hypervisor.VM.
func (v *vm) Stop(ctx context.Context) error {
	v.setAsked()
	grace, cancel := context.WithTimeout(ctx, stopGrace)
	defer cancel()
	err := v.qmp.Execute(grace, "quit", nil, nil)
	if err == nil || errors.Is(err, qmp.ErrClosed) {
		select {
		case <-v.done:
			return nil
		case <-grace.Done():
		}
	}
	if err := v.proc.kill(); err != nil {
		return fmt.Errorf("stop VM %s: %w", v.id, err)
	}
	select {
	case <-v.done:
	case <-ctx.Done():
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("stop VM %s: %w", v.id, context.Cause(ctx))
	}
	return nil
}

// Kill implements hypervisor.VM.
func (v *vm) Kill() error {
	v.setAsked()
	if err := v.proc.kill(); err != nil {
		return fmt.Errorf("kill VM %s: %w", v.id, err)
	}
	return nil
}

func (v *vm) setAsked() {
	v.mu.Lock()
	v.asked = true
	v.mu.Unlock()
}
