package network

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// The ports of the namespace's own, 512 of them, are those that have all bits of a mask.
const (
	firstHostPort = 0xfe00
	lastHostPort  = 0xffff
	hostPortMask  = 0xfe00
)

const (
	portRange     = "net.ipv4.ip_local_port_range" // in which the kernel chooses ports, of IPv6 as well
	reservedPorts = "net.ipv4.ip_local_reserved_ports"
	portRangeFile = "/proc/sys/net/ipv4/ip_local_port_range"
)

var hostPortRange = fmt.Sprintf("%d %d", firstHostPort, lastHostPort)

// reserve has the namespace's kernel choose among the ports that are its own.
func reserve(ns *Namespace) error { return writePortRange(ns, hostPortRange, "") }

// unreserve restores what was before, unless somebody has set the range meanwhile.
func unreserve(ns *Namespace, before string) error { return writePortRange(ns, before, hostPortRange) }

// writePortRange sets the range, if it is what it is expected to be; empty: whatever it is.
func writePortRange(ns *Namespace, value, expected string) error {
	err := ns.Do(func() error {
		if now := readSysctls([]string{portRange})[portRange]; now == value || expected != "" && now != expected {
			return nil
		}
		return os.WriteFile(portRangeFile, []byte(value), 0)
	})
	if err != nil {
		return fmt.Errorf("set %s to %q: %w", portRange, value, errors.Unwrap(err))
	}
	return nil
}

// reserved has the guest's kernel never choose the namespace's ports.
func reserved(sysctls map[string]string) {
	delete(sysctls, portRange) // what we have made of it is not meant for the guest
	sysctls[reservedPorts] = strings.TrimPrefix(fmt.Sprintf("%s,%d-%d", sysctls[reservedPorts], firstHostPort, lastHostPort), ",")
}
