package cgroup_test

import (
	"encoding/json"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/guest/cgroup"
)

// Whatever resources say, they are settings of files in the group's own directory, and not of
// those by which the agent controls it.
func FuzzTranslate(f *testing.F) {
	f.Add([]byte(`{"memory":{"limit":100,"swap":150},"cpu":{"shares":3,"quota":5,"burst":1},"pids":{"limit":1}}`))
	f.Add([]byte(`{"unified":{"memory.high":"1\n2\n","cgroup.max.depth":"1","../x.y":"1"},"blockIO":{"weight":1}}`))
	f.Add([]byte(`{"hugepageLimits":[{"pageSize":"2MB","limit":1}],"rdma":{"a":{"hcaHandles":1}}}`))
	f.Add([]byte(`{"hugepageLimits":[{"pageSize":"/../x","limit":1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec specs.LinuxResources
		if json.Unmarshal(data, &spec) != nil {
			return
		}
		r, err := cgroup.Translate(&spec)
		if err != nil {
			return
		}
		for _, s := range cgroup.Settings(r) {
			file, _, ok := strings.Cut(strings.TrimPrefix(s, "or "), " ")
			assert.Assert(t, ok && file != "" && !strings.Contains(file, "/"), "%q", s)
			assert.Assert(t, !strings.HasPrefix(file, "cgroup.") || strings.HasPrefix(file, "cgroup.max."), "%q", s)
		}
	})
}
