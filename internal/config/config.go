// Package config owns the host's configuration: the file config.toml, the
// environment and flags above it, and where each value came from.
//
// A flag wins over an environment variable, that over the file, that over the
// default. Unknown keys and bad values are errors that name their place; nothing
// is guessed. The command line, the supervisor and doctor load it; it reads
// files and the environment, and changes nothing.
package config

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// DefaultFile is read when no other file is given. It may be missing.
const DefaultFile = "/etc/runv/config.toml"

// envFile names another file.
const envFile = "RUNV_CONFIG"

// Config is what runv can be told.
type Config struct {
	Accel         string // auto, kvm or tcg
	QEMU          string // program; empty: the driver looks for it
	Pasta         string // program; empty: no network for containers that nobody gives one
	GuestDir      string // absolute; empty: beside the executable
	Kernel        string // absolute; empty: in the guest directory
	Initrd        string // absolute; empty: in the guest directory
	DefaultVCPUs  int    // for a container without a CPU quota
	DefaultMemory int64  // bytes of the VM, for a container without a memory limit
	VMMMemory     int64  // bytes that the VMM may take on the host beyond the VM's memory
	BootTimeout   time.Duration
	Binds         string // Coherent or Exclusive
	Mirrors       bool   // copy small read-only bind mounts to the guest's memory
}

// How a guest may cache files of bind mounts that it can write to.
const (
	Coherent  = "coherent"  // it asks the host before each use: others may change them at any time
	Exclusive = "exclusive" // for a second, without asking: nobody else changes them
)

// Overrides are the flags that concern the configuration. Empty ones are not given.
type Overrides struct {
	File     string // --config: must exist
	GuestDir string // --guest-dir
}

// Origin tells where a value came from.
type Origin struct {
	Kind  string `json:"kind"`            // default, file, env or flag
	Place string `json:"place,omitempty"` // "FILE:LINE:COLUMN", the variable, the flag
}

// String is the place, or "default".
func (o Origin) String() string {
	if o.Place == "" {
		return o.Kind
	}
	return o.Place
}

// Error tells of a value, or a key, that is wrong. It is an
// errdefs.ErrInvalidArgument.
type Error struct {
	Origin Origin
	Key    string // empty when the file as a whole is meant
	Reason string
}

// Error is one line: place, key, reason.
func (e *Error) Error() string {
	if e.Key == "" {
		return e.Origin.String() + ": " + e.Reason
	}
	return e.Origin.String() + ": " + e.Key + ": " + e.Reason
}

// Unwrap returns the kind.
func (e *Error) Unwrap() error { return errdefs.ErrInvalidArgument }

// Key describes one key of the configuration.
type Key struct {
	Name    string // in the file; upper case with the prefix RUNV_ in the environment
	Default string
	Doc     string

	kind kind
	set  func(*Config, string) error
	get  func(*Config) string
}

type kind int

const (
	text     kind = iota
	number        // a TOML integer, not a string
	filePath      // absolute, or relative to the caller's working directory
	program       // a path, or a name without a slash that is looked up
)

// Env is the key's environment variable.
func (k *Key) Env() string { return "RUNV_" + strings.ToUpper(k.Name) }

