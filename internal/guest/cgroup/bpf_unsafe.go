package cgroup

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// license is the program's, which matters only to programs that use certain helpers.
var license = []byte("none\x00")

// bpfLoad and bpfAttach are the parts of union bpf_attr that the commands read.
type bpfLoad struct {
	progType, insnCount uint32
	insns, license      uint64
	_                   [5]uint32 // verifier's log, kernel version
	_                   uint32    // flags
	_                   [16]byte  // name
	_                   uint32    // interface
	attachType          uint32
}

type bpfAttach struct {
	target, prog, attachType, flags uint32
}

// loadTries bounds how often a program is loaded that signals have kept from being verified.
const loadTries = 20

// loadProgram loads a BPF program of a type for a place of attachment. The caller closes the result.
func loadProgram(progType, attachType uint32, code []byte) (int, error) {
	attr := bpfLoad{
		progType:   progType,
		insnCount:  uint32(len(code) / 8),
		insns:      uint64(uintptr(unsafe.Pointer(&code[0]))),
		license:    uint64(uintptr(unsafe.Pointer(&license[0]))),
		attachType: attachType,
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	// The verifier gives up when a signal is pending, such as those by which Go's runtime interrupts threads.
	for try := 1; errno == unix.EAGAIN && try < loadTries; try++ {
		fd, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}
	runtime.KeepAlive(code)
	if errno != 0 {
		return -1, errno
	}
	unix.CloseOnExec(int(fd))
	return int(fd), nil
}

// attachProgram makes the kernel run a loaded program for the processes of a cgroup, beside those
// that are attached already.
func attachProgram(cgroup, prog int, attachType uint32) error {
	attr := bpfAttach{target: uint32(cgroup), prog: uint32(prog), attachType: attachType, flags: unix.BPF_F_ALLOW_MULTI}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return errno
	}
	return nil
}
