// Package supervisor is the process that owns one pod: it wires the pod's parts
// together, serves the API that the command line calls, and sees to the order in
// which all of it begins and ends.
//
// The command line starts it, detached, for a new pod; it ends by itself when
// the pod has ended. It lives in a mount namespace of its own, so that the mounts
// of the pod's share vanish with it however it dies, and all its children die
// with it, too. What happens to containers is decided in internal/pod, not here.
package supervisor

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"runv/internal/caller"
	"runv/internal/config"
	"runv/internal/factory"
	"runv/internal/hostcgroup"
	"runv/internal/hypervisor"
	"runv/internal/hypervisor/qemu"
	"runv/internal/journal"
	"runv/internal/mirror"
	"runv/internal/mountns"
	"runv/internal/network"
	"runv/internal/pod"
	"runv/internal/standin"
	"runv/internal/state"
	"runv/internal/storage"
	"runv/internal/unixsock"
)

const (
	readyFD = 3
	// readyWord is what the supervisor writes there when it serves. Anything else that
	// it writes is why it cannot. Its starter, internal/cli, has the same word.
	readyWord = "ok"
	// idleTimeout ends a supervisor whose starter has died before it asked for a container.
	idleTimeout = 30 * time.Second
	// goodbyeTimeout is what answers in flight get at the end.
	goodbyeTimeout = 5 * time.Second
)

// Options are the supervisor's arguments.
type Options struct {
	Root    string // state directory
	Pod     string // id of a pod that exists in it
	Debug   bool
	Config  config.Overrides
	Systemd bool // makes the pod's cgroup
	Version string
}

// Main is the supervisor's main function: it returns the exit status. Who starts it passes
// the writing end of a pipe as file descriptor 3.
func Main(args []string, version string) int {
	ready := os.NewFile(readyFD, "ready")
	unix.CloseOnExec(readyFD)
	opts, err := parse(args)
	if err != nil {
		return tellUnready(ready, err)
	}
	opts.Version = version
	// Enter executes this program again, on this thread.
	runtime.LockOSThread()
	caller.ForgetSignals()
	hostMounts, err := mountns.Enter(readyFD)
	runtime.UnlockOSThread()
	if err != nil {
		return tellUnready(ready, err)
	}
	caller.Forget()
	level := slog.LevelInfo
	if opts.Debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	// The heap is small and short-lived; what counts is how little of it stays.
	debug.SetGCPercent(50)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := Run(ctx, opts, hostMounts, ready, log); err != nil {
		log.Error("supervisor ended", "err", err)
		return 1
	}
	return 0
}

func parse(args []string) (opts Options, err error) {
	fs := flag.NewFlagSet("supervisor", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&opts.Root, "root", "", "state directory")
	fs.StringVar(&opts.Pod, "pod", "", "pod id")
	fs.BoolVar(&opts.Debug, "debug", false, "log more")
	fs.BoolVar(&opts.Systemd, "systemd-cgroup", false, "let systemd make the cgroup")
	fs.StringVar(&opts.Config.File, "config", "", "configuration file")
	fs.StringVar(&opts.Config.GuestDir, "guest-dir", "", "directory of the guest's files")
	if err := fs.Parse(args); err != nil {
		return opts, fmt.Errorf("supervisor: %w", err)
	}
	if opts.Root == "" || opts.Pod == "" {
		return opts, errors.New("supervisor: --root and --pod are needed")
	}
	return opts, nil
}

// tellUnready gives the starter the reason; it is the one who tells the user.
func tellUnready(ready *os.File, err error) int {
	_, _ = fmt.Fprintln(ready, err)
	_ = ready.Close()
	return 1
}

// Run owns the pod until it has ended. It tells on ready when it serves, or why it cannot,
// and closes it.
func Run(ctx context.Context, opts Options, hostMounts *mountns.Host, ready *os.File, log *slog.Logger) (err error) {
	store, err := state.Open(opts.Root)
	if err != nil {
		tellUnready(ready, err)
		return err
	}
	p, serve, err := wire(opts, store, hostMounts, log)
	if err != nil {
		tellUnready(ready, err)
		return err
	}
	server := newServer(p, opts.Version, log)
	serving := make(chan error, 1)
	go func() { serving <- server.Serve(serve.api) }()
	_, _ = fmt.Fprintln(ready, readyWord)
	_ = ready.Close()

	err = p.Run(ctx)
	_ = serve.journal.Close() // followers end
	stopServer(server)
	if serveErr := <-serving; serveErr != nil {
		log.Warn("serve", "err", serveErr)
	}
	_ = serve.standIns.Close()
	// What is left is for delete: a pod whose containers are all gone leaves nothing.
	if rmErr := store.RemovePod(opts.Pod); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
		log.Debug("keep pod's directory", "why", rmErr)
	}
	return err
}

// served is what must be closed after the pod has ended.
type served struct {
	api      net.Listener
	standIns *standin.Listener
	journal  *journal.Journal
}

