package faults

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// inNetNS makes a container, which may send pings, live in a network namespace.
func inNetNS(ns *harness.NetNS) func(*specs.Spec) {
	return func(s *specs.Spec) {
		harness.MayPing(s)
		for i := range s.Linux.Namespaces {
			if s.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				s.Linux.Namespaces[i].Path = ns.Path
			}
		}
	}
}

// TestSupervisorKilledWhileItCreates kills the supervisor at many moments of a creation with a network: whatever
// was made by then is gone after delete --force.
func TestSupervisorKilledWhileItCreates(t *testing.T) {
	e := harness.New(t)
	pod, world := harness.NewNetNS(t), harness.NewNetNS(t)
	pod.Veth("eth0", []string{"10.9.0.2/24"}, world, "world0", []string{"10.9.0.1/24"})
	bundle := e.Bundle([]string{"sleep", "1000"}, inNetNS(pod))

	began := time.Now()
	e.OK("create", "--bundle", bundle, "web")
	whole := time.Since(began)
	e.OK("delete", "--force", "web")
	const moments = 12
	for i := range moments {
		create := e.Command("create", "--bundle", bundle, "web")
		done := make(chan harness.Result, 1)
		go func() { done <- harness.Finish(create) }()
		supervisor := 0
		harness.Eventually(t, "there is a supervisor", func() bool {
			supervisor = e.Supervisor("web")
			return supervisor != 0
		})
		select {
		case <-time.After(whole * time.Duration(i) / moments):
			_ = syscall.Kill(supervisor, syscall.SIGKILL)
		case r := <-done:
			done <- r
		}
		var r harness.Result
		select {
		case r = <-done:
		case <-time.After(patience):
			t.Fatal("create does not end")
		}
		if r.Code != 0 {
			assert.Assert(t, cmp.Contains(r.Stderr, "create web: "))
			assert.Assert(t, strings.Contains(r.Stderr, "supervisor"), r.Stderr)
		}
		e.OK("delete", "--force", "web")
		assert.DeepEqual(t, pod.Traces(), []string(nil))
		e.CheckNothingLeft()
	}
}

// TestInterfaceVanishes takes the interfaces away from a container that is being created, and one that runs.
func TestInterfaceVanishes(t *testing.T) {
	e := harness.New(t)
	pod, world := harness.NewNetNS(t), harness.NewNetNS(t)
	names := []string{"eth0", "eth1", "eth2"}
	for i, name := range names {
		pod.Veth(name, []string{fmt.Sprintf("10.9.%d.2/24", i)}, world, "world"+name, []string{fmt.Sprintf("10.9.%d.1/24", i)})
	}
	bundle := e.Bundle([]string{"sleep", "1000"}, inNetNS(pod))
	create := e.Command("create", "--bundle", bundle, "web")
	done := make(chan harness.Result, 1)
	go func() { done <- harness.Finish(create) }()
	harness.Eventually(t, "the first interface is being mirrored", func() bool { return len(pod.Traces()) > 0 })
	assert.NilError(t, pod.LinkDel(pod.Link("eth1")))
	r := <-done
	assert.Equal(t, r.Code, 0, r.Stderr)
	e.OK("start", "web")
	links := func() string { return e.OK("exec", "web", "ls", "/sys/class/net") }
	harness.Eventually(t, "the guest has the others", func() bool { return links() == "eth0\neth2\nlo\n" })
	e.OK("exec", "web", "ping", "-c", "1", "-W", "5", "10.9.2.1")

	// All of them, with the namespace that holds the other ends.
	for _, name := range []string{"eth0", "eth2"} {
		assert.NilError(t, world.LinkDel(world.Link("world"+name)))
	}
	harness.Eventually(t, "the guest has none", func() bool { return links() == "lo\n" })
	e.OK("delete", "--force", "web")
	assert.DeepEqual(t, pod.Traces(), []string(nil))
}

