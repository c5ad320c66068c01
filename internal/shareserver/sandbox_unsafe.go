package shareserver

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setCapabilities leaves these capabilities to all threads, as far as they have them, permitted and effective.
func setCapabilities(keep [2]uint32) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	for i, want := range keep {
		have := data[i].Permitted & want
		data[i] = unix.CapUserData{Effective: have, Permitted: have}
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// loadFilter makes a filter that of all threads. program is an array of struct sock_filter.
func loadFilter(program []byte) error {
	const instruction = 8 // bytes
	prog := unix.SockFprog{
		Len:    uint16(len(program) / instruction), //nolint:gosec // the kernel's limit is 4096
		Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(program))),
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	return nil
}
