package sharefs

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl passes a buffer that is large enough for each of the commands above.
func ioctl(fd int, cmd uint32, arg *[xflagsSize]byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(cmd), uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return errno
	}
	return nil
}
