package cgroup

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// RedirectPort makes the containers' sockets that speak to a port of an IPv4 address speak to another
// port of it instead, over TCP and UDP, without noticing: what they see as the peer is what they asked
// for. So a server can be there whose port a container's program may still bind, as Docker's name
// server is for containers of runc, with rules of netfilter. It lasts as long as the hierarchy.
func (h *Hierarchy) RedirectPort(ip [4]byte, from, to uint16) error {
	dir, err := os.Open(h.dir)
	if err != nil {
		return fmt.Errorf("redirect port: %w", err)
	}
	defer dir.Close()
	for _, at := range []struct {
		attachType uint32
		from, to   uint16
	}{
		{unix.BPF_CGROUP_INET4_CONNECT, from, to},
		{unix.BPF_CGROUP_UDP4_SENDMSG, from, to},
		{unix.BPF_CGROUP_UDP4_RECVMSG, to, from},
		{unix.BPF_CGROUP_INET4_GETPEERNAME, to, from},
	} {
		if err := attach(dir, unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, at.attachType, portProgram(ip, at.from, at.to)); err != nil {
			return fmt.Errorf("redirect port: attach program %d: %w", at.attachType, err)
		}
	}
	return nil
}

// Offsets in struct bpf_sock_addr of linux/bpf.h.
const (
	offIP4  = 4
	offPort = 24
)

// portProgram changes one port of an address into another. In the context both are big endian.
func portProgram(ip [4]byte, from, to uint16) []byte {
	const regValue = regContext + 1
	big := func(port uint16) int32 {
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port)))
	}
	a := &assembler{}
	a.load(regValue, offIP4)
	a.jump32(unix.BPF_JNE, regValue, int32(binary.NativeEndian.Uint32(ip[:])), 4)
	a.load(regValue, offPort)
	a.jump32(unix.BPF_JNE, regValue, big(from), 2)
	a.alu(unix.BPF_MOV, regValue, big(to))
	a.store(regValue, offPort)
	a.exit(1)
	return a.code
}
