package kernel

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"

	"runv/image/unpack"
)

// Offsets in the setup header of a bzImage (Documentation/arch/x86/boot.rst).
const (
	offSetupSects    = 0x1f1
	offHeaderMagic   = 0x202
	offHeaderVersion = 0x206
	offPayload       = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250
	sectorSize       = 512
	payloadVersion   = 0x0208 // the first version with a payload
	defaultSects     = 4      // what zero means
)

// ExtractVmlinux returns the vmlinux inside a bzImage, decompressed.
func ExtractVmlinux(ctx context.Context, image []byte) ([]byte, error) {
	if len(image) < headerEnd || string(image[offHeaderMagic:offHeaderMagic+4]) != "HdrS" {
		return nil, errors.New("extract vmlinux: not a bzImage")
	}
	le := binary.LittleEndian
	if v := le.Uint16(image[offHeaderVersion:]); v < payloadVersion {
		return nil, fmt.Errorf("extract vmlinux: boot protocol %d.%02d is too old", v>>8, v&0xff)
	}
	sects := uint64(image[offSetupSects])
	if sects == 0 {
		sects = defaultSects
	}
	start := (sects+1)*sectorSize + uint64(le.Uint32(image[offPayload:]))
	end := start + uint64(le.Uint32(image[offPayloadLength:]))
	if end > uint64(len(image)) {
		return nil, errors.New("extract vmlinux: the bzImage ends before its payload")
	}
	vmlinux, err := unpack.Payload(ctx, image[start:end])
	if err != nil {
		return nil, fmt.Errorf("extract vmlinux: %w", err)
	}
	return vmlinux, nil
}

// pvhNoteType is XEN_ELFNOTE_PHYS32_ENTRY: the address at which a hypervisor enters the kernel in
// 32-bit mode.
const pvhNoteType = 18

// maxNotes bounds, in bytes, the notes that are read.
const maxNotes = 1 << 20

// CheckVmlinux tells whether QEMU can boot the kernel directly: an x86-64 ELF program with a PVH
// entry point.
func CheckVmlinux(vmlinux []byte) error {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return fmt.Errorf("check vmlinux: %w", err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		return fmt.Errorf("check vmlinux: %s %s, want an x86-64 program", f.Machine, f.Type)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > maxNotes {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("check vmlinux: read notes: %w", err)
		}
		if hasNote(notes, "Xen\x00", pvhNoteType) {
			return nil
		}
	}
	return errors.New("check vmlinux: no PVH entry point: build the kernel with CONFIG_PVH=y")
}

// hasNote looks for an ELF note. Each is: sizes of name and content, type, name, content, the last
// two padded to four bytes.
func hasNote(notes []byte, name string, kind uint32) bool {
	le := binary.LittleEndian
	for len(notes) >= 12 {
		nameSize, descSize, noteKind := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		descStart := 12 + (nameSize+3)&^3
		end := descStart + (descSize+3)&^3
		if descStart > uint64(len(notes)) || descStart+descSize > uint64(len(notes)) {
			return false
		}
		if noteKind == kind && string(notes[12:12+nameSize]) == name {
			return true
		}
		notes = notes[min(end, uint64(len(notes))):]
	}
	return false
}

// banner is the beginning of the kernel's linux_banner.
var banner = regexp.MustCompile(`Linux version ([0-9][^ \x00]*) \(`)

// Release returns what uname -r will print under the kernel.
func Release(vmlinux []byte) (string, error) {
	m := banner.FindSubmatch(vmlinux)
	if m == nil {
		return "", errors.New("find the kernel's release: no version banner in vmlinux")
	}
	return string(m[1]), nil
}
