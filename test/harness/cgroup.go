package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A test process lives in a cgroup of its own, in each hierarchy of the host. As runv and runc make
// cgroups below their caller's, all that they leave is found there, and two test processes can have
// containers of one name.

const (
	cgroupRoot   = "/sys/fs/cgroup"
	cgroupPrefix = "runv-test-"
	cgroupMember = "init" // where the process is in v2, in which cgroups are made beside one's own
)

// ownCgroups are the directories that enterCgroups has made.
var ownCgroups []string

// enterCgroups moves this process. Where the host's cgroups cannot be written to it does nothing.
func enterCgroups() (leave func() error, err error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var back []func() error
	leave = func() error {
		var errs []error
		for _, f := range back {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		mount := filepath.Join(cgroupRoot, strings.TrimPrefix(fields[1], "name="))
		member := ""
		if fields[1] == "" {
			if hybrid := filepath.Join(cgroupRoot, "unified"); exists(hybrid) {
				mount = hybrid
			} else {
				member = cgroupMember
			}
		}
		home := filepath.Join(mount, fields[2])
		removeStale(home)
		dir := filepath.Join(home, cgroupPrefix+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			continue // read-only, or not mounted
		}
		ownCgroups = append(ownCgroups, dir)
		in := filepath.Join(dir, member)
		back = append(back, func() error { return errors.Join(enter(home), removeEmpty(in), removeEmpty(dir)) })
		if err := os.MkdirAll(in, 0o755); err != nil {
			return leave, err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // v1 demands them, v2 inherits
			if value, err := os.ReadFile(filepath.Join(home, file)); err == nil && fields[1] != "" {
				if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
					return leave, err
				}
			}
		}
		if err := enter(in); err != nil {
			return leave, err
		}
	}
	return leave, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func enter(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

func removeEmpty(dir string) error {
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// removeStale removes what test processes have left that were killed.
func removeStale(home string) {
	dirs, _ := filepath.Glob(filepath.Join(home, cgroupPrefix+"*"))
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix))
		if err != nil || !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			continue
		}
		for _, sub := range append(below(dir), dir) {
			_ = os.Remove(sub)
		}
	}
}

// below lists the cgroups in one, the inner ones first.
func below(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var all []string
	for _, e := range entries {
		if sub := filepath.Join(dir, e.Name()); e.IsDir() {
			all = append(append(all, below(sub)...), sub)
		}
	}
	return all
}

// RemoveCgroups removes cgroups of a name, below this process's and below the roots, with all that is
// in them: other programs leave them to whoever has called them.
func RemoveCgroups(name string) error {
	roots, err := filepath.Glob(filepath.Join(cgroupRoot, "*"))
	errs := []error{err}
	for _, base := range append(append(roots, cgroupRoot), ownCgroups...) {
		top := filepath.Join(base, name)
		for _, dir := range append(below(top), top) {
			errs = append(errs, removeEmpty(dir))
		}
	}
	return errors.Join(errs...)
}

// leftCgroups lists the cgroups of containers that are there.
func leftCgroups() string {
	var b strings.Builder
	for _, own := range ownCgroups {
		for _, dir := range below(own) {
			if filepath.Base(dir) != cgroupMember {
				fmt.Fprintf(&b, "cgroup %s\n", dir)
			}
		}
	}
	return b.String()
}
