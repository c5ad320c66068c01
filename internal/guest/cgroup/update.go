package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// Update changes the limits that spec has; of those that it has not, and of the rules on
// devices, nothing changes. What is 0 counts as not given, as for runc, but for what 0 means
// something. When a limit cannot be set those before it are set back, and the error says so.
func (g *Group) Update(spec *specs.LinuxResources) error {
	g.updating.Lock() // one at a time: an undo must find what its own update has left
	defer g.updating.Unlock()
	r, err := translate(spec, g.amounts)
	if err != nil {
		return err
	}
	if err := r.apply(g.dir); err != nil {
		return err
	}
	g.amounts = r.amounts
	return nil
}

// undo is what takes a setting back.
type undo struct{ file, value string }

// apply makes the settings in the group's directory, all or none.
func (r *Resources) apply(dir string) error {
	if err := r.checkUsage(dir); err != nil {
		return err
	}
	var undos []undo
	for _, s := range r.settings {
		s = s.in(dir)
		if err := s.possible(); err != nil {
			return takeBack(dir, undos, err)
		}
		old, readErr := os.ReadFile(filepath.Join(dir, s.file))
		err := write(dir, s.file, s.value)
		switch {
		case err == nil:
			undos = append(undos, undo{s.file, s.before(string(old), readErr)})
		case s.optional && errors.Is(err, fs.ErrNotExist):
		case s.early && errors.Is(err, unix.EINVAL):
		default:
			return takeBack(dir, undos, s.explain(dir, err))
		}
	}
	return nil
}

// checkUsage refuses limits that the group is above of already, if that was asked for.
func (r *Resources) checkUsage(dir string) error {
	if r.checkMemory == 0 && r.checkSwap == 0 {
		return nil
	}
	usage, ok := (&Group{dir: dir}).counter("memory.current")
	if !ok {
		return nil
	}
	if r.checkSwap > 0 && uint64(r.checkSwap) <= usage {
		return fault.New(errdefs.ErrFailedPrecondition, "memory.swap: rejecting memory+swap limit %d <= usage %d", r.checkSwap, usage)
	}
	if r.checkMemory > 0 && uint64(r.checkMemory) <= usage {
		return fault.New(errdefs.ErrFailedPrecondition, "memory.limit: rejecting memory limit %d <= usage %d", r.checkMemory, usage)
	}
	return nil
}

// in chooses between two files for the same.
func (s setting) in(dir string) setting {
	if s.better != nil {
		if _, err := os.Stat(filepath.Join(dir, s.better.file)); err == nil {
			return *s.better
		}
	}
	return s
}

// Lists of what the machine has.
const (
	onlineCPUs  = "/sys/devices/system/cpu/online"
	onlineNodes = "/sys/devices/system/node/online"
)

// possible refuses processors and nodes that the VM does not have: the kernel takes those that
// may come one day, and lets the group use what there is.
func (s setting) possible() error {
	file, what := onlineCPUs, "CPUs"
	switch s.file {
	case "cpuset.cpus":
	case "cpuset.mems":
		file, what = onlineNodes, "memory nodes"
	default:
		return nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil // a kernel without NUMA; the write will tell
	}
	online := strings.TrimSpace(string(data))
	if there, ok := parseList(online); ok {
		if wanted, ok := parseList(s.value); ok && !wanted.within(there) {
			return fault.New(errdefs.ErrInvalidArgument, "%s: %q: the VM has only the %s %s", s.field, s.value, what, online)
		}
	}
	return nil
}

// explain says of which field an error is and, if it can, what to think of it.
func (s setting) explain(dir string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		controller, _, _ := strings.Cut(s.file, ".")
		data, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if controller != "cgroup" && !slices.Contains(strings.Fields(string(data)), controller) {
			return fault.New(errdefs.ErrNotImplemented, "%s: the guest's kernel has no controller %s", s.field, controller)
		}
		return fault.New(errdefs.ErrNotImplemented, "%s: the guest's kernel has no writable %s", s.field, s.file)
	case errors.Is(err, unix.ENODEV):
		device, _, _ := strings.Cut(s.value, " ")
		return fault.New(errdefs.ErrInvalidArgument, "%s: the guest has no device %s, and the host's are not the guest's", s.field, device)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOSPC):
		return fault.New(errdefs.ErrInvalidArgument, "%s: %w", s.field, err)
	}
	return fmt.Errorf("%s: %w", s.field, err)
}

