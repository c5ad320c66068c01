package kmod

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
)

// Slim returns a copy of a module without what takes the guest's kernel time and is of no use
// there: the signature, and the type information for tracing programs. Together they are a third of
// the time that loading takes under TCG. The guest's modules are trusted as the initramfs is, which
// comes from the host.
func Slim(module []byte) ([]byte, error) {
	return dropTypes(stripSignature(module))
}

// signatureMagic ends a signed module.
const signatureMagic = "~Module signature appended~\n"

// signatureHeader is the size of the kernel's struct module_signature, which stands before the
// magic and ends in the length of the signature, big-endian.
const signatureHeader = 12

// stripSignature cuts the signature off, if there is one.
func stripSignature(module []byte) []byte {
	body, ok := bytes.CutSuffix(module, []byte(signatureMagic))
	if !ok || len(body) < signatureHeader {
		return module
	}
	size := uint64(binary.BigEndian.Uint32(body[len(body)-4:]))
	if size > uint64(len(body)-signatureHeader) {
		return module
	}
	return body[:len(body)-signatureHeader-int(size)]
}

// typesSection is the section that the kernel parses, by its name, when it loads a module.
const typesSection = ".BTF"

// dropTypes takes the name from the section with type information, and the flag that makes it part
// of the loaded module, so that the kernel passes over it. The bytes stay where they are: nothing
// else in the file moves.
func dropTypes(module []byte) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	if f.Class != elf.ELFCLASS64 || f.ByteOrder != binary.LittleEndian {
		return nil, fmt.Errorf("%s %s: only 64-bit little-endian modules are known", f.Class, f.Data)
	}
	var header elf.Header64
	if err := binary.Read(bytes.NewReader(module), binary.LittleEndian, &header); err != nil {
		return nil, err
	}
	out := bytes.Clone(module)
	for i, section := range f.Sections {
		if section.Name != typesSection {
			continue
		}
		at := header.Shoff + uint64(i)*uint64(header.Shentsize)
		if at+uint64(header.Shentsize) > uint64(len(out)) {
			return nil, errors.New("a section header is outside of the file")
		}
		entry := out[at:]
		// Name is the first field of a section header, flags the third.
		binary.LittleEndian.PutUint32(entry, 0)
		binary.LittleEndian.PutUint64(entry[8:], uint64(section.Flags&^elf.SHF_ALLOC))
	}
	return out, nil
}
