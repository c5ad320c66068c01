package cgroup

import specs "github.com/opencontainers/runtime-spec/specs-go"

// Weight translates shares.
var Weight = weight

// Files returns the files that r sets.
func Files(r *Resources) map[string]string {
	files := make(map[string]string)
	for _, s := range r.files {
		files[s.file] = s.value
	}
	return files
}

// DeviceProgram compiles a specification's rules.
func DeviceProgram(list []specs.LinuxDeviceCgroup) ([]byte, error) {
	rules, err := deviceRules(list)
	if err != nil {
		return nil, err
	}
	return deviceProgram(rules), nil
}
