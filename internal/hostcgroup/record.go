package hostcgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"golang.org/x/sys/unix"
)

const (
	maxDirs   = 64
	maxUnit   = 255 // bytes of a part of a unit's name
	maxNested = 32  // cgroups below each other in ours

	removeRetry = 2 * time.Millisecond
)

// Record is what must be known of a cgroup to remove it. The zero value is none.
type Record struct {
	Dirs []Dir `json:"dirs,omitempty"` // one in each hierarchy
	Unit *Unit `json:"unit,omitempty"` // systemd's, if that has made it
}

// Dir is a directory of a cgroup.
type Dir struct {
	Hierarchy string `json:"hierarchy,omitempty"` // a controller or name=X of v1; empty: v2
	Path      string `json:"path"`
	// Inode tells it from another of the same name that is made later; 0: it is about to be made.
	Inode uint64 `json:"inode,omitempty"`
}

// Unit is how linux.cgroupsPath names it: slice:prefix:name.
type Unit struct {
	Slice  string `json:"slice,omitempty"`
	Prefix string `json:"prefix,omitempty"`
	Name   string `json:"name"`
}

// plannedRecord is of a cgroup that is about to be made.
func plannedRecord(config *cgroups.Cgroup, paths map[string]string) Record {
	var r Record
	for _, name := range slices.Sorted(maps.Keys(paths)) {
		r.Dirs = append(r.Dirs, Dir{Hierarchy: name, Path: paths[name]})
	}
	if config.Systemd {
		r.Unit = &Unit{Slice: config.Parent, Prefix: config.ScopePrefix, Name: config.Name}
	}
	return r
}

// madeRecord is of a cgroup as far as it exists: v1 has hierarchies that need not be joined.
func madeRecord(config *cgroups.Cgroup, paths map[string]string) Record {
	r := plannedRecord(config, paths)
	r.Dirs = slices.DeleteFunc(r.Dirs, func(d Dir) bool { return !d.exists() })
	for i := range r.Dirs {
		var st unix.Stat_t
		if unix.Stat(r.Dirs[i].Path, &st) == nil {
			r.Dirs[i].Inode = st.Ino
		}
	}
	return r
}

// IsZero tells whether there is no cgroup.
func (r Record) IsZero() bool { return len(r.Dirs) == 0 && r.Unit == nil }

// String is the path of the cgroup, in v1 that of the hierarchy of memory if there is one.
func (r Record) String() string {
	path := ""
	for _, d := range r.Dirs {
		if path == "" || d.Hierarchy == "memory" {
			path = d.Path
		}
	}
	return path
}

// Validate checks a record that was read from a file.
func (r Record) Validate() error {
	if len(r.Dirs) > maxDirs {
		return fmt.Errorf("%d directories of a cgroup", len(r.Dirs))
	}
	for _, d := range r.Dirs {
		if !filepath.IsAbs(d.Path) || filepath.Clean(d.Path) != d.Path || len(d.Path) >= unix.PathMax || strings.ContainsRune(d.Path, 0) {
			return fmt.Errorf("directory %.80q of a cgroup", d.Path)
		}
	}
	if u := r.Unit; u != nil {
		for _, s := range []string{u.Slice, u.Prefix, u.Name} {
			if len(s) > maxUnit || strings.ContainsAny(s, "/:\x00") {
				return fmt.Errorf("part %.80q of a unit's name", s)
			}
		}
		if u.Name == "" {
			return errors.New("unit without a name")
		}
	}
	return nil
}

// Remove removes the cgroup, and cgroups below it that are empty. It waits until ctx ends for
// processes that are ending, and kills none: a cgroup with others in it is an error. What is not the
// cgroup that was recorded, or none at all, is left alone. Idempotent.
func (r Record) Remove(ctx context.Context) error {
	if r.IsZero() {
		return nil
	}
	var first error // they are all alike
	if r.Unit != nil {
		first = r.stopUnit()
	}
	for _, d := range r.Dirs {
		if err := d.remove(ctx); err != nil && (first == nil || d.Path == r.String()) {
			first = err
		}
	}
	if first != nil {
		return fmt.Errorf("remove cgroup: %w", first)
	}
	return nil
}

func (r Record) stopUnit() error {
	if !slices.ContainsFunc(r.Dirs, Dir.exists) {
		return nil // systemd has removed it with its last process
	}
	paths := make(map[string]string, len(r.Dirs))
	for _, d := range r.Dirs {
		paths[d.Hierarchy] = d.Path
	}
	m, err := manager.NewWithPaths(&cgroups.Cgroup{
		Systemd: true, Parent: r.Unit.Slice, ScopePrefix: r.Unit.Prefix, Name: r.Unit.Name,
		Resources: &cgroups.Resources{SkipDevices: true},
	}, paths)
	if err != nil {
		return err
	}
	return m.Destroy()
}

// exists tells whether the directory is there, and is the one that was recorded.
func (d Dir) exists() bool {
	var st unix.Stat_t
	var sfs unix.Statfs_t
	if unix.Lstat(d.Path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || unix.Statfs(d.Path, &sfs) != nil {
		return false
	}
	if d.Inode != 0 && d.Inode != st.Ino {
		return false
	}
	return sfs.Type == unix.CGROUP_SUPER_MAGIC || sfs.Type == unix.CGROUP2_SUPER_MAGIC
}

func (d Dir) remove(ctx context.Context) error {
	for d.exists() {
		err := unix.Rmdir(d.Path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if d.Inode != 0 {
			removeBelow(d.Path, maxNested)
		}
		select {
		case <-time.After(removeRetry):
		case <-ctx.Done():
			err = &fs.PathError{Op: "rmdir", Path: d.Path, Err: err}
			if pids, _ := cgroups.GetAllPids(d.Path); len(pids) > 0 {
				err = fmt.Errorf("%w: %d processes are in it, such as %d", err, len(pids), pids[0])
			}
			return err
		}
	}
	return nil
}

// removeBelow removes the cgroups below one, as far as they are empty.
func removeBelow(dir string, depth int) {
	entries, err := os.ReadDir(dir)
	if err != nil || depth == 0 {
		return
	}
	for _, e := range entries {
		if sub := filepath.Join(dir, e.Name()); e.IsDir() && unix.Rmdir(sub) != nil {
			removeBelow(sub, depth-1)
			_ = unix.Rmdir(sub) // if that fails, rmdir of its parent tells
		}
	}
}
