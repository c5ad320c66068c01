package container

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

const (
	maxProcesses = 4096 // in one answer
	maxCommand   = 4096 // bytes of a command line
	clockTicks   = 100  // USER_HZ, the same on all architectures Go runs on
)

// Processes lists the processes in the container.
func (c *Container) Processes() ([]*agentv1.Process, error) {
	c.mu.Lock()
	if c.status == creating {
		defer c.mu.Unlock()
		return nil, c.wrongState("list processes of")
	}
	execs := make(map[int]string)
	for id, p := range c.execs {
		if p != nil {
			execs[p.pid] = id
		}
	}
	init := c.init.pid
	c.mu.Unlock()

	pids, err := c.group.Processes()
	if err != nil {
		return nil, err
	}
	booted := bootTime()
	var list []*agentv1.Process
	for _, pid := range pids {
		if len(list) == maxProcesses {
			break
		}
		p, err := describe(pid, booted)
		if err != nil {
			continue // it has ended meanwhile
		}
		p.ExecId = execs[pid]
		p.Init = pid == init
		list = append(list, p)
	}
	return list, nil
}

// bootTime is when the clock that process start times count from was 0.
func bootTime() time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(ts.Nano()))
}

// describe reads what /proc tells of a process.
func describe(pid int, booted time.Time) (*agentv1.Process, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, err
	}
	s, err := parseStat(string(data))
	if err != nil {
		return nil, err
	}
	p := &agentv1.Process{
		Pid:               uint32(pid),
		ParentPid:         uint32(s.parent),
		Uid:               realUID(dir, st.Uid),
		StartTimeUnixNano: booted.Add(ticks(s.start)).UnixNano(),
		CpuNanos:          uint64(ticks(s.cpu)),
		Tty:               ttyName(s.tty),
		Command:           commandLine(dir),
	}
	if p.Command == "" {
		p.Command = "[" + s.name + "]"
	}
	return p, nil
}

func ticks(n uint64) time.Duration { return time.Duration(n) * time.Second / clockTicks }

type stat struct {
	name       string
	parent     uint64
	tty        uint64
	cpu, start uint64 // ticks
}

// parseStat parses /proc/PID/stat. The name may hold anything, even ")".
func parseStat(line string) (stat, error) {
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || end < open {
		return stat{}, fmt.Errorf("parse stat %q", line)
	}
	f := strings.Fields(line[end+1:]) // from field 3, the state
	if len(f) < 20 {
		return stat{}, fmt.Errorf("parse stat %q", line)
	}
	n := func(field int) uint64 {
		v, _ := strconv.ParseUint(f[field-3], 10, 64) // a negative tty is none
		return v
	}
	return stat{
		name:   printable(line[open+1 : end]),
		parent: n(4), tty: n(7), cpu: n(14) + n(15), start: n(22),
	}, nil
}

// realUID is the process's user. The owner of /proc/PID is root for processes that
// must not be looked into.
func realUID(dir string, owner uint32) uint32 {
	data, err := os.ReadFile(dir + "/status")
	if err != nil {
		return owner
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "Uid:"); ok {
			if f := strings.Fields(v); len(f) > 0 {
				if uid, err := strconv.ParseUint(f[0], 10, 32); err == nil {
					return uint32(uid)
				}
			}
		}
	}
	return owner
}

func ttyName(dev uint64) string {
	const ptsMajor = 136 // to 143, 256 minors each here
	major, minor := unix.Major(dev), unix.Minor(dev)
	if major >= ptsMajor && major < ptsMajor+8 {
		return fmt.Sprintf("pts/%d", minor)
	}
	return "?"
}

func commandLine(dir string) string {
	f, err := os.Open(dir + "/cmdline")
	if err != nil {
		return ""
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCommand))
	if err != nil {
		return ""
	}
	data = bytes.ReplaceAll(bytes.TrimRight(data, "\x00"), []byte{0}, []byte{' '})
	return printable(string(data))
}

// printable makes a text of the container's fit for a message.
func printable(s string) string { return strings.ToValidUTF8(s, "?") }