// TestManyInterfaces gives a container fifty of them.
func TestManyInterfaces(t *testing.T) {
	e := harness.New(t)
	pod, world := harness.NewNetNS(t), harness.NewNetNS(t)
	const count = 50
	for i := range count {
		pod.Veth(fmt.Sprintf("eth%d", i), []string{fmt.Sprintf("10.9.%d.2/24", i)}, world, fmt.Sprintf("world%d", i), []string{fmt.Sprintf("10.9.%d.1/24", i)})
	}
	e.OK("run", "--detach", "--bundle", e.Bundle([]string{"sleep", "1000"}, inNetNS(pod)), "web")
	assert.Equal(t, strings.Count(e.OK("exec", "web", "ip", "addr"), "inet 10.9."), count)
	for _, i := range []int{0, count / 2, count - 1} {
		e.OK("exec", "web", "ping", "-c", "1", "-W", "5", fmt.Sprintf("10.9.%d.1", i))
	}
	e.OK("delete", "--force", "web")
	assert.DeepEqual(t, pod.Traces(), []string(nil))
}

// TestOddNetworks gives a container what no sane network has: the smallest and the largest packets, the same address
// and the same MAC twice, a route to nowhere, no IPv6.
func TestOddNetworks(t *testing.T) {
	e := harness.New(t)
	pod, world := harness.NewNetNS(t), harness.NewNetNS(t)
	for i, mtu := range []int{68, 65535, 1500, 1500} {
		name, far := fmt.Sprintf("eth%d", i), fmt.Sprintf("world%d", i)
		pod.Veth(name, nil, world, far, nil)
		assert.NilError(t, pod.LinkSetMTU(pod.Link(name), mtu))
		assert.NilError(t, world.LinkSetMTU(world.Link(far), mtu))
	}
	pod.AddAddr("eth0", "10.9.0.2/24")
	world.AddAddr("world0", "10.9.0.1/24")
	pod.AddAddr("eth1", "10.9.1.2/24")
	world.AddAddr("world1", "10.9.1.1/24")
	for _, name := range []string{"eth2", "eth3"} { // twins
		pod.AddAddr(name, "10.9.2.2/24")
		assert.NilError(t, pod.LinkSetHardwareAddr(pod.Link(name), []byte{2, 0, 0, 0, 0, 7}))
	}
	route := pod.AddRoute("10.99.0.0/16", "10.9.1.77") // nobody is there
	assert.Assert(t, route != nil)
	assert.NilError(t, pod.RouteAdd(&netlink.Route{Dst: route.Dst, Type: 6, Priority: 7})) // RTN_BLACKHOLE
	assert.NilError(t, pod.Do(func() error { return writeSysctl("net/ipv6/conf/all/disable_ipv6", "1") }))

	e.OK("run", "--detach", "--bundle", e.Bundle([]string{"sleep", "1000"}, inNetNS(pod)), "web")
	sh := func(script string) string { return e.OK("exec", "web", "sh", "-c", script) }
	for name, mtu := range map[string]string{"eth0": "68", "eth1": "65535", "eth2": "1500", "eth3": "1500"} {
		assert.Equal(t, sh("cat /sys/class/net/"+name+"/mtu"), mtu+"\n", name)
	}
	sh("ping -c 1 -W 5 -s 40 10.9.0.1")
	sh("ping -c 1 -W 5 -s 60000 10.9.1.1")
	assert.Equal(t, sh("cat /sys/class/net/eth2/address /sys/class/net/eth3/address"), "02:00:00:00:00:07\n02:00:00:00:00:07\n")
	assert.Equal(t, strings.Count(sh("ip addr"), "inet 10.9.2.2/24"), 2)
	routes := sh("ip route")
	assert.Assert(t, cmp.Contains(routes, "10.99.0.0/16 via 10.9.1.77 dev eth1"))
	assert.Assert(t, !strings.Contains(sh("ip addr"), "inet6"), sh("ip addr"))
	e.OK("delete", "--force", "web")
	assert.DeepEqual(t, pod.Traces(), []string(nil))
}

// writeSysctl sets a parameter of the calling thread's network namespace.
func writeSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
}
