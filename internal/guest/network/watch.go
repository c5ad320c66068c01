package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// linkNews tells of changes to the devices of a namespace.
type linkNews struct{ *os.File }

// watchLinks begins to watch. The caller closes the result.
func watchLinks(netns *os.File) (news linkNews, err error) {
	err = inside(netns, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)}); err != nil {
			unix.Close(fd)
			return err
		}
		news.File = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	if err != nil {
		return news, fmt.Errorf("watch devices: %w", err)
	}
	return news, nil
}

// wait waits for news, and tells whether there were any before ctx ended. How many, and which, the
// reader of the list will see: a lost message is as good as one that came.
func (n linkNews) wait(ctx context.Context) bool {
	stop := context.AfterFunc(ctx, func() { _ = n.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := n.SyscallConn()
	if err != nil {
		return false
	}
	came := false
	buf := make([]byte, 1<<16)
	err = raw.Read(func(fd uintptr) bool {
		for {
			_, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN):
				return came
			case err == nil, errors.Is(err, unix.ENOBUFS):
				came = true
			default:
				return true
			}
		}
	})
	return came && err == nil
}