// Keys lists all keys, in the order in which they are shown.
func Keys() []Key {
	return []Key{
		{
			Name: "accel", Default: "auto",
			Doc: "what executes the guest: kvm, tcg (emulation), or auto: kvm where it is real, else tcg",
			set: func(c *Config, s string) error {
				if !slices.Contains([]string{"auto", "kvm", "tcg"}, s) {
					return fmt.Errorf("%q is not one of auto, kvm, tcg", s)
				}
				c.Accel = s
				return nil
			},
			get: func(c *Config) string { return c.Accel },
		},
		path("qemu", program, "QEMU's program; empty: found in the usual places",
			func(c *Config) *string { return &c.QEMU }),
		path("pasta", program, "pasta's program: a network like the host's for containers to which nobody gives one; empty: none",
			func(c *Config) *string { return &c.Pasta }),
		path("guest_dir", filePath, "directory of the guest's files; empty: beside the executable",
			func(c *Config) *string { return &c.GuestDir }),
		path("kernel", filePath, "the guest's kernel; empty: the one in the guest directory",
			func(c *Config) *string { return &c.Kernel }),
		path("initrd", filePath, "the guest's initramfs; empty: the one in the guest directory",
			func(c *Config) *string { return &c.Initrd }),
		{
			Name: "default_vcpus", Default: "1", kind: number,
			Doc: "vCPUs of a container without a CPU quota",
			set: func(c *Config, s string) (err error) {
				c.DefaultVCPUs, err = parseVCPUs(s)
				return err
			},
			get: func(c *Config) string { return strconv.Itoa(c.DefaultVCPUs) },
		},
		{
			Name: "default_memory", Default: "512MiB",
			Doc: "memory of the VM of a container without a memory limit",
			set: func(c *Config, s string) (err error) {
				c.DefaultMemory, err = parseMemory(s)
				return err
			},
			get: func(c *Config) string { return formatSize(c.DefaultMemory) },
		},
		{
			Name: "vmm_memory", Default: "256MiB",
			Doc: "what QEMU and the share server may take beyond the VM's memory, when the container's is limited",
			set: func(c *Config, s string) (err error) {
				c.VMMMemory, err = parseVMMMemory(s)
				return err
			},
			get: func(c *Config) string { return formatSize(c.VMMMemory) },
		},
		{
			Name: "boot_timeout", Default: "60s",
			Doc: "how long a VM may take from its start to its agent's answer",
			set: func(c *Config, s string) (err error) {
				c.BootTimeout, err = parseTimeout(s)
				return err
			},
			get: func(c *Config) string { return c.BootTimeout.String() },
		},
		{
			Name: "binds", Default: Coherent,
			Doc: "how the guest may cache files of writable bind mounts: coherent, or exclusive when nobody else changes them",
			set: func(c *Config, s string) error {
				if s != Coherent && s != Exclusive {
					return fmt.Errorf("%q is not one of %s, %s", s, Coherent, Exclusive)
				}
				c.Binds = s
				return nil
			},
			get: func(c *Config) string { return c.Binds },
		},
		{
			Name: "mirrors", Default: "on",
			Doc: "whether small read-only bind mounts are repeated in the guest's memory, so that watches (inotify) fire: on or off",
			set: func(c *Config, s string) error {
				if s != "on" && s != "off" {
					return fmt.Errorf("%q is neither on nor off", s)
				}
				c.Mirrors = s == "on"
				return nil
			},
			get: func(c *Config) string {
				if c.Mirrors {
					return "on"
				}
				return "off"
			},
		},
	}
}

// path describes a key whose value is a path or empty.
func path(name string, k kind, doc string, field func(*Config) *string) Key {
	return Key{
		Name: name, Doc: doc, kind: k,
		set: func(c *Config, s string) error {
			*field(c) = s
			return nil
		},
		get: func(c *Config) string { return *field(c) },
	}
}

// Effective is a configuration with the origin of each value. Use Load to get one.
type Effective struct {
	Config
	File    string            // that was read; empty if there is none
	Origins map[string]Origin // by the name of the key
}

// Load reads the configuration. Errors: *Error, errdefs.ErrNotFound for a file
// that was asked for and is missing, errdefs.ErrPermissionDenied for one that
// others may write to, since it names programs that run as root.
func Load(flags Overrides) (*Effective, error) { return load(flags, DefaultFile) }

func load(flags Overrides, defaultFile string) (*Effective, error) {
	file, required := defaultFile, false
	if env := os.Getenv(envFile); env != "" {
		file, required = env, true
	}
	if flags.File != "" {
		file, required = flags.File, true
	}
	values, err := readFile(file, required)
	if err != nil {
		return nil, err
	}
	e := &Effective{Origins: map[string]Origin{}}
	if values != nil {
		e.File = file
	}
	for _, k := range Keys() {
		value, origin := k.Default, Origin{Kind: "default"}
		if v, ok := values[k.Name]; ok {
			value, origin = v.text, v.origin
		}
		if env := os.Getenv(k.Env()); env != "" {
			value, origin = env, Origin{"env", k.Env()}
		}
		if k.Name == "guest_dir" && flags.GuestDir != "" {
			value, origin = flags.GuestDir, Origin{"flag", "--guest-dir"}
		}
		if err := e.apply(&k, value, origin); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// apply sets one value.
func (e *Effective) apply(k *Key, value string, origin Origin) error {
	if strings.ContainsRune(value, 0) {
		return &Error{origin, k.Name, "holds a NUL"}
	}
	relative := value != "" && !filepath.IsAbs(value) &&
		(k.kind == filePath || k.kind == program && strings.Contains(value, "/"))
	if relative {
		// What the file says must not depend on the directory that runv is called in.
		if origin.Kind == "file" {
			return &Error{origin, k.Name, fmt.Sprintf("%q is not an absolute path", value)}
		}
		abs, err := filepath.Abs(value)
		if err != nil {
			return &Error{origin, k.Name, err.Error()}
		}
		value = abs
	}
	if err := k.set(&e.Config, value); err != nil {
		return &Error{origin, k.Name, err.Error()}
	}
	e.Origins[k.Name] = origin
	return nil
}
