package boot

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// addEntropy passes a struct rand_pool_info: bits, size, bytes. Then the
// generator takes them at once, not at its next own time.
func addEntropy(fd int, seed []byte) error {
	if len(seed) == 0 {
		return nil
	}
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(seed)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(seed)))
	info = append(info, seed...)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0])))
	if errno != 0 {
		return errno
	}
	return unix.IoctlSetInt(fd, unix.RNDRESEEDCRNG, 0)
}
