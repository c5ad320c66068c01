package network

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// openMembers opens a socket whose memberships have interfaces take all multicasts, for the guest's are not known
// to the namespace's kernel. They do not show in the interfaces' flags, and end with the socket.
func openMembers(ns *Namespace) (*os.File, error) {
	var file *os.File
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // of no protocol: it gets nothing
		if err != nil {
			return err
		}
		file = os.NewFile(uintptr(fd), "packet socket")
		return nil
	})
	return file, err
}

// join adds an interface's membership, which ends with the interface.
func join(members *os.File, index int) error {
	raw, err := members.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) {
		m := unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_ALLMULTI}
		callErr = unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m)
	})
	return errors.Join(err, callErr)
}
