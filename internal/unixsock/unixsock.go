// Package unixsock binds and dials unix sockets in directories whose paths are
// too long for a socket address (108 bytes, unix(7)), and tells who is at the other end.
//
// It owns nothing but that detour: short paths are used as they are, so that
// tools show them; long ones go through /proc/self/fd. Host packages that serve
// or call a socket in the state directory use it. It never removes a socket: the
// directory's owner does.
package unixsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path that fits into a socket address with its final NUL.
const maxPath = 107

// Listen binds and listens on the socket name in the existing directory dir,
// mode 0600. network is "unix" or "unixpacket". The caller closes the listener;
// the socket's file stays then. The error is syscall.EADDRINUSE when the name
// exists, whoever left it.
func Listen(dir, name, network string) (*net.UnixListener, error) {
	addr, done, err := address(dir, name, network)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(dir, name), err)
	}
	defer done()
	l, err := net.ListenUnix(network, addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(dir, name), cause(err))
	}
	// The detour's path is not valid for the life of the listener.
	l.SetUnlinkOnClose(false)
	if err := unix.Chmod(addr.Name, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listen on %s: chmod: %w", filepath.Join(dir, name), err)
	}
	return l, nil
}

// Dial connects to the socket name in the directory dir; ctx bounds the
// connecting, not the life of the connection. network is "unix" or "unixpacket".
// The error is syscall.ENOENT when the name or directory does not exist and
// syscall.ECONNREFUSED when nobody listens.
func Dial(ctx context.Context, dir, name, network string) (*net.UnixConn, error) {
	addr, done, err := address(dir, name, network)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", filepath.Join(dir, name), err)
	}
	defer done()
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr.Name)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", filepath.Join(dir, name), cause(err))
	}
	return conn.(*net.UnixConn), nil
}

// Peer tells which process is at the other end of a connection, as the kernel knows it.
func Peer(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("identify peer: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("identify peer: %w", err)
	}
	return cred, nil
}

// address makes a socket address for dir/name that fits. It is valid until done
// is called.
func address(dir, name, network string) (addr *net.UnixAddr, done func(), err error) {
	if network != "unix" && network != "unixpacket" {
		return nil, nil, net.UnknownNetworkError(network)
	}
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return nil, nil, fmt.Errorf("invalid socket name %q", name)
	}
	// A leading '@' would mean the abstract namespace.
	if path := filepath.Join(dir, name); len(path) <= maxPath && filepath.IsAbs(path) {
		return &net.UnixAddr{Name: path, Net: network}, func() {}, nil
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	path := fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)
	if len(path) > maxPath {
		_ = unix.Close(fd)
		return nil, nil, fmt.Errorf("socket name of %d bytes: %w", len(name), unix.ENAMETOOLONG)
	}
	return &net.UnixAddr{Name: path, Net: network}, func() { _ = unix.Close(fd) }, nil
}

// cause strips what net adds: the detour's path tells nobody anything.
func cause(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}
