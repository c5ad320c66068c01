// Package image builds the guest: the kernel as a vmlinux, the initramfs with the agent and the
// modules, and the description of both.
//
// The program in image/mkguest calls it when the project is built; runv itself never does. It runs
// nothing as the guest and installs nothing on the host. The same inputs give the same bytes.
package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gofrs/flock"

	"runv/image/initramfs"
	"runv/image/kernel"
	"runv/image/manifest"
)

// What the agent finds in the initramfs.
const (
	// AgentPath is the agent, which the kernel starts as the first process.
	AgentPath = "/init"
	// InitPath is the small program that the agent starts for each process of a container.
	InitPath = "/runv-init"
	// EarlyList and LateList name modules, one absolute path a line, in load order.
	EarlyList = "/etc/runv/modules.early"
	LateList  = "/etc/runv/modules.late"
	// DemandList is what ModprobePath knows: a line "module NAME PATH NEED..." for each module of the other lists, a
	// line "packed NAME OFFSET SIZE NEED..." for each that is in DemandPack there, and a line "alias ALIAS NAME" for
	// each name more.
	DemandList = "/etc/runv/modules.demand"
	// DemandPack has the modules that are loaded on demand, each compressed by gzip: making a file of its own for
	// each would take the guest's kernel five times as long.
	DemandPack = "/etc/runv/modules.pack"
	// ModprobePath is the agent under the name by which the kernel asks for modules.
	ModprobePath = "/sbin/modprobe"
)

// lockRetry is how often a build looks whether another one has ended.
const lockRetry = 200 * time.Millisecond

// A Config says what to build and where.
type Config struct {
	// Kernel is the path of the kernel's description.
	Kernel string
	// Agent is the path of the agent's static binary.
	Agent string
	// Init is the path of the static program that sets up the processes of containers.
	Init string
	// AgentVersion is what the agent calls itself.
	AgentVersion string
	// Out is the directory for the three files.
	Out string
	// Cache is the directory that keeps downloads and kernels.
	Cache string
	// Builder identifies the building program: what another one made is not taken for this one's.
	Builder string
	// Repository is where packages come from.
	Repository kernel.Repository
	Log        *slog.Logger
}

// Build makes the guest and returns its description, and whether anything had to be done. It waits
// while another process builds in the same cache.
func Build(ctx context.Context, cfg Config) (*manifest.Guest, bool, error) {
	for _, dir := range []string{cfg.Cache, cfg.Out} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, false, fmt.Errorf("make directory: %w", err)
		}
	}
	lock := flock.New(filepath.Join(cfg.Cache, "lock"))
	if _, err := lock.TryLockContext(ctx, lockRetry); err != nil {
		return nil, false, fmt.Errorf("wait for another build in %s: %w", cfg.Cache, err)
	}
	defer lock.Close()

	d, err := kernel.ReadDescription(cfg.Kernel)
	if err != nil {
		return nil, false, err
	}
	agent, err := readProgram(cfg.Agent)
	if err != nil {
		return nil, false, err
	}
	init, err := readProgram(cfg.Init)
	if err != nil {
		return nil, false, err
	}
	maker := kernel.Maker{Cache: cfg.Cache, Builder: cfg.Builder, Repository: cfg.Repository, Log: cfg.Log}
	k, err := maker.Make(ctx, d)
	if err != nil {
		return nil, false, err
	}
	g := &manifest.Guest{
		Version: manifest.Version,
		Arch:    d.Arch,
		Kernel: manifest.Kernel{
			Name: k.Name, Release: k.Release, Package: k.Package, PackageVersion: k.Version,
			EarlyModules: names(k.Early), LateModules: names(k.Late), DemandModules: names(k.Demand),
		},
		Agent: manifest.Agent{Version: cfg.AgentVersion, SHA256: digest(agent), InitSHA256: digest(init)},
	}
	g.Inputs = digest([]byte(strings.Join([]string{k.Key, k.Version, g.Agent.SHA256, g.Agent.InitSHA256, g.Agent.Version}, "\n")))
	if current(cfg.Out, g) {
		old, err := manifest.Load(cfg.Out)
		return old, false, err
	}
	return g, true, write(cfg.Out, g, k, agent, init)
}

// readProgram reads a program of the guest and checks that the guest's kernel could start it: there
// is no dynamic linker in the initramfs.
func readProgram(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the guest's program: %w", err)
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("read the guest's program %s: %w", path, err)
	}
	if f.Machine != elf.EM_X86_64 {
		return nil, fmt.Errorf("read the guest's program %s: it is for %s", path, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("read the guest's program %s: it is dynamically linked: build it with CGO_ENABLED=0", path)
		}
	}
	return data, nil
}