// takeBack undoes settings and returns err with what could not be undone.
func takeBack(dir string, undos []undo, err error) error {
	var left []string
	for _, u := range slices.Backward(undos) {
		if u.value == "" || write(dir, u.file, u.value) != nil {
			left = append(left, u.file)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("%w; %s could not be set back", err, strings.Join(left, ", "))
	}
	return err
}

// wholeFiles hold several words that are one value.
var wholeFiles = []string{"cpu.max"}

// before is what to write to have the setting's file as it was; "" when that is not known.
func (s setting) before(old string, err error) string {
	if err != nil {
		return ""
	}
	old = strings.TrimSuffix(old, "\n")
	key, _, keyed := strings.Cut(s.value, " ")
	switch {
	case s.file == "io.weight" || s.file == "io.bfq.weight":
		if !keyed {
			key = "default"
		}
		if line := lineOf(old, key); line != "" {
			return line
		}
		if _, err := strconv.Atoi(old); err == nil && key == "default" {
			return old // of an older BFQ, which has no weights of devices
		}
		return key + " default"
	case s.file == "io.max":
		return lineOr(old, key, " rbps=max wbps=max riops=max wiops=max")
	case s.file == "rdma.max":
		return lineOr(old, key, " hca_handle=max hca_object=max")
	case !keyed || slices.Contains(wholeFiles, s.file):
		if old == "" {
			return "\n" // an empty list; no bytes would be no write
		}
		return old
	}
	return lineOf(old, key)
}

// lineOf returns the line that begins with the key, or "".
func lineOf(text, key string) string {
	for line := range strings.SplitSeq(text, "\n") {
		if first, _, _ := strings.Cut(line, " "); first == key {
			return line
		}
	}
	return ""
}

func lineOr(text, key, nothing string) string {
	if line := lineOf(text, key); line != "" {
		return line
	}
	return key + nothing
}

// list is a set of processors or nodes, as ranges.
type list [][2]int

// parseList reads a list like "0-3,7".
func parseList(text string) (l list, ok bool) {
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		a, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			return nil, false
		}
		b := a
		if isRange {
			if b, err = strconv.ParseUint(last, 10, 16); err != nil || b < a {
				return nil, false
			}
		}
		l = append(l, [2]int{int(a), int(b)})
	}
	return l, true
}

func (l list) has(n int) bool {
	return slices.ContainsFunc(l, func(r [2]int) bool { return r[0] <= n && n <= r[1] })
}

func (l list) within(other list) bool {
	for _, r := range l {
		for n := r[0]; n <= r[1]; n++ {
			if !other.has(n) {
				return false
			}
		}
	}
	return true
}

// inEffect are the files with the limits that containers have.
var inEffect = strings.Fields(`cpu.weight cpu.max cpu.max.burst cpu.idle cpuset.cpus cpuset.cpus.effective
	cpuset.mems cpuset.mems.effective memory.max memory.high memory.low memory.swap.max pids.max io.weight io.bfq.weight
	io.max`)

// maxLimit bounds the text of a limit.
const maxLimit = 4096

// InEffect reads back the limits that the kernel has for the group, by file. What was set is
// not always what is in effect: memory comes in pages, and processors go away.
func (g *Group) InEffect() map[string]string {
	limits := make(map[string]string)
	files := slices.Clone(inEffect)
	entries, _ := os.ReadDir(g.dir)
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, "hugetlb.") && strings.HasSuffix(name, ".max") {
			files = append(files, name)
		}
	}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(g.dir, file))
		if err == nil && len(data) <= maxLimit {
			limits[file] = strings.TrimSuffix(string(data), "\n")
		}
	}
	return limits
}
