// Package guest is runv-agent: PID 1 of the virtual machine. cmd/runv-agent calls
// Run. It boots the machine with guest/boot, reaps with guest/reaper, and serves the
// host with guest/server until the host ends the machine.
//
// The process of PID 1 must not end, as the kernel panics then: on a fatal error
// it says why on the console, and switches the machine off.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/guest/boot"
	"runv/internal/guest/cgroup"
	"runv/internal/guest/container"
	"runv/internal/guest/eventlog"
	"runv/internal/guest/mirror"
	"runv/internal/guest/network"
	"runv/internal/guest/reaper"
	"runv/internal/guest/server"
	"runv/internal/transport"
)

// Run is the life of PID 1. It does not return.
func Run(version string) {
	phases := map[string]float64{"kernel": boot.Uptime()}
	level := new(slog.LevelVar)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	defer boot.PowerOff(log)
	survive(log)
	defer func() {
		if r := recover(); r != nil {
			log.Error("panic", "reason", r, "stack", string(debug.Stack()))
		}
	}()
	m := &machine{version: version, log: log, phases: phases}
	if err := m.boot(level); err != nil {
		log.Error("boot", "error", err)
		return
	}
	if err := m.serve(context.Background()); err != nil {
		log.Error("agent", "error", err)
	}
}

// survive makes the agent harder to end for processes that share its pid namespace:
// nobody but the kernel may look into it or end it. Signals are caught and not
// ignored, as children inherit what is ignored.
func survive(log *slog.Logger) {
	sink := make(chan os.Signal, 1)
	for n := unix.Signal(1); n <= lastSignal; n++ {
		switch n {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPROF: // the reaper's, the Go runtime's
		default:
			signal.Notify(sink, n)
		}
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		log.Error("protect the agent", "error", err)
	}
}

const lastSignal = 64

// boot makes a usable machine. What the channel to the host does not need and can fail
// without harm to most containers is logged only.
func (m *machine) boot(level *slog.LevelVar) error {
	if err := boot.Mount(); err != nil {
		return err
	}
	if boot.Debug() {
		level.Set(slog.LevelDebug)
	}
	m.phases["mounts"] = boot.Uptime()
	if err := boot.LoadModules(boot.EarlyModules); err != nil {
		return err
	}
	m.phases["modules"] = boot.Uptime()
	m.hotplug = boot.NewHotplug()
	for _, step := range []func() error{boot.RaiseLimits, boot.Loopback} {
		if err := step(); err != nil {
			m.log.Error("boot", "error", err)
		}
	}
	var err error
	m.late, err = boot.NewLate(boot.LateModules, m.log)
	return err
}

// shutdownTimeout bounds how long a shutdown waits for processes to end.
const shutdownTimeout = 10 * time.Second

// portTimeout bounds the wait for the agent channel's device.
const portTimeout = 20 * time.Second

// serve serves hosts, one conversation after the other. It returns only errors.
func (m *machine) serve(ctx context.Context) error {
	cgroups, err := cgroup.Open(boot.CgroupDir)
	if err != nil {
		return err
	}
	r := reaper.New(m.log)
	events := eventlog.New()
	networks, err := network.NewSet(network.Config{
		Driver: func(ctx context.Context) error { return m.late.Wait(ctx, "virtio_net") }, Redirect: cgroups.RedirectPort, Log: m.log,
	})
	if err != nil {
		return err
	}
	m.containers, err = container.NewSet(container.Config{
		Exe: stageProgram(), Reaper: r, Events: events, Cgroups: cgroups, Networks: networks, Log: m.log,
	})
	if err != nil {
		return err
	}
	go r.Run(ctx)
	go cgroups.Watch(ctx)
	go m.late.Run(ctx)
	srv := &server.Server{Containers: m.containers, Networks: networks, Mirrors: mirror.NewSet(boot.MirrorDir), Events: events, Machine: m, Log: m.log}

	found, cancel := context.WithTimeout(ctx, portTimeout)
	defer cancel()
	dev, err := boot.FindPort(found, transport.PortName)
	if err != nil {
		return err
	}
	m.phases["ready"] = boot.Uptime()
	for {
		if err := converse(ctx, dev, srv); err != nil {
			m.log.Error("conversation with the host", "error", err)
		}
		// The port reads as ended while no host has it open.
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(reopenInterval):
		}
	}
}

// stageProgram is the program that sets up processes: a small one of its own if the
// initramfs has it, or else the agent's executable, which takes longer to start.
func stageProgram() string {
	const program = "/runv-init"
	if _, err := os.Stat(program); err == nil {
		return program
	}
	return "/proc/self/exe"
}

// reopenInterval is how often the agent looks for a host after the last one has gone.
const reopenInterval = 50 * time.Millisecond

// converse serves one host until it goes.
func converse(ctx context.Context, dev string, srv *server.Server) error {
	port, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open agent channel: %w", err)
	}
	session, err := transport.Guest(&channel{File: port})
	if errors.Is(err, io.EOF) {
		return nil // no host
	}
	if err != nil {
		return err
	}
	srv.Log.Debug("host connected")
	err = srv.Serve(ctx, session.Control(), session.Claim)
	return errors.Join(err, session.Close())
}
