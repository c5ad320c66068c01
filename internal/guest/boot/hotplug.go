package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	devicesDir     = "/sys/devices/system"
	onlineInterval = 10 * time.Millisecond // sysfs tells nobody of new entries
)

// Hotplug takes into use what is plugged into the running machine.
type Hotplug struct {
	dir    string // with cpu and memory
	blocks int    // of memory, at the start
	unit   uint64 // bytes of a block; 0: the kernel cannot take more memory
}

// NewHotplug takes note of what the machine has from the start.
func NewHotplug() *Hotplug { return newHotplug(devicesDir) }

func newHotplug(dir string) *Hotplug {
	h := &Hotplug{dir: dir}
	if data, err := os.ReadFile(filepath.Join(dir, "memory/block_size_bytes")); err == nil {
		h.unit, _ = strconv.ParseUint(strings.TrimSpace(string(data)), 16, 64)
	}
	h.blocks, _ = h.onlineMemory()
	return h
}

// members lists the directories of devices, which have a number behind their name.
func (h *Hotplug) members(kind, name string) []string {
	entries, err := os.ReadDir(filepath.Join(h.dir, kind))
	if err != nil {
		return nil
	}
	var dirs []string
	for _, e := range entries {
		if number, ok := strings.CutPrefix(e.Name(), name); ok {
			if _, err := strconv.ParseUint(number, 10, 32); err == nil {
				dirs = append(dirs, filepath.Join(h.dir, kind, e.Name()))
			}
		}
	}
	return dirs
}

// Online waits until that many processors and bytes of plugged memory are in use, or ctx ends, and
// returns how many are. The error, if any, is why the last one of those that are missing is.
func (h *Hotplug) Online(ctx context.Context, cpus uint32, plugged uint64) (gotCPUs uint32, gotBytes uint64, err error) {
	tick := time.NewTicker(onlineInterval)
	defer tick.Stop()
	for {
		// Memory first: a processor needs some.
		blocks, memoryErr := h.onlineMemory()
		cpuErr := h.onlineCPUs()
		gotCPUs, gotBytes = h.cpus(), uint64(max(blocks-h.blocks, 0))*h.unit
		if gotCPUs >= cpus && gotBytes >= plugged {
			return gotCPUs, gotBytes, nil
		}
		if h.unit == 0 && gotCPUs >= cpus {
			return gotCPUs, gotBytes, errors.New("the guest's kernel cannot take more memory")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return gotCPUs, gotBytes, errors.Join(memoryErr, cpuErr)
		}
	}
}

// onlineMemory takes all blocks into use and counts those that are.
func (h *Hotplug) onlineMemory() (n int, lastErr error) {
	for _, dir := range h.members("memory", "memory") {
		file := filepath.Join(dir, "state")
		data, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(data)) != "online" {
			err = os.WriteFile(file, []byte("online"), 0)
		}
		switch {
		case err == nil:
			n++
		case !errors.Is(err, os.ErrNotExist): // else it is just coming
			lastErr = fmt.Errorf("take %s into use: %w", filepath.Base(dir), err)
		}
	}
	return n, lastErr
}

func (h *Hotplug) onlineCPUs() (lastErr error) {
	for _, dir := range h.members("cpu", "cpu") {
		file := filepath.Join(dir, "online")
		data, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(data)) == "0" {
			err = os.WriteFile(file, []byte("1"), 0)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) { // the first has no such file
			lastErr = fmt.Errorf("take %s into use: %w", filepath.Base(dir), err)
		}
	}
	return lastErr
}

// cpus counts those that are in use.
func (h *Hotplug) cpus() uint32 {
	data, err := os.ReadFile(filepath.Join(h.dir, "cpu/online"))
	if err != nil {
		return 1
	}
	return max(1, countList(strings.TrimSpace(string(data))))
}
