package boot

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ModprobePath is the name by which the kernel starts the agent when it wants a module.
const ModprobePath = "/sbin/modprobe"

// What can be loaded, with its needs and names, and the modules that are in no file of their own. See DemandList and
// DemandPack in package image.
const (
	demandModules = "/etc/runv/modules.demand"
	demandPack    = "/etc/runv/modules.pack"
)

// Modprobe loads a module, by its name or an alias, with what it needs. It fails for a module that
// the initramfs does not have. The kernel's request_module calls it, in a process of its own.
func Modprobe(name string) error {
	f, err := os.Open(demandModules)
	if err != nil {
		return err
	}
	defer f.Close()
	d, err := readDemand(f)
	if err != nil {
		return err
	}
	if err := d.load(name, demandModule.load); err != nil {
		return err
	}
	return setLaterParameters(parametersDir, laterParameters)
}

// demand is what can be loaded.
type demand struct {
	modules map[string]demandModule
	aliases map[string][]string // the kernel has a name for all that can do the same
}

type demandModule struct {
	name         string
	path         string // "": in the pack
	offset, size int64  // there
	needs        []string
}

func readDemand(r io.Reader) (*demand, error) {
	d := &demand{modules: map[string]demandModule{}, aliases: map[string][]string{}}
	s := bufio.NewScanner(r)
	for s.Scan() {
		words := strings.Fields(s.Text())
		switch {
		case len(words) >= 3 && words[0] == "module":
			d.modules[words[1]] = demandModule{name: words[1], path: words[2], needs: words[3:]}
		case len(words) >= 4 && words[0] == "packed":
			m := demandModule{name: words[1], needs: words[4:]}
			if _, err := fmt.Sscan(words[2]+" "+words[3], &m.offset, &m.size); err != nil {
				return nil, fmt.Errorf("read list of modules: %s: %w", m.name, err)
			}
			d.modules[m.name] = m
		case len(words) == 3 && words[0] == "alias":
			d.aliases[spell(words[1])] = append(d.aliases[spell(words[1])], words[2])
		default:
			return nil, fmt.Errorf("read list of modules: unknown line %.80q", s.Text())
		}
	}
	return d, s.Err()
}

// spell writes a name as the kernel does not always.
func spell(name string) string { return strings.ReplaceAll(name, "-", "_") }

// find returns the modules with a name or an alias. The kernel asks for a device node by two numbers; the alias may have a star
// for the second.
func (d *demand) find(name string) []string {
	name = spell(name)
	if _, ok := d.modules[name]; ok {
		return []string{name}
	}
	if names := d.aliases[name]; names != nil {
		return names
	}
	if i := strings.LastIndexByte(name, '_'); i > 0 {
		return d.aliases[name[:i]+"_*"]
	}
	return nil
}

// load loads modules and what they need, each once, with a function. Of several with the same alias some may refuse:
// those for processors of other kinds, say.
func (d *demand) load(name string, load func(demandModule) error) error {
	names := d.find(name)
	if len(names) == 0 {
		return fmt.Errorf("load module %s: there is none", name)
	}
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if done[name] {
			return nil
		}
		done[name] = true
		m, ok := d.modules[name]
		if !ok {
			return fmt.Errorf("load module %s: there is none", name)
		}
		for _, need := range m.needs {
			if err := add(need); err != nil {
				return err
			}
		}
		return load(m)
	}
	var errs []error
	for _, name := range names {
		if err := add(name); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) < len(names) {
		return nil
	}
	return errors.Join(errs...)
}

// load loads the module. One that is loaded is success.
func (m demandModule) load() error {
	if m.path != "" {
		return loadModule(m.path)
	}
	image, err := m.unpack()
	if err == nil {
		err = unix.InitModule(image, "")
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", m.name, err)
	}
	return nil
}

func (m demandModule) unpack() ([]byte, error) {
	f, err := os.Open(demandPack)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(io.NewSectionReader(f, m.offset, m.size))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}
