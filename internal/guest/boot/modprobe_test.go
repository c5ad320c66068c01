package boot_test

import (
	"errors"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/guest/boot"
)

const demandList = `module virtio /m/virtio.ko
packed x_tables 0 10
packed nf_nat 10 20 x_tables virtio
packed xt_nat 30 5 x_tables nf_nat
alias ipt_SNAT xt_nat
alias ip6t-SNAT xt_nat
packed inet_diag 35 9
packed tcp_diag 44 9 inet_diag
packed udp_diag 53 9 inet_diag
alias net-pf-16-proto-4-type-2 tcp_diag
alias net-pf-16-proto-4-type-2 udp_diag
packed broken 62 9 gone
packed loop 71 9
alias block-major-7-* loop
alias char-major-10-237 loop
`

func TestDemand(t *testing.T) {
	for name, want := range map[string]string{
		"xt_nat":                   "x_tables virtio nf_nat xt_nat",
		"xt-nat":                   "x_tables virtio nf_nat xt_nat",
		"ipt_SNAT":                 "x_tables virtio nf_nat xt_nat",
		"ip6t_SNAT":                "x_tables virtio nf_nat xt_nat",
		"virtio":                   "virtio",
		"net-pf-16-proto-4-type-2": "inet_diag tcp_diag udp_diag",
		"block-major-7-3":          "loop",
		"char-major-10-237":        "loop",
	} {
		loaded, err := boot.LoadDemand(demandList, name, "")
		assert.NilError(t, err)
		assert.Equal(t, strings.Join(loaded, " "), want, name)
	}
	for _, name := range []string{"unknown", "", "broken", "block-major-8-3", "char-major-10-23"} {
		_, err := boot.LoadDemand(demandList, name, "")
		assert.ErrorContains(t, err, "there is none", name)
	}
	loaded, err := boot.LoadDemand(demandList, "xt_nat", "nf_nat")
	assert.ErrorIs(t, err, boot.ErrLoad)
	assert.DeepEqual(t, loaded, []string{"x_tables", "virtio"})

	// One of those that can do the same may be for another processor.
	loaded, err = boot.LoadDemand(demandList, "net-pf-16-proto-4-type-2", "tcp_diag")
	assert.NilError(t, err)
	assert.DeepEqual(t, loaded, []string{"inet_diag", "udp_diag"})
}

func FuzzDemand(f *testing.F) {
	f.Add(demandList, "xt_nat")
	f.Add("packed a 1 2 a\nmodule b /b a\nalias a b", "a")
	f.Add("packed a -1 x", "a")
	f.Fuzz(func(t *testing.T, list, name string) {
		loaded, err := boot.LoadDemand(list, name, "")
		assert.Assert(t, err != nil || len(loaded) > 0)
		assert.Assert(t, !errors.Is(err, boot.ErrLoad))
	})
}
