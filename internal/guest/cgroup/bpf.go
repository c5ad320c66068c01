package cgroup

import (
	"encoding/binary"
	"os"

	"golang.org/x/sys/unix"
)

// Registers of every program; the others are its own.
const (
	regResult  = iota // what the program returns: 1 allows
	regContext        // where its context is
)

// assembler builds a BPF program.
type assembler struct{ code []byte }

func (a *assembler) emit(op, dst, src uint8, off int16, imm int32) {
	a.code = append(a.code, op, src<<4|dst)
	a.code = binary.NativeEndian.AppendUint16(a.code, uint16(off))
	a.code = binary.NativeEndian.AppendUint32(a.code, uint32(imm))
}

func (a *assembler) load(dst uint8, off int16) {
	a.emit(unix.BPF_LDX|unix.BPF_W|unix.BPF_MEM, dst, regContext, off, 0)
}

// store writes a register into the context.
func (a *assembler) store(src uint8, off int16) {
	a.emit(unix.BPF_STX|unix.BPF_W|unix.BPF_MEM, regContext, src, off, 0)
}

func (a *assembler) alu(op, dst uint8, imm int32) {
	a.emit(unix.BPF_ALU|op|unix.BPF_K, dst, 0, 0, imm)
}

// jump skips the next skip instructions when "dst op imm" holds.
func (a *assembler) jump(op, dst uint8, imm int32, skip int16) {
	a.emit(unix.BPF_JMP|op|unix.BPF_K, dst, 0, skip, imm)
}

// jump32 is jump for the lower half of dst.
func (a *assembler) jump32(op, dst uint8, imm int32, skip int16) {
	a.emit(unix.BPF_JMP32|op|unix.BPF_K, dst, 0, skip, imm)
}

func (a *assembler) exit(result int32) {
	a.emit(unix.BPF_ALU64|unix.BPF_MOV|unix.BPF_K, regResult, 0, 0, result)
	a.emit(unix.BPF_JMP|unix.BPF_EXIT, 0, 0, 0, 0)
}

// attach loads a program and makes the kernel run it for the processes of a cgroup and of those
// below it, for as long as the cgroup exists.
func attach(cgroup *os.File, progType, attachType uint32, code []byte) error {
	prog, err := loadProgram(progType, attachType, code)
	if err != nil {
		return err
	}
	defer unix.Close(prog)
	return attachProgram(int(cgroup.Fd()), prog, attachType)
}
