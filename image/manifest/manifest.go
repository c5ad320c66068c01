// Package manifest describes a built guest: the kernel, the initramfs and what went into them.
//
// The image builder writes it as guest.json beside the two files it describes; whoever starts
// virtual machines or reports about them reads it. It knows nothing of how the files came to be.
package manifest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Version is the version of the file's format.
const Version = 1

// The names of the files of a guest, in one directory.
const (
	VmlinuxFile  = "vmlinux"
	InitrdFile   = "initrd.cpio"
	ManifestFile = "guest.json"
)

// maxSize bounds what Load reads.
const maxSize = 1 << 20

// A Guest is the description of a built guest.
type Guest struct {
	Version int `json:"version"`
	// Arch is the architecture as Go names it.
	Arch   string `json:"arch"`
	Kernel Kernel `json:"kernel"`
	Agent  Agent  `json:"agent"`
	// Vmlinux and Initrd describe the two files beside this one.
	Vmlinux File `json:"vmlinux"`
	Initrd  File `json:"initrd"`
	// Inputs is a digest over all that the guest was built from. The builder has nothing to do
	// while it is equal.
	Inputs string `json:"inputs"`
}

// A Kernel says where the guest's kernel came from.
type Kernel struct {
	// Name is the name of the kernel's description.
	Name string `json:"name"`
	// Release is what uname -r prints in the guest.
	Release string `json:"release"`
	// Package and PackageVersion name the distribution's package; empty for a kernel that was given
	// as a file.
	Package        string `json:"package,omitempty"`
	PackageVersion string `json:"package_version,omitempty"`
	// EarlyModules and LateModules are in load order, dependencies included.
	EarlyModules []string `json:"early_modules,omitempty"`
	LateModules  []string `json:"late_modules,omitempty"`
	// DemandModules are loaded when the kernel asks for them.
	DemandModules []string `json:"demand_modules,omitempty"`
}

// An Agent identifies the agent in the initramfs.
type Agent struct {
	// Version is what the agent calls itself.
	Version string `json:"version"`
	// SHA256 is the digest of its binary.
	SHA256 string `json:"sha256"`
	// InitSHA256 is the digest of the program that sets up the processes of containers.
	InitSHA256 string `json:"init_sha256"`
}

// A File is a file of the guest with its size in bytes.
type File struct {
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`
}

// Load reads the description of the guest in dir. It does not look at the files that it describes.
func Load(dir string) (*Guest, error) {
	path := filepath.Join(dir, ManifestFile)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the guest's description: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read the guest's description: %w", err)
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("read %s: longer than %d bytes", path, maxSize)
	}
	var g Guest
	if err := json.Unmarshal(data, &g); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if g.Version != Version {
		return nil, fmt.Errorf("read %s: version %d, this program knows %d", path, g.Version, Version)
	}
	return &g, nil
}

// Encode returns the file's bytes. The same guest gives the same bytes.
func (g *Guest) Encode() ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(g); err != nil {
		return nil, fmt.Errorf("encode the guest's description: %w", err)
	}
	return b.Bytes(), nil
}
