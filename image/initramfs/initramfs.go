// Package initramfs writes an initramfs whose bytes depend on nothing but its content.
//
// The image builder calls it. An archive has no times, no owners and no inode numbers of the
// machine that built it, and its entries are sorted. It writes no compression: the guest's kernel
// would spend longer on it than the host saves.
package initramfs

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
)

// An Archive collects the entries of an initramfs. The zero value is empty and ready to use.
type Archive struct {
	entries map[string]cpio.Record
}

// File adds a regular file with its permission bits.
func (a *Archive) File(name string, perm uint64, content []byte) error {
	return a.add(cpio.Record{
		ReaderAt: bytes.NewReader(content),
		Info:     cpio.Info{Name: name, Mode: cpio.S_IFREG | perm, FileSize: uint64(len(content))},
	})
}

// Directory adds a directory. The directories above an entry are added with mode 0755 where they
// are missing.
func (a *Archive) Directory(name string, perm uint64) error {
	return a.add(cpio.Directory(name, perm))
}

// Symlink adds a symbolic link.
func (a *Archive) Symlink(name, target string) error {
	return a.add(cpio.Symlink(name, target))
}

// CharDevice adds the node of a character device.
func (a *Archive) CharDevice(name string, perm, major, minor uint64) error {
	return a.add(cpio.CharDev(name, perm, major, minor))
}

func (a *Archive) add(r cpio.Record) error {
	name := path.Clean(strings.TrimPrefix(r.Name, "/"))
	if name == "." || name == ".." || strings.HasPrefix(name, "../") {
		return fmt.Errorf("add %q to the initramfs: not a path below /", r.Name)
	}
	if _, ok := a.entries[name]; ok {
		return fmt.Errorf("add %q to the initramfs: it is there already", r.Name)
	}
	if a.entries == nil {
		a.entries = map[string]cpio.Record{}
	}
	r.Name = name
	a.entries[name] = r
	return nil
}

// WriteTo writes the archive in the kernel's newc format.
func (a *Archive) WriteTo(w io.Writer) (int64, error) {
	all := maps.Clone(a.entries)
	for name := range a.entries {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			parent, ok := all[dir]
			if !ok {
				all[dir] = cpio.Directory(dir, 0o755)
			} else if parent.Mode&cpio.S_IFMT != cpio.S_IFDIR {
				return 0, fmt.Errorf("write the initramfs: %s is below %s, which is no directory", name, dir)
			}
		}
	}
	counted := &countingWriter{w: w}
	out := cpio.Newc.Writer(counted)
	// Sorted by name, so a directory always comes before what is in it.
	for i, name := range slices.Sorted(maps.Keys(all)) {
		r := all[name]
		r.Ino, r.NLink, r.MTime = uint64(i+1), 1, 0
		if err := out.WriteRecord(r); err != nil {
			return counted.n, fmt.Errorf("write %s to the initramfs: %w", name, err)
		}
	}
	if err := cpio.WriteTrailer(out); err != nil {
		return counted.n, fmt.Errorf("write the end of the initramfs: %w", err)
	}
	return counted.n, nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
