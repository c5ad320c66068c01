package bundle_test

import (
	"fmt"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/bundle"
)

// What Parse accepts can be translated for the guest, and that is a valid
// configuration in turn, whose translation changes nothing any more.
func FuzzParse(f *testing.F) {
	f.Add(encode(f, bundle.DefaultSpec()))
	f.Add(with(f, "mounts[7]", `{"destination":"x","type":"none","source":"a","options":["rbind","ro"]}`))
	f.Add(with(f, "linux.resources", `{"cpu":{"quota":1},"memory":{"limit":1},"unified":{}}`))
	f.Add(with(f, "linux.resources", `{"blockIO":{"weight":10,"weightDevice":[{"major":8,"minor":0,"leafWeight":1}]},"network":{"classID":1}}`))
	f.Add(with(f, "process.capabilities", `{"bounding":["CAP_FLY","<\u2028>"]}`))
	f.Add([]byte(`{"ociVersion":"1.0.0"`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := bundle.Parse(data, "/bundle")
		if err != nil {
			return
		}
		b.Size()
		translate := func(b *bundle.Bundle) []byte {
			sources := map[int]string{}
			for _, bind := range b.Binds() {
				sources[bind.Index] = fmt.Sprint("/guest/", bind.Index)
			}
			namespaces := map[specs.LinuxNamespaceType]string{}
			for _, ns := range b.Spec.Linux.Namespaces {
				namespaces[ns.Type] = ns.Path
			}
			out, err := b.GuestSpec("/guest/rootfs", sources, namespaces)
			assert.NilError(t, err)
			return out
		}
		first := translate(b)
		again, err := bundle.Parse(first, "/")
		assert.NilError(t, err)
		assert.Equal(t, string(translate(again)), string(first))
	})
}

func FuzzParseProcess(f *testing.F) {
	f.Add([]byte(`{"args":["true"],"cwd":"/","env":["A=b"],"user":{"uid":1,"gid":1},"rlimits":[{"type":"RLIMIT_CPU"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := bundle.ParseProcess(data)
		if err != nil {
			return
		}
		out, err := bundle.GuestProcess(p)
		if err != nil {
			return
		}
		_, err = bundle.ParseProcess(out)
		assert.NilError(t, err)
	})
}

// What ParseResources accepts, it accepts again when it is written down, and asks for as large a VM.
func FuzzParseResources(f *testing.F) {
	f.Add([]byte(`{"cpu":{"quota":200000,"period":100000,"cpus":"0-1,4","burst":1},"memory":{"limit":-1,"swap":5},"pids":{"limit":0}}`))
	f.Add([]byte(`{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]},"hugepageLimits":[{"pageSize":"2MB","limit":1}]}`))
	f.Add([]byte(`{"unified":{"io.max":"8:0 rbps=1\n8:1 wbps=1"},"rdma":{"mlx":{"hcaObjects":1}},"devices":[{"allow":true}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, _, err := bundle.ParseResources(data)
		if err != nil {
			return
		}
		again, _, err := bundle.ParseResources(encode(t, r))
		assert.NilError(t, err)
		assert.Equal(t, bundle.SizeOf(again), bundle.SizeOf(r))
	})
}
