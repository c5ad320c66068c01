// Package signals tells from /proc whether a thread of the guest has a reason to stop waiting in the kernel.
//
// The agent needs it for threads that wait for an answer of the share server: the kernel does not interrupt such a wait
// by itself. It only reads; whose threads they are does not matter.
package signals

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
)

// Waits tells whether a thread has a signal that it does not block, is in a cgroup that is frozen or to be frozen, or is
// gone. What cannot be read counts as no.
func Waits(thread int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	return err == nil && pending(status) || frozen(thread)
}

// pending reads a status file of proc(5). A thread takes signals of its own and of its process.
func pending(status []byte) bool {
	masks := map[string]uint64{"SigPnd": 0, "ShdPnd": 0, "SigBlk": 0}
	for lines := bufio.NewScanner(bytes.NewReader(status)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if _, ok := masks[name]; ok {
			masks[name], _ = strconv.ParseUint(strings.TrimSpace(value), 16, 64) // the kernel writes nothing else
		}
	}
	return (masks["SigPnd"]|masks["ShdPnd"])&^masks["SigBlk"] != 0
}

// frozen tells whether a thread's cgroup, or one above it, is to be frozen (cgroup.freeze).
func frozen(thread int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", thread))
	if err != nil {
		return false
	}
	_, dir, ok := strings.Cut(strings.TrimSpace(string(data)), "0::")
	if !ok {
		return false
	}
	for dir = path.Clean("/" + dir); dir != "/"; dir = path.Dir(dir) {
		freeze, err := os.ReadFile(path.Join("/sys/fs/cgroup", dir, "cgroup.freeze"))
		if err == nil && strings.TrimSpace(string(freeze)) == "1" {
			return true
		}
	}
	return false
}
