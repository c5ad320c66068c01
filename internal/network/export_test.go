package network

import (
	"errors"
	"fmt"
	"net"
	"os"

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

// Overflow listens, but does not hear, while more is said than the kernel keeps. It returns what it hears of
// that, and its end.
func Overflow(ns *Namespace, talk func()) (heard <-chan struct{}, end func() error, err error) {
	e, err := openEvents(ns)
	if err != nil {
		return nil, nil, err
	}
	raw, err := e.file.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) {
		callErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // as little as there can be
	})
	if err := errors.Join(err, callErr); err != nil {
		return nil, nil, err
	}
	talk()
	go e.read()
	return e.C, func() error {
		select {
		case <-e.failed:
			return e.err
		default:
		}
		e.close()
		return nil
	}, nil
}

// Deafen breaks the connection that tells of changes.
func (m *Mirror) Deafen() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	return m.events.file.Close()
}

// CloseSockets does of what the end of a process does what Clean does not.
func (m *Mirror) CloseSockets() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	return m.members.Close()
}

// File is the namespace's.
func (n *Namespace) File() *os.File { return n.file }
