package network

import (
	"net"
	"os"

	"github.com/vishvananda/netlink"
)

// NewSetAt is NewSet for devices that appear in the given namespace. As those that tests can make have no
// permanent addresses, their aliases are taken for them.
func NewSetAt(cfg Config, home *os.File) *Set {
	return &Set{Config: cfg, home: home, byID: make(map[string]*network), ports: make(map[[4]byte]uint16), identify: func(l netlink.Link) net.HardwareAddr {
		mac, _ := net.ParseMAC(l.Attrs().Alias)
		return mac
	}}
}

var (
	Validate   = validate
	SysctlPath = sysctlPath
	Inside     = inside
	NewNetNS   = newNamespace
)
