package pod

import (
	"encoding/json"
	"math"
	"runtime"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
)

func parsed(t *testing.T, list []string) (all []*specs.LinuxResources) {
	t.Helper()
	for _, text := range list {
		var r *specs.LinuxResources
		assert.NilError(t, json.Unmarshal([]byte(text), &r))
		all = append(all, r)
	}
	return all
}

func TestSumOfLimits(t *testing.T) {
	for _, c := range []struct {
		name string
		of   []string
		want string
	}{
		{"one", []string{`{"memory":{"limit":5},"cpu":{"quota":7,"period":1000},"pids":{"limit":3}}`}, `{"memory":{"limit":5},"cpu":{"quota":7,"period":1000},"pids":{"limit":3}}`},
		{"one without", []string{`null`}, `null`},
		{"none of two", []string{`null`, `{}`}, `{"memory":{},"cpu":{"shares":2048}}`},
		{
			"two",
			[]string{`{"memory":{"limit":5,"swap":9,"reservation":1},"cpu":{"quota":1000,"period":2000,"shares":2},"pids":{"limit":3}}`, `{"memory":{"limit":6,"swap":6,"reservation":2},"cpu":{"quota":50000},"pids":{"limit":4}}`},
			`{"memory":{"limit":11,"reservation":3,"swap":15},"cpu":{"shares":1026,"quota":100000,"period":100000},"pids":{"limit":7}}`,
		},
		{
			"one of two",
			[]string{`{"memory":{"limit":5},"cpu":{"quota":1000},"pids":{"limit":3}}`, `{"memory":{"limit":-1}}`},
			`{"memory":{"limit":-1},"cpu":{"shares":2048,"quota":-1},"pids":{"limit":-1}}`,
		},
		{
			"more than there is",
			[]string{`{"memory":{"limit":9223372036854775807},"cpu":{"shares":18446744073709551615}}`, `{"memory":{"limit":9223372036854775807}}`},
			`{"memory":{"limit":9223372036854775807},"cpu":{"shares":262144}}`,
		},
	} {
		got, err := json.Marshal(sum(parsed(t, c.of)))
		assert.NilError(t, err)
		assert.Equal(t, string(got), c.want, c.name)
	}
}

func TestSizeForLimits(t *testing.T) {
	const mib = 1 << 20
	p := &Pod{cfg: Config{DefaultVCPUs: 1, DefaultMemory: 512 * mib}}
	cpus := runtime.NumCPU()
	for _, c := range []struct {
		name string
		of   []string
		want size
	}{
		{"default", []string{`null`}, size{1, 512 * mib}},
		{"defaults", []string{`null`, `{}`, `{"memory":{"limit":-1},"cpu":{"quota":-1}}`}, size{1, 512 * mib}},
		{"memory", []string{`{"memory":{"limit":104857600}}`}, size{1, 232 * mib}},
		{"memories", []string{`{"memory":{"limit":104857600}}`, `{"memory":{"limit":104857600}}`}, size{1, 335 * mib}},
		{"memory and default", []string{`{"memory":{"limit":104857600}}`, `null`, `null`}, size{1, 616 * mib}},
		{"halves of a CPU", []string{`{"cpu":{"quota":50000}}`, `{"cpu":{"quota":5000,"period":10000}}`}, size{1, 512 * mib}},
		{"tenths of a CPU", []string{`{"cpu":{"quota":10000}}`, `{"cpu":{"quota":10000}}`, `{"cpu":{"quota":10000}}`}, size{1, 512 * mib}},
		{"many CPUs of one", []string{`{"cpu":{"quota":10000000}}`}, size{100, 512 * mib}},
		{"many CPUs of all", []string{`{"cpu":{"quota":10000000}}`, `{"cpu":{"quota":10000000}}`}, size{max(100, cpus), 512 * mib}},
		{"as many as the host's", []string{`{"cpu":{"quota":100000}}`, `{"cpu":{"quota":100000}}`, `{"cpu":{"cpus":"0-8191"}}`}, size{cpus, 512 * mib}},
		{"all there is", []string{`{"cpu":{"quota":9223372036854775807,"period":1}}`}, size{math.MaxInt32, 512 * mib}},
	} {
		assert.Equal(t, p.sizeFor(parsed(t, c.of)), c.want, c.name)
	}
	assert.Equal(t, size{1, 512 * mib}.withCPUs(0), size{1, 512 * mib})
	assert.Equal(t, size{1, 512 * mib}.withCPUs(cpus), size{cpus, 512 * mib})
	assert.Equal(t, size{1, 512 * mib}.withCPUs(cpus+9), size{cpus, 512 * mib})
	all := p.sizeFor(parsed(t, []string{`{"memory":{"limit":9223372036854775807}}`, `{"memory":{"limit":9223372036854775807}}`}))
	assert.Equal(t, all.memory, sizeForLimit(math.MaxInt64))
}
