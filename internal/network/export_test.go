package network

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// Scan is what a guest should be told that has devices with these addresses, by the names of their
// interfaces.
func Scan(ns *Namespace, id string, devices map[string][]byte) (*agentv1.ApplyNetworkRequest, error) {
	m := New(Config{ID: id, Namespace: ns})
	var err error
	if m.kernel, err = dial(ns); err != nil {
		return nil, err
	}
	defer m.kernel.close()
	if m.sysctls, err = newSysctls(); err != nil {
		return nil, err
	}
	s, err := m.scan()
	if err != nil {
		return nil, err
	}
	byIndex := make(map[int]net.HardwareAddr)
	for _, l := range s.links {
		if ok, _ := s.carries(l); ok {
			byIndex[l.Attrs().Index] = devices[l.Attrs().Name]
		}
	}
	r, _ := s.request(id, byIndex)
	return r, nil
}

// Check tells whether all packets go where they should.
func (m *Mirror) Check() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	for _, p := range m.ports {
		for _, c := range []struct {
			on, to int
			want   []filter
		}{{p.index, p.tap, fromInterface(m.hostPorts)}, {p.tap, p.index, fromTap()}} {
			have, err := m.kernel.ourFilters(c.on)
			if err != nil {
				return err
			}
			if !matches(have, c.to, c.want) {
				return fmt.Errorf("%s: filters %v", p.name, have)
			}
		}
	}
	return nil
}

// Starve has the kernel lose most of its messages.
func (m *Mirror) Starve() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	raw, err := m.events.file.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) {
		callErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // as little as there can be
	})
	return errors.Join(err, callErr)
}

// Deafen breaks the connection that tells of changes.
func (m *Mirror) Deafen() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	return m.events.file.Close()
}
