// Package imagetest makes small kernels, modules and packages for the tests of the image builder.
//
// Only tests import it. What it makes has the form that the builder looks at, and nothing that
// could run.
package imagetest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
	"gotest.tools/v3/assert"
)

// A section of an ELF file.
type section struct {
	name    string
	flags   elf.SectionFlag
	content []byte
}

// Module returns a kernel module with the given entries in its .modinfo section and with type
// information.
func Module(t testing.TB, modinfo ...string) []byte {
	t.Helper()
	return file(t, elf.ET_REL, 0, nil, []section{
		{".modinfo", elf.SHF_ALLOC, []byte(strings.Join(modinfo, "\x00") + "\x00")},
		{".BTF", elf.SHF_ALLOC, []byte("types")},
	})
}

// Signed returns a module with a signature of some bytes behind it.
func Signed(module []byte) []byte {
	signature := []byte("signature")
	out := append(bytes.Clone(module), signature...)
	out = append(out, make([]byte, 8)...) // algorithms, lengths of what is not there, padding
	out = binary.BigEndian.AppendUint32(out, uint32(len(signature)))
	return append(out, "~Module signature appended~\n"...)
}

// Vmlinux returns a kernel of a release with an ELF note of the given kind; 18 is a PVH entry
// point.
func Vmlinux(t testing.TB, release string, noteKind uint32) []byte {
	t.Helper()
	note := binary.LittleEndian.AppendUint32(nil, 4)
	note = binary.LittleEndian.AppendUint32(note, 8)
	note = binary.LittleEndian.AppendUint32(note, noteKind)
	note = append(note, "Xen\x00\x00\x00\x00\x01\x00\x00\x00\x00"...)
	banner := "Linux version " + release + " (someone@somewhere)\x00"
	return file(t, elf.ET_EXEC, elf.PT_NOTE, note, []section{{".rodata", elf.SHF_ALLOC, []byte(banner)}})
}

// Dynamic returns a program that names a dynamic linker.
func Dynamic(t testing.TB) []byte {
	t.Helper()
	return file(t, elf.ET_DYN, elf.PT_INTERP, []byte("/lib/ld.so\x00"), nil)
}

// BzImage returns a bzImage with the payload, which must be compressed and end in its size as the
// kernel's build does it.
func BzImage(payload []byte) []byte {
	const setupSects, offset = 1, 0x40
	image := make([]byte, (setupSects+1)*512+offset)
	image[0x1f1] = setupSects
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x206:], 0x020f)
	binary.LittleEndian.PutUint32(image[0x248:], offset)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(image, payload...)
}

// LZ4 compresses as the kernel's build does it: LZ4's legacy frame, then the size of the content.
func LZ4(t testing.TB, content []byte) []byte {
	t.Helper()
	block := make([]byte, lz4.CompressBlockBound(len(content)))
	n, err := lz4.CompressBlock(content, block, nil)
	assert.NilError(t, err)
	assert.Assert(t, n > 0, "content that does not compress")
	out := []byte("\x02\x21\x4c\x18")
	out = binary.LittleEndian.AppendUint32(out, uint32(n))
	out = append(out, block[:n]...)
	return binary.LittleEndian.AppendUint32(out, uint32(len(content)))
}

// file returns an ELF file: header, program header for the segment if there is one, contents,
// section headers.
func file(t testing.TB, kind elf.Type, segmentType elf.ProgType, segment []byte, sections []section) []byte {
	t.Helper()
	const headerSize, progSize, sectionSize = 64, 56, 64
	header := elf.Header64{
		Type: uint16(kind), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: headerSize,
		Phoff: headerSize, Phentsize: progSize, Shentsize: sectionSize, Shnum: uint16(len(sections) + 2), Shstrndx: uint16(len(sections) + 1),
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1

	start := uint64(headerSize)
	var progs []elf.Prog64
	if segment != nil {
		start += progSize
		header.Phnum = 1
		progs = []elf.Prog64{{Type: uint32(segmentType), Off: start, Filesz: uint64(len(segment)), Memsz: uint64(len(segment)), Align: 4}}
	}
	content := bytes.Clone(segment)
	names := []byte{0}
	entries := []elf.Section64{{}}
	sections = append(sections, section{name: ".shstrtab"})
	for i, s := range sections {
		entry := elf.Section64{Name: uint32(len(names)), Type: uint32(elf.SHT_PROGBITS), Flags: uint64(s.flags), Off: start + uint64(len(content)), Addralign: 1}
		names = append(names, s.name+"\x00"...)
		if i == len(sections)-1 {
			s.content, entry.Type = names, uint32(elf.SHT_STRTAB)
		}
		entry.Size = uint64(len(s.content))
		content = append(content, s.content...)
		entries = append(entries, entry)
	}
	header.Shoff = start + uint64(len(content))

	var out bytes.Buffer
	for _, part := range []any{header, progs, content, entries} {
		assert.NilError(t, binary.Write(&out, binary.LittleEndian, part))
	}
	return out.Bytes()
}
