package cgroup_test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/cgroup"
)

// A program in a container sends to a port and gets the answers from it, while the server has another.
func TestRedirectPort(t *testing.T) {
	if os.Getenv("RUNV_TEST_CLIENT") != "" {
		client(t)
		return
	}
	mount := t.TempDir()
	assert.NilError(t, unix.Mount("cgroup2", mount, "cgroup2", 0, ""))
	defer func() { assert.Check(t, unix.Unmount(mount, 0)) }()
	dir := filepath.Join(mount, "redirect-"+strconv.Itoa(os.Getpid()))
	h, err := cgroup.Open(dir)
	assert.NilError(t, err)
	defer func() { assert.Check(t, os.Remove(dir)) }()

	udp, err := net.ListenPacket("udp4", "127.0.0.11:0")
	assert.NilError(t, err)
	defer udp.Close()
	port := udp.LocalAddr().(*net.UDPAddr).Port
	tcp, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.11:%d", port))
	assert.NilError(t, err)
	defer tcp.Close()
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(buf[:n], from)
		}
	}()
	go func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("hello"))
			_ = conn.Close()
		}
	}()
	assert.NilError(t, h.RedirectPort([4]byte{127, 0, 0, 11}, 53, uint16(port)))

	container := filepath.Join(dir, "container")
	assert.NilError(t, os.Mkdir(container, 0o755))
	defer func() { assert.Check(t, os.Remove(container)) }()
	group, err := os.Open(container)
	assert.NilError(t, err)
	defer group.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestRedirectPort$", "-test.v")
	cmd.Env = append(os.Environ(), "RUNV_TEST_CLIENT=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	assert.Assert(t, bytes.Contains(out, []byte("--- PASS")), "%s", out)
}

// client is what runs in the container.
func client(t *testing.T) {
	server := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 11), Port: 53}
	buf := make([]byte, 100)

	connected, err := net.DialUDP("udp4", nil, server)
	assert.NilError(t, err)
	_, err = connected.Write([]byte("a"))
	assert.NilError(t, err)
	n, err := connected.Read(buf)
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:n]), "a")
	raw, err := connected.SyscallConn()
	assert.NilError(t, err)
	assert.NilError(t, raw.Control(func(fd uintptr) {
		peer, err := unix.Getpeername(int(fd))
		assert.NilError(t, err)
		assert.Equal(t, peer.(*unix.SockaddrInet4).Port, 53)
	}))

	free, err := net.ListenUDP("udp4", nil)
	assert.NilError(t, err)
	_, err = free.WriteTo([]byte("b"), server)
	assert.NilError(t, err)
	n, from, err := free.ReadFrom(buf)
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:n])+from.String(), "b127.0.0.11:53")

	conn, err := net.Dial("tcp4", "127.0.0.11:53")
	assert.NilError(t, err)
	n, err = conn.Read(buf)
	assert.NilError(t, err)
	assert.Equal(t, string(buf[:n])+conn.RemoteAddr().String(), "hello127.0.0.11:53")

	// The port is free for programs of the container.
	own, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 53})
	assert.NilError(t, err)
	assert.NilError(t, own.Close())
}
