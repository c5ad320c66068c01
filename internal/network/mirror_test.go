package network_test

import (
	"context"
	"testing"

	"gotest.tools/v3/assert"
)

func TestStartTellsTheGuestWhatThereIs(t *testing.T) {
	ns := newNamespace(t)
	pair(t, ns)
	run(t, ns, `ip route add default via 10.1.0.1 metric 7
		ip -6 route add default via fd00:1::1
		ip neigh add 10.1.0.9 lladdr 02:00:00:00:00:99 dev eth0
		ip neigh add proxy 10.1.0.8 dev eth0
		ip rule add from 10.1.0.2 table 100 priority 50
		ip route add 10.2.0.0/16 dev eth0 table 100
		ip route add blackhole 10.3.0.0/16`)
	before := state(t, ns)
	open := files(t)
	r := start(t, ns, nil)
	t.Log(r.guest.request())
	assert.DeepEqual(t, r.guest.names(), []string{"eth0"})
	assert.NilError(t, r.Close(context.Background()))
	assert.Equal(t, state(t, ns), before)
	assert.Equal(t, files(t), open)
	assert.Assert(t, r.guest.removed)
}
