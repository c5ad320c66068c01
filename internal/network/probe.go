package network

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// Probe tries whether this machine's kernel can mirror networks: it connects an interface of a namespace that it
// makes for that. It needs CAP_SYS_ADMIN and CAP_NET_ADMIN, and leaves nothing.
func Probe() error {
	var ns *Namespace
	err := mountns.OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		ns, err = Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return err
	}
	return errors.Join(probe(ns), ns.Close())
}

func probe(ns *Namespace) error {
	k, err := dial(ns)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer k.close()
	const name = "probe"
	return ns.Do(func() error {
		files, err := openTap(name, 1)
		if err != nil {
			return fmt.Errorf("make tap: %w", err)
		}
		defer closeAll(files)
		link, err := k.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find tap: %w", err)
		}
		p := &port{index: link.Attrs().Index, name: name, mac: newMAC()}
		if err := p.open(ns, k, link.Attrs().MTU, 1, fromInterface(false)); err != nil {
			return err
		}
		return errors.Join(p.disconnect(k), p.close(k))
	})
}