// wire makes the pod with all its parts. Nothing runs yet but the two sockets.
func wire(opts Options, store *state.Store, hostMounts *mountns.Host, log *slog.Logger) (_ *pod.Pod, s served, err error) {
	record, err := store.LoadPod(opts.Pod)
	if err != nil {
		return nil, s, err
	}
	cfg, err := config.Load(opts.Config)
	if err != nil {
		return nil, s, err
	}
	guest, err := cfg.Guest()
	if err != nil {
		return nil, s, err
	}
	accel, note, err := qemu.ThisHost().ProbeAccel(cfg.Accel)
	if err != nil {
		return nil, s, err
	}
	user, err := vmUser(opts.Pod, accel)
	if err != nil {
		return nil, s, err
	}
	driver := qemu.New(log)
	dir := store.PodDir(opts.Pod)
	record.Driver, record.Accel, record.AccelNote, record.Kernel = driver.Name(), string(accel), note, guest.Release
	if record.Supervisor, err = state.ProcessOf(os.Getpid()); err != nil {
		return nil, s, err
	}
	if err := store.SavePod(record); err != nil {
		return nil, s, err
	}
	// From here on a failed start leaves files in the pod's directory only; the
	// starter purges the pod.
	if s.journal, err = journal.Open(filepath.Join(dir, state.EventsFile)); err != nil {
		return nil, s, err
	}
	if s.standIns, err = standin.Listen(dir); err != nil {
		return nil, s, err
	}
	if s.api, err = unixsock.Listen(dir, state.SupervisorSocket, "unix"); err != nil {
		return nil, s, err
	}
	newCgroup := func() *hostcgroup.Group {
		return hostcgroup.New(hostcgroup.Config{Systemd: opts.Systemd, Overhead: cfg.VMMMemory, Log: log})
	}
	cgroup := newCgroup()
	share := storage.NewShare(storage.ShareConfig{
		Dir:        filepath.Join(dir, "share"),
		Log:        log,
		LogFile:    filepath.Join(dir, "share.log"),
		HostMounts: hostMounts,
		Launch:     cgroup.Start,
	})
	vm := hypervisor.Config{
		ID: opts.Pod, Binary: cfg.QEMU, Kernel: guest.Kernel, Initrd: guest.Initrd, Accel: accel, RunDir: dir,
		User: user, Launch: cgroup.Start,
	}
	if opts.Debug {
		vm.KernelArgs = append(vm.KernelArgs, "runv.log=debug", "loglevel=7")
	}
	var userNetwork func(context.Context, *network.Namespace) (io.Closer, error)
	if cfg.Pasta != "" {
		userNetwork = func(ctx context.Context, ns *network.Namespace) (io.Closer, error) {
			return network.StartPasta(ctx, cfg.Pasta, ns, cgroup.Start)
		}
	}
	var mirrors *mirror.Set
	if cfg.Mirrors {
		mirrors = mirror.New(mirror.DefaultLimits(), log)
	}
	return pod.New(pod.Config{
		UserNetwork: userNetwork, Mirrors: mirrors,
		Record: record, VM: vm,
		DefaultVCPUs: cfg.DefaultVCPUs, DefaultMemory: cfg.DefaultMemory, IdleTimeout: idleTimeout,
		Factory: factory.Direct{Driver: driver, BootTimeout: cfg.BootTimeout},
		Share:   share, ExclusiveBinds: cfg.Binds == config.Exclusive, Cgroup: cgroup, NewCgroup: func() pod.Cgroup { return newCgroup() }, Recorder: store, StandIns: s.standIns, Journal: s.journal, Log: log,
		OnHost: func(f func() error) error { return mountns.Do(hostMounts, f) },
		Mirror: func(id string, ns *network.Namespace, vcpus int, save func(network.Record) error) pod.Mirror {
			return network.New(network.Config{
				ID: id, Namespace: ns, Queues: vcpus, HostPorts: pod.HasNameServer, Save: save, Log: log,
			})
		},
	}), s, nil
}

// Identities of VMMs lie in a range that no known tool hands out (systemd's
// UIDS-GIDS lists it as unused), one for each pod, so that the VMMs of two pods cannot
// touch each other. Two pods that share one by chance are as confined as two
// services of one user: the VMM has no files and no capabilities.
const (
	vmUserBase  = 0x70000000
	vmUserCount = 0x0fffff00
)

// vmUser is whom the pod's VMM runs as.
func vmUser(podID string, accel hypervisor.Accel) (*hypervisor.User, error) {
	groups, err := qemu.ThisHost().Groups(accel)
	if err != nil {
		return nil, fmt.Errorf("choose user of the VMM: %w", err)
	}
	h := fnv.New32a()
	_, _ = io.WriteString(h, podID)
	id := vmUserBase + h.Sum32()%vmUserCount
	return &hypervisor.User{UID: id, GID: id, Groups: groups}, nil
}

// stopServer lets answers in flight go out.
func stopServer(s *grpc.Server) {
	done := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(goodbyeTimeout):
		s.Stop()
		<-done
	}
}
