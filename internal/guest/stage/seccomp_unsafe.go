package stage

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// setFilter adds a seccomp filter to this thread.
func setFilter(program []uint64, flags uint32) error {
	fprog := unix.SockFprog{
		Len:    uint16(len(program)),
		Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(program))),
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return errno
	}
	return nil
}
