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

func loadDeviceProgram(code []byte) (int, error) {
	attr := bpfLoad{
		progType:   unix.BPF_PROG_TYPE_CGROUP_DEVICE,
		insnCount:  uint32(len(code) / 8),
		insns:      uint64(uintptr(unsafe.Pointer(&code[0]))),
		license:    uint64(uintptr(unsafe.Pointer(&license[0]))),
		attachType: unix.BPF_CGROUP_DEVICE,
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(code)
	if errno != 0 {
		return -1, errno
	}
	unix.CloseOnExec(int(fd))
	return int(fd), nil
}

func attachDeviceProgram(target, prog int) error {
	attr := bpfAttach{target: uint32(target), prog: uint32(prog), attachType: unix.BPF_CGROUP_DEVICE, flags: unix.BPF_F_ALLOW_MULTI}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return errno
	}
	return nil
}
