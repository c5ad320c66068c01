package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
	"runv/internal/guest/boot"
	"runv/internal/guest/container"
	"runv/internal/guest/fault"
	"runv/internal/guest/signals"
)

// machine is the guest as the host sees it.
type machine struct {
	version    string
	log        *slog.Logger
	phases     map[string]float64 // complete before the first request
	late       *boot.Late
	hotplug    *boot.Hotplug
	containers *container.Set

	mu       sync.Mutex // one Configure at a time
	shareTag string     // that is mounted
}

// Info describes the machine.
func (m *machine) Info() (*agentv1.InfoResponse, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("read kernel release: %w", err)
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return nil, fmt.Errorf("read memory size: %w", err)
	}
	return &agentv1.InfoResponse{
		AgentVersion:  m.version,
		KernelRelease: unix.ByteSliceToString(uts.Release[:]),
		BootId:        strings.TrimSpace(string(bootID)),
		MemoryBytes:   si.Totalram * uint64(si.Unit),
		Cpus:          boot.CPUs(),
		BootMs:        maps.Clone(m.phases),
	}, nil
}

// onlineTimeout bounds the wait for devices on their way.
const onlineTimeout = 10 * time.Second

// Online takes into use what was plugged.
func (m *machine) Online(ctx context.Context, r *agentv1.OnlineRequest) *agentv1.OnlineResponse {
	ctx, cancel := context.WithTimeout(ctx, onlineTimeout)
	defer cancel()
	cpus, plugged, err := m.hotplug.Online(ctx, r.Cpus, r.PluggedBytes)
	resp := &agentv1.OnlineResponse{Cpus: cpus, PluggedBytes: plugged}
	if err != nil {
		resp.Problem = err.Error()
	}
	return resp
}

// Configure sets what belongs to the pod.
func (m *machine) Configure(ctx context.Context, r *agentv1.ConfigureRequest) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(r.Entropy) > 0 {
		if err := boot.AddEntropy(r.Entropy); err != nil {
			return err
		}
	}
	if r.TimeUnixNano != 0 {
		if err := boot.SetClock(r.TimeUnixNano); err != nil {
			return err
		}
	}
	if err := m.setParameters(r.KernelParameters); err != nil {
		return err
	}
	if r.Hostname != "" {
		if err := unix.Sethostname([]byte(r.Hostname)); err != nil {
			return fmt.Errorf("set hostname: %w", err)
		}
	}
	return m.mountShare(ctx, r.ShareTag)
}

// maxParameters bounds how many kernel parameters the host may tell.
const maxParameters = 128

func (m *machine) setParameters(values map[string]string) error {
	if len(values) > maxParameters {
		return fault.New(errdefs.ErrInvalidArgument, "set kernel parameters: %d are too many", len(values))
	}
	failed, err := boot.SetParameters(values)
	if err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "set kernel parameters: %w", err)
	}
	if failed != nil {
		m.log.Warn("set kernel parameters", "error", failed)
	}
	if err := boot.RaiseProcessLimits(); err != nil {
		m.log.Warn("set kernel parameters", "error", err)
	}
	return nil
}

func (m *machine) mountShare(ctx context.Context, tag string) error {
	switch {
	case tag == "" || tag == m.shareTag:
		return nil
	case m.shareTag != "":
		return fault.New(errdefs.ErrFailedPrecondition, "mount share %q: share %q is mounted", tag, m.shareTag)
	}
	if err := m.late.Wait(ctx, "virtiofs"); err != nil {
		return err
	}
	if err := boot.MountShare(ctx, tag); err != nil {
		return err
	}
	m.shareTag = tag
	return nil
}

// Shutdown ends all containers and unmounts.
func (m *machine) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	var errs []error
	for _, c := range m.containers.All() {
		errs = append(errs, c.Delete(ctx))
	}
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		errs = append(errs, fmt.Errorf("kill processes: %w", err))
	}
	if err := boot.UnmountShare(); err != nil {
		errs = append(errs, fmt.Errorf("unmount share: %w", err))
	}
	unix.Sync()
	return errors.Join(errs...)
}

// PowerOff ends the virtual machine.
func (m *machine) PowerOff() { boot.PowerOff(m.log) }

// maxThreads bounds a question of Signalled's.
const maxThreads = 1024

// Signalled returns those of the threads that have a signal to handle, are in a cgroup that is to be frozen, or are gone.
func (m *machine) Signalled(threads []int32) []int32 {
	var found []int32
	for _, t := range threads[:min(len(threads), maxThreads)] {
		if signals.Waits(int(t)) {
			found = append(found, t)
		}
	}
	return found
}
