package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"

	"runv/image/kmod"
)

// A Kernel is ready for use: its files are in the cache.
type Kernel struct {
	Name    string
	Release string
	// Package and Version name the package it came from, if it came from one.
	Package string
	Version string
	// Early and Late are the modules in load order.
	Early []Module
	Late  []Module
	// Demand are those that are loaded when the kernel asks for them.
	Demand []Module
	// Key is a digest over all that the kernel was made from, but for the package's version.
	Key string

	dir string
}

// A Module is a module of the kernel.
type Module struct {
	Name string
	// Path is absolute, in the guest.
	Path string
	// File is the name of the file in the cache.
	File string
	// Needs are the modules that must be loaded before it, Aliases what the kernel may call it.
	Needs, Aliases []string
}

// Vmlinux returns the path of the kernel itself.
func (k *Kernel) Vmlinux() string { return filepath.Join(k.dir, vmlinuxName) }

// ModuleFile returns the path of a module's file.
func (k *Kernel) ModuleFile(m Module) string { return filepath.Join(k.dir, m.File) }

const (
	vmlinuxName = "vmlinux"
	recordName  = "kernel.json"
)

// A Maker makes kernels.
type Maker struct {
	// Cache is the directory that keeps packages and kernels. One process at a time may use it.
	Cache string
	// Builder identifies the program that builds: another builder does not take what this one made.
	Builder string
	// Repository is where packages come from.
	Repository Repository
	Log        *slog.Logger
}

// Make returns the kernel of a description, from the cache if it is there.
func (m *Maker) Make(ctx context.Context, d *Description) (*Kernel, error) {
	key, err := m.key(d)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(m.Cache, d.Name)
	if k, err := load(dir, key); err == nil {
		return k, nil
	}
	if err := os.MkdirAll(m.Cache, 0o755); err != nil {
		return nil, fmt.Errorf("make kernel cache: %w", err)
	}
	tmp, err := os.MkdirTemp(m.Cache, ".tmp-")
	if err != nil {
		return nil, fmt.Errorf("make kernel cache: %w", err)
	}
	defer os.RemoveAll(tmp)
	k := &Kernel{Name: d.Name, Key: key, dir: filepath.Join(tmp, "kernel")}
	if err := os.Mkdir(k.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make kernel cache: %w", err)
	}
	if d.Files != nil {
		err = k.fromFiles(ctx, d)
	} else {
		err = k.fromDebian(ctx, d, m, filepath.Join(tmp, "package"))
	}
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", d.Name, err)
	}
	if err := k.save(); err != nil {
		return nil, fmt.Errorf("kernel %s: %w", d.Name, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("kernel %s: %w", d.Name, err)
	}
	if err := os.Rename(k.dir, dir); err != nil {
		return nil, fmt.Errorf("kernel %s: %w", d.Name, err)
	}
	k.dir = dir
	return k, nil
}

// key covers the description, the builder and, for an own kernel, its file. An own kernel's modules
// are told apart by the kernel that they were built with.
func (m *Maker) key(d *Description) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "builder %s\n%d\n%s", m.Builder, len(d.raw), d.raw)
	if d.Files != nil {
		digest, err := fileDigest(d.path(d.Files.Vmlinux))
		if err != nil {
			return "", fmt.Errorf("kernel %s: %w", d.Name, err)
		}
		fmt.Fprintf(h, "vmlinux %s\n", digest)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (k *Kernel) fromFiles(ctx context.Context, d *Description) error {
	vmlinux, err := os.ReadFile(d.path(d.Files.Vmlinux))
	if err != nil {
		return err
	}
	if err := k.putVmlinux(vmlinux); err != nil {
		return err
	}
	if d.Files.ModuleTree == "" {
		return nil
	}
	return k.putModules(ctx, d.path(d.Files.ModuleTree), d.Modules)
}

func (k *Kernel) fromDebian(ctx context.Context, d *Description, m *Maker, tree string) error {
	p, err := debianTree(ctx, m.Repository, d.DebianPackage.Package, m.Cache, tree, m.Log)
	if err != nil {
		return err
	}
	k.Package, k.Version = p.name, p.version
	images, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("find the kernel in package %s: %d files boot/vmlinuz-* (%v)", p.name, len(images), err)
	}
	image, err := os.ReadFile(images[0])
	if err != nil {
		return err
	}
	vmlinux, err := ExtractVmlinux(ctx, image)
	if err != nil {
		return err
	}
	if err := k.putVmlinux(vmlinux); err != nil {
		return err
	}
	// The tree's /lib may be a link to its /usr/lib, or the package may be of the time after such
	// links.
	for _, lib := range []string{"lib", "usr/lib"} {
		modules := filepath.Join(tree, lib, "modules", k.Release)
		if _, err := os.Stat(modules); err == nil {
			return k.putModules(ctx, modules, d.Modules)
		}
	}
	return fmt.Errorf("find the kernel's modules: package %s has no lib/modules/%s", p.name, k.Release)
}

func (k *Kernel) putVmlinux(vmlinux []byte) error {
	if err := CheckVmlinux(vmlinux); err != nil {
		return err
	}
	release, err := Release(vmlinux)
	if err != nil {
		return err
	}
	k.Release = release
	return os.WriteFile(k.Vmlinux(), vmlinux, 0o644)
}

func (k *Kernel) putModules(ctx context.Context, dir string, names Modules) error {
	tree, err := kmod.Open(dir)
	if err != nil {
		return err
	}
	loaded := map[string]bool{}
	put := func(names []string) ([]Module, error) {
		resolved, err := tree.Resolve(ctx, names, loaded)
		if err != nil {
			return nil, err
		}
		var out []Module
		for _, r := range resolved {
			m := Module{Name: r.Name, Path: path.Join("/lib/modules", k.Release, r.Path), File: r.Name + ".ko", Needs: r.Needs, Aliases: r.Aliases}
			if err := os.WriteFile(k.ModuleFile(m), r.Data, 0o644); err != nil {
				return nil, err
			}
			out = append(out, m)
		}
		return out, nil
	}
	if k.Early, err = put(names.Early); err != nil {
		return err
	}
	if k.Late, err = put(names.Late); err != nil {
		return err
	}
	k.Demand, err = put(names.Demand)
	return err
}

// save writes the record that load reads.
func (k *Kernel) save() error {
	data, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(k.dir, recordName), data, 0o644)
}

var errOther = errors.New("made from something else")

func load(dir, key string) (*Kernel, error) {
	data, err := os.ReadFile(filepath.Join(dir, recordName))
	if err != nil {
		return nil, err
	}
	k := &Kernel{dir: dir}
	if err := json.Unmarshal(data, k); err != nil {
		return nil, err
	}
	if k.Key != key {
		return nil, errOther
	}
	return k, nil
}
