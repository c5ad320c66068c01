package integration

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"gotest.tools/v3/assert"
)

// TestInterfaceChanges changes what an interface is, while packets must go on to pass.
func TestInterfaceChanges(t *testing.T) {
	n := newNetworked(t, "sh", "-c", "cat /sys/class/net/eth0/operstate >/tmp/first; exec sleep 1000")
	t.Run("up at once", func(t *testing.T) {
		usable := func(state string) bool { return state == "up\n" || state == "unknown\n" } // RFC 2863: not known to be down
		n.awaitOutput("cat /tmp/first", usable)
		n.pod.Veth("eth1", []string{"10.10.0.2/24"}, n.world, "world1", []string{"10.10.0.1/24"})
		n.awaitOutput("ip addr show eth1", has("10.10.0.2"))
		assert.Assert(t, usable(n.sh("cat /sys/class/net/eth1/operstate")))
		assert.NilError(t, n.pod.LinkDel(n.pod.Link("eth1")))
	})
	t.Run("MTU", func(t *testing.T) {
		for _, mtu := range []int{9000, 65535, 1280, 68, 1500} {
			assert.NilError(t, n.world.LinkSetMTU(n.world.Link("world0"), mtu))
			assert.NilError(t, n.pod.LinkSetMTU(n.pod.Link("eth0"), mtu))
			n.awaitOutput("ip link show eth0", has(fmt.Sprintf("mtu %d ", mtu)))
			// The largest that nobody has to cut, and one that must be.
			for _, size := range []int{min(mtu, 65000) - 28, min(2*mtu, 65000)} {
				n.sh(fmt.Sprintf("ping -c 1 -W 10 -s %d 10.9.0.1", size))
			}
		}
	})
	t.Run("MAC", func(t *testing.T) {
		mac := net.HardwareAddr{2, 0, 0, 0, 1, 0x99}
		assert.NilError(t, n.pod.LinkSetHardwareAddr(n.pod.Link("eth0"), mac))
		n.awaitOutput("ip link show eth0", has(mac.String()))
		n.awaitOutput("ping -c 1 -W 1 10.9.0.1", has(" 0% packet loss"))
	})
	t.Run("neighbours and rules", func(t *testing.T) {
		neighbour := &netlink.Neigh{
			LinkIndex: n.pod.Link("eth0").Attrs().Index, IP: net.IPv4(10, 9, 0, 77), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 0x77}, State: netlink.NUD_PERMANENT,
		}
		assert.NilError(t, n.pod.NeighAdd(neighbour))
		rule := netlink.NewRule()
		rule.Priority, rule.Table, rule.Dst = 9, 77, &net.IPNet{IP: net.IPv4(10, 60, 0, 0), Mask: net.CIDRMask(16, 32)}
		assert.NilError(t, n.pod.RuleAdd(rule))
		n.awaitOutput("ip neigh; ip rule", func(out string) bool {
			return strings.Contains(out, "10.9.0.77 dev eth0 lladdr 02:00:00:00:00:77") && strings.Contains(out, "to 10.60.0.0/16 lookup 77")
		})
		assert.NilError(t, n.pod.NeighDel(neighbour))
		assert.NilError(t, n.pod.RuleDel(rule))
		n.awaitOutput("ip neigh; ip rule", func(out string) bool {
			return !strings.Contains(out, "10.9.0.77") && !strings.Contains(out, "10.60.0.0")
		})
	})
	n.OK("delete", "--force", "web")
	assert.DeepEqual(t, n.pod.Traces(), []string(nil))
}