// write makes the three files, the description last: it names the digests of the other two.
func write(out string, g *manifest.Guest, k *kernel.Kernel, agent, init []byte) error {
	vmlinux, err := os.ReadFile(k.Vmlinux())
	if err != nil {
		return fmt.Errorf("read vmlinux: %w", err)
	}
	initrd, err := Initrd(k, agent, init)
	if err != nil {
		return err
	}
	g.Vmlinux = manifest.File{SHA256: digest(vmlinux), Size: int64(len(vmlinux))}
	g.Initrd = manifest.File{SHA256: digest(initrd), Size: int64(len(initrd))}
	description, err := g.Encode()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name    string
		content []byte
	}{
		{manifest.VmlinuxFile, vmlinux},
		{manifest.InitrdFile, initrd},
		{manifest.ManifestFile, description},
	} {
		if err := replace(filepath.Join(out, f.name), f.content); err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
	}
	return nil
}

// Initrd returns the initramfs for a kernel, an agent and its init program.
func Initrd(k *kernel.Kernel, agent, init []byte) ([]byte, error) {
	var a initramfs.Archive
	var errs []error
	add := func(err error) { errs = append(errs, err) }
	for _, dir := range []struct {
		name string
		perm uint64
	}{
		{"dev", 0o755}, {"proc", 0o555}, {"sys", 0o555}, {"run", 0o755}, {"tmp", 0o1777}, {"root", 0o700},
	} {
		add(a.Directory(dir.name, dir.perm))
	}
	// The kernel opens it for the first process, before anything is mounted on /dev.
	add(a.CharDevice("dev/console", 0o600, 5, 1))
	add(a.File(AgentPath, 0o755, agent))
	add(a.File(InitPath, 0o755, init))
	for _, list := range []struct {
		name    string
		modules []kernel.Module
	}{{EarlyList, k.Early}, {LateList, k.Late}} {
		var lines strings.Builder
		for _, m := range list.modules {
			data, err := os.ReadFile(k.ModuleFile(m))
			if err != nil {
				return nil, fmt.Errorf("read kernel module: %w", err)
			}
			add(a.File(m.Path, 0o644, data))
			lines.WriteString(m.Path + "\n")
		}
		add(a.File(list.name, 0o644, []byte(lines.String())))
	}
	add(addDemand(&a, k))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if _, err := a.WriteTo(&out); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// addDemand adds the modules that are loaded on demand.
func addDemand(a *initramfs.Archive, k *kernel.Kernel) error {
	var lines strings.Builder
	var pack bytes.Buffer
	line := func(m kernel.Module, kind, place string) {
		fmt.Fprintln(&lines, strings.Join(append([]string{kind, m.Name, place}, m.Needs...), " "))
		for _, alias := range m.Aliases {
			fmt.Fprintln(&lines, "alias", alias, m.Name)
		}
	}
	for _, m := range slices.Concat(k.Early, k.Late) {
		line(m, "module", m.Path)
	}
	for _, m := range k.Demand {
		data, err := os.ReadFile(k.ModuleFile(m))
		if err != nil {
			return fmt.Errorf("read kernel module: %w", err)
		}
		start := pack.Len()
		z, err := gzip.NewWriterLevel(&pack, gzip.BestCompression)
		if err != nil {
			return err
		}
		if _, err := z.Write(data); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		line(m, "packed", fmt.Sprintf("%d %d", start, pack.Len()-start))
	}
	return errors.Join(
		a.File(DemandList, 0o644, []byte(lines.String())), a.File(DemandPack, 0o644, pack.Bytes()), a.Symlink(ModprobePath, AgentPath),
	)
}

// current tells whether the files in out are those that would be made for g.
func current(out string, g *manifest.Guest) bool {
	old, err := manifest.Load(out)
	if err != nil || old.Inputs != g.Inputs {
		return false
	}
	same := func(name string, f manifest.File) bool {
		info, err := os.Stat(filepath.Join(out, name))
		return err == nil && info.Size() == f.Size
	}
	return same(manifest.VmlinuxFile, old.Vmlinux) && same(manifest.InitrdFile, old.Initrd)
}

// replace puts a file in place of another at once: whoever has the old one open keeps it.
func replace(path string, content []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}

func names(modules []kernel.Module) []string {
	var out []string
	for _, m := range modules {
		out = append(out, m.Name)
	}
	return out
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
