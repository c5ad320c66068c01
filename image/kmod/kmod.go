// Package kmod reads a kernel's module tree: which file holds a module, what it needs, in which
// order modules must be loaded, and what can be cut off before they are.
//
// The image builder calls it. It takes dependencies from the modules themselves, because a package
// that was never installed has no modules.dep yet. It loads nothing.
package kmod

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"runv/image/unpack"
)

// A Module is a kernel module, ready to load.
type Module struct {
	// Name is the module's name in the kernel's spelling, with underscores.
	Name string
	// Path is its path in the tree, without the suffix of a compression.
	Path string
	// Data is the module itself, decompressed and slimmed.
	Data []byte
	// Needs are the modules that must be loaded before, without those that the kernel has built in.
	Needs []string
	// Aliases are what the kernel may ask for by when it wants the module; patterns are left out.
	Aliases []string
}

// A Tree is a directory as /lib/modules/RELEASE.
type Tree struct {
	dir     string
	files   map[string]string // by name, relative to dir
	builtin map[string]bool
}

// Open finds the modules below dir. It reads none of them.
func Open(dir string) (*Tree, error) {
	t := &Tree{dir: dir, files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := moduleName(path); ok && e.Type().IsRegular() {
			t.files[name], err = filepath.Rel(dir, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list kernel modules: %w", err)
	}
	f, err := os.Open(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("list built-in kernel modules: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if name, ok := moduleName(lines.Text()); ok {
			t.builtin[name] = true
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list built-in kernel modules: %w", err)
	}
	return t, nil
}

// Resolve returns the named modules and all that they need in an order in which they can be loaded,
// each once. What the kernel has built in is left out; so is each name in loaded, and what was
// resolved is added to it.
func (t *Tree) Resolve(ctx context.Context, names []string, loaded map[string]bool) ([]Module, error) {
	r := resolver{tree: t, done: loaded, active: map[string]bool{}}
	for _, name := range names {
		if err := r.add(ctx, canonical(name)); err != nil {
			return nil, err
		}
	}
	return r.order, nil
}

type resolver struct {
	tree   *Tree
	done   map[string]bool
	active map[string]bool // on the path to the module at hand
	order  []Module
}

func (r *resolver) add(ctx context.Context, name string) error {
	if r.done[name] || r.tree.builtin[name] {
		return nil
	}
	if r.active[name] {
		return fmt.Errorf("order kernel modules: %s needs itself", name)
	}
	file, ok := r.tree.files[name]
	if !ok {
		return fmt.Errorf("find kernel module %s: neither built in nor in %s", name, r.tree.dir)
	}
	data, err := read(ctx, filepath.Join(r.tree.dir, file))
	if err != nil {
		return fmt.Errorf("read kernel module %s: %w", name, err)
	}
	info, err := readInfo(data)
	if err != nil {
		return fmt.Errorf("read kernel module %s: %w", name, err)
	}
	// A module that is only wanted makes this one better, and may be missing.
	wants := slices.DeleteFunc(info.wants, func(want string) bool { _, ok := r.tree.files[want]; return !ok })
	needs := slices.DeleteFunc(append(wants, info.needs...), func(need string) bool { return r.tree.builtin[need] })
	r.active[name] = true
	for _, need := range needs {
		if err := r.add(ctx, need); err != nil {
			return fmt.Errorf("for kernel module %s: %w", name, err)
		}
	}
	delete(r.active, name)
	r.done[name] = true
	slim, err := Slim(data)
	if err != nil {
		return fmt.Errorf("slim kernel module %s: %w", name, err)
	}
	path := file[:strings.LastIndex(file, ".ko")] + ".ko"
	r.order = append(r.order, Module{Name: name, Path: path, Data: slim, Needs: needs, Aliases: info.aliases})
	return nil
}

func read(ctx context.Context, path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil || strings.HasSuffix(path, ".ko") {
		return data, err
	}
	return unpack.File(ctx, data)
}

// modInfo is what a module says of itself.
type modInfo struct {
	needs   []string // modules that it cannot be loaded without
	wants   []string // those it asks for beforehand
	aliases []string
}

func readInfo(data []byte) (m modInfo, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return m, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return m, errors.New("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return m, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					m.needs = append(m.needs, canonical(name))
				}
			}
		case "softdep":
			m.wants = append(m.wants, softBefore(value)...)
		case "alias":
			if known(value) {
				m.aliases = append(m.aliases, value)
			}
		}
	}
	return m, nil
}

// known tells whether the agent would recognize a name of a module. Those of devices on buses are patterns, which
// nobody asks for in a guest; those of device nodes end in one number for all.
func known(alias string) bool {
	prefix, all := strings.CutSuffix(alias, "-*")
	if all && (strings.HasPrefix(alias, "block-major-") || strings.HasPrefix(alias, "char-major-")) {
		alias = prefix
	}
	return !strings.ContainsAny(alias, "*?[ ")
}

// softBefore returns the names after "pre:" in a value such as "pre: a b post: c".
func softBefore(value string) []string {
	var names []string
	before := false
	for word := range strings.FieldsSeq(value) {
		switch {
		case strings.HasSuffix(word, ":"):
			before = word == "pre:"
		case before:
			names = append(names, canonical(word))
		}
	}
	return names
}

// moduleName returns the name of the module in a file, and whether it is one.
func moduleName(path string) (string, bool) {
	base := filepath.Base(path)
	for _, suffix := range []string{".ko", ".ko.gz", ".ko.xz", ".ko.zst"} {
		if name, ok := strings.CutSuffix(base, suffix); ok && name != "" {
			return canonical(name), true
		}
	}
	return "", false
}

// canonical spells a module's name as the kernel does.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }
