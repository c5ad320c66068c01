// Package kernel gets a guest kernel: a vmlinux that QEMU boots through its PVH entry point, and
// the modules that the guest needs.
//
// The image builder calls it with a Description, a small file that says where the kernel comes
// from. Nothing is installed on the host. What was made is kept and taken again while description
// and builder are the same.
package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"

	"github.com/pelletier/go-toml/v2"
)

// A Description says where a kernel comes from. Exactly one source is given.
type Description struct {
	// Name names the kernel and its place in the cache.
	Name string `toml:"name"`
	// Arch is the architecture as Go and Debian name it. The only one known is amd64.
	Arch string `toml:"arch"`

	DebianPackage *DebianPackage `toml:"debian-package"`
	Files         *Files         `toml:"files"`

	Modules Modules `toml:"modules"`

	dir string // of the file, for the paths in it
	raw []byte
}

// A DebianPackage is a kernel from a package of the distribution, by the package's name: the
// kernel's own package, or the one that always depends on the newest.
type DebianPackage struct {
	Package string `toml:"package"`
}

// Files is a kernel that somebody built. Paths are relative to the description.
type Files struct {
	Vmlinux string `toml:"vmlinux"`
	// ModuleTree is the kernel's directory as /lib/modules/RELEASE, and may be empty if no modules
	// are named.
	ModuleTree string `toml:"module-tree"`
}

// Modules are names of kernel modules. Those that they need are found, those that the kernel has
// built in are left out.
type Modules struct {
	// Early are loaded before the agent answers.
	Early []string `toml:"early"`
	// Late are loaded right after.
	Late []string `toml:"late"`
	// Demand are loaded when the kernel asks for them.
	Demand []string `toml:"demand"`
}

var plainName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]*$`)

// ReadDescription reads a description and checks it.
func ReadDescription(path string) (*Description, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read kernel description: %w", err)
	}
	d := &Description{dir: filepath.Dir(path), raw: data}
	if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(d); err != nil {
		if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
			return nil, fmt.Errorf("read kernel description %s: unknown key\n%s", path, strict.String())
		}
		return nil, fmt.Errorf("read kernel description %s: %w", path, err)
	}
	if err := d.check(); err != nil {
		return nil, fmt.Errorf("read kernel description %s: %w", path, err)
	}
	return d, nil
}

func (d *Description) check() error {
	switch {
	case !plainName.MatchString(d.Name):
		return fmt.Errorf("name: %q must consist of lower-case letters, digits and .+-", d.Name)
	case d.Arch != "amd64":
		return fmt.Errorf("arch: %q is not known, only amd64 is", d.Arch)
	case d.Arch != runtime.GOARCH:
		return fmt.Errorf("arch: %s is not this machine's, %s", d.Arch, runtime.GOARCH)
	case (d.DebianPackage == nil) == (d.Files == nil):
		return errors.New("give either [debian-package] or [files]")
	case d.DebianPackage != nil && !plainName.MatchString(d.DebianPackage.Package):
		return fmt.Errorf("debian-package.package: %q is no package name", d.DebianPackage.Package)
	case d.Files != nil && d.Files.Vmlinux == "":
		return errors.New("files.vmlinux: must not be empty")
	case d.Files != nil && d.Files.ModuleTree == "" && len(d.Modules.Early)+len(d.Modules.Late)+len(d.Modules.Demand) > 0:
		return errors.New("files.module-tree: must not be empty when modules are named")
	}
	return nil
}

// path returns the absolute place of a path in the description.
func (d *Description) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(d.dir, name)
}
