package boot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	portsDir     = "/sys/class/virtio-ports"
	portInterval = time.Millisecond // sysfs tells nobody of new entries
)

// FindPort waits until there is a virtio-serial port of this name, or ctx ends, and
// returns the path of its device.
func FindPort(ctx context.Context, name string) (string, error) {
	tick := time.NewTicker(portInterval)
	defer tick.Stop()
	for {
		if dev := scanPorts(portsDir, name); dev != "" {
			return dev, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", fmt.Errorf("find virtio-serial port %q: %w", name, context.Cause(ctx))
		}
	}
}

func scanPorts(dir, name string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ""
	}
	for _, e := range entries {
		// The name comes some time after the port.
		data, err := os.ReadFile(filepath.Join(dir, e.Name(), "name"))
		if err == nil && strings.TrimSpace(string(data)) == name {
			return filepath.Join("/dev", e.Name())
		}
	}
	return ""
}
