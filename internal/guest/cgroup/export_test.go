package cgroup

import specs "github.com/opencontainers/runtime-spec/specs-go"

// CPUWeight translates shares.
var CPUWeight = cpuWeight

// IOWeight translates a weight of block I/O.
var IOWeight = ioWeight

// Settings returns what r writes, in order, as "file value".
func Settings(r *Resources) []string {
	settings := []string{}
	for _, s := range r.settings {
		settings = append(settings, s.file+" "+s.value)
		if s.better != nil {
			settings = append(settings, "or "+s.better.file+" "+s.better.value)
		}
	}
	return settings
}

// Next translates an update that comes after others.
func Next(before *Resources, spec *specs.LinuxResources) (*Resources, error) {
	return translate(spec, before.amounts)
}

// Before is what takes a setting back when the file was old.
func Before(file, value, old string) string {
	return setting{file: file, value: value}.before(old, nil)
}

// Within tells whether a list is a part of another.
func Within(a, b string) (within, ok bool) {
	la, ok := parseList(a)
	lb, okB := parseList(b)
	return ok && okB && la.within(lb), ok && okB
}

// DeviceProgram compiles a specification's rules.
func DeviceProgram(list []specs.LinuxDeviceCgroup) ([]byte, error) {
	rules, err := deviceRules(list)
	if err != nil {
		return nil, err
	}
	return deviceProgram(rules), nil
}
