package cgroup

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Stats are the group's counters. What the kernel does not count is 0.
type Stats struct {
	CPUUsage, CPUUser, CPUSystem uint64 // microseconds
	ThrottledPeriods             uint64
	ThrottledTime                uint64 // microseconds
	Memory, Swap                 uint64 // bytes
	MemoryLimit                  uint64 // bytes; math.MaxUint64: none
	MemoryStat                   map[string]uint64
	Pids                         uint64
	PidsLimit                    uint64 // 0: none
	OOMKills                     uint64
}

// Stats reads the group's counters.
func (g *Group) Stats() Stats {
	cpu := g.flat("cpu.stat")
	s := Stats{
		CPUUsage:         cpu["usage_usec"],
		CPUUser:          cpu["user_usec"],
		CPUSystem:        cpu["system_usec"],
		ThrottledPeriods: cpu["nr_throttled"],
		ThrottledTime:    cpu["throttled_usec"],
		Memory:           g.number("memory.current", 0),
		Swap:             g.number("memory.swap.current", 0),
		MemoryLimit:      g.number("memory.max", math.MaxUint64),
		MemoryStat:       g.flat("memory.stat"),
		Pids:             g.number("pids.current", 0),
		PidsLimit:        g.number("pids.max", 0),
		OOMKills:         g.OOMKills(),
	}
	return s
}

// number reads a file with one number; other is what "max" and a missing file mean.
func (g *Group) number(file string, other uint64) uint64 {
	if n, ok := g.counter(file); ok {
		return n
	}
	return other
}

// counter reads a file with one number.
func (g *Group) counter(file string) (uint64, bool) {
	data, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(data)), 10, 64)
	return n, err == nil
}

// flat reads a file with a name and a number in each line.
func (g *Group) flat(file string) map[string]uint64 {
	values := make(map[string]uint64)
	data, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return values
	}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			values[name] = n
		}
	}
	return values
}
