package cli

import (
	"context"
	"fmt"
	"net"

	urfave "github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

func pidfdSocketFlag(path *string) urfave.Flag {
	return &urfave.StringFlag{
		Name: "pidfd-socket", Destination: path, TakesFile: true,
		Usage: "unix `SOCKET` that gets a pidfd of the process's stand-in",
	}
}

// sendPidfd sends a file descriptor of a process to a socket, with the word by which runc says
// what it is of. Without a socket it does nothing.
func sendPidfd(ctx context.Context, socket, word string, pid int) error {
	if socket == "" {
		return nil
	}
	var dialer net.Dialer
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("--pidfd-socket: %w", err)
	}
	defer conn.Close()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("--pidfd-socket: open pidfd of %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte(word), unix.UnixRights(fd), nil); err != nil {
		return fmt.Errorf("--pidfd-socket: %w", err)
	}
	return nil
}
