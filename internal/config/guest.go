package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"runv/image/manifest"
)

// Guest names the files that a VM boots from.
type Guest struct {
	Dir     string // where they were found; empty if both were configured one by one
	Kernel  string // path
	Initrd  string // path
	Release string // of the kernel, as described beside it; empty if nobody says
}

// Guest finds the guest's files: those that are configured, and otherwise, for
// an executable at DIR/runv, in DIR/../build/guest (run from the source tree)
// and DIR/../share/runv (installed). The error is errdefs.ErrNotFound and tells
// where it looked.
func (e *Effective) Guest() (Guest, error) {
	executable, err := os.Executable()
	if err != nil {
		return Guest{}, fmt.Errorf("find guest files: %w", err)
	}
	return e.guestOf(executable)
}

func (e *Effective) guestOf(executable string) (Guest, error) {
	g := Guest{Kernel: e.Kernel, Initrd: e.Initrd}
	if g.Kernel != "" && !isFile(g.Kernel) {
		return Guest{}, notFound("%s: no such file (%s)", g.Kernel, e.from("kernel"))
	}
	if g.Initrd != "" && !isFile(g.Initrd) {
		return Guest{}, notFound("%s: no such file (%s)", g.Initrd, e.from("initrd"))
	}
	if g.Kernel != "" && g.Initrd != "" {
		return g, nil
	}
	dirs, why := []string{e.GuestDir}, e.from("guest_dir")
	if e.GuestDir == "" {
		dirs, why = besides(executable), "set guest_dir, RUNV_GUEST_DIR or --guest-dir to where they are"
	}
	var looked []string
	for _, dir := range dirs {
		found := g.in(dir)
		switch {
		case !isFile(found.Kernel):
			looked = append(looked, fmt.Sprintf("%s has no %s", dir, manifest.VmlinuxFile))
		case !isFile(found.Initrd):
			looked = append(looked, fmt.Sprintf("%s has no %s", dir, manifest.InitrdFile))
		default:
			return found, nil
		}
	}
	return Guest{}, notFound("%s (%s)", strings.Join(looked, ", "), why)
}

// in fills what is not configured with the files in dir.
func (g Guest) in(dir string) Guest {
	g.Dir = dir
	if g.Initrd == "" {
		g.Initrd = filepath.Join(dir, manifest.InitrdFile)
	}
	if g.Kernel == "" {
		g.Kernel = filepath.Join(dir, manifest.VmlinuxFile)
		// Only a description, for people: a guest without it boots, too.
		if m, err := manifest.Load(dir); err == nil {
			g.Release = m.Kernel.Release
		}
	}
	return g
}

// from tells which setting named a path.
func (e *Effective) from(key string) string { return key + " from " + e.Origins[key].String() }

// besides lists the guest directories that belong to an executable. A symlink
// to it, such as one in /usr/local/bin, does not change where its files are.
func besides(executable string) []string {
	if real, err := filepath.EvalSymlinks(executable); err == nil {
		executable = real
	}
	prefix := filepath.Dir(filepath.Dir(executable))
	return []string{filepath.Join(prefix, "build", "guest"), filepath.Join(prefix, "share", "runv")}
}

func isFile(path string) bool {
	fi, err := os.Stat(path)
	// What cannot be looked at may be there: the error of opening it tells more.
	return err == nil && fi.Mode().IsRegular() || errors.Is(err, fs.ErrPermission)
}

func notFound(format string, args ...any) error {
	return errdefs.ErrNotFound.WithMessage("find guest files: " + fmt.Sprintf(format, args...))
}
