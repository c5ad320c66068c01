package boot

import (
	"errors"
	"strings"
)

// ScanPorts looks for a port once.
var ScanPorts = scanPorts

// CountList counts the members of a list.
var CountList = countList

// NewHotplugIn looks for devices in a directory.
var NewHotplugIn = newHotplug

// ErrLoad is what loading a module fails with in tests.
var ErrLoad = errors.New("refused")

// LoadDemand loads a module as a list tells, in memory, and returns which were loaded. The one named fails cannot be.
func LoadDemand(list, name, fails string) (loaded []string, err error) {
	d, err := readDemand(strings.NewReader(list))
	if err != nil {
		return nil, err
	}
	err = d.load(name, func(m demandModule) error {
		if m.name == fails {
			return ErrLoad
		}
		loaded = append(loaded, m.name)
		return nil
	})
	return loaded, err
}

// SetParametersIn and SetLaterParametersIn are for files in other places.
var (
	SetParametersIn      = setParameters
	SetLaterParametersIn = setLaterParameters
)

// Parameters is the table.
var Parameters = parameters

// Check tells why a value is not believed.
func (p parameter) Check(value string) error { return p.check(value) }

// Merge is what a parameter becomes.
func (p parameter) Merge(own, host string) (string, error) { return p.merge(own, host) }
