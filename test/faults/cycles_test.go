package faults

import (
	"flag"
	"fmt"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// cycles is how many containers TestCycles creates, starts and deletes.
var cycles = flag.Int("cycles", 22, "containers that TestCycles makes")

// podsOf is how many of them are a pod each; the others come and go in one that stays.
const podsOf = 11

const (
	shareDaemon = "VM 2"
	filesOfFew  = 40 // of four containers: some may have been held before
)

// TestCycles makes many containers with networks, one after the other, and counts what is there before and
// after. `make soak` makes 200.
func TestCycles(t *testing.T) {
	e := harness.New(t)
	world := harness.NewNetNS(t)
	bundle := e.Bundle([]string{"ping", "-c", "1", "-W", "5", "10.9.0.1"}, harness.MayPing)
	pause := e.Bundle([]string{"sleep", "100000"})
	in := func(bundle string, ns *harness.NetNS) {
		e.EditSpec(bundle, func(s *specs.Spec) {
			for i := range s.Linux.Namespaces {
				if s.Linux.Namespaces[i].Type == specs.NetworkNamespace {
					s.Linux.Namespaces[i].Path = ns.Path
				}
			}
		})
	}
	var namespaces []*harness.NetNS
	for i := range 2 {
		ns := harness.NewNetNS(t)
		ns.Veth("eth0", []string{fmt.Sprintf("10.9.0.%d/24", 10+i)}, world, fmt.Sprintf("world%d", i), nil)
		namespaces = append(namespaces, ns)
	}
	bridge(t, world, "world0", "world1")
	in(pause, namespaces[0])
	e.OK("run", "--detach", "--bundle", pause, "pause")
	cycle := func(i int) {
		ns := namespaces[0]
		if i%podsOf == 0 {
			ns = namespaces[1]
		}
		in(bundle, ns)
		id := fmt.Sprint("c", i)
		e.OK("create", "--bundle", bundle, id)
		e.OK("start", id)
		e.AwaitStatus(id, specs.StateStopped)
		assert.Equal(t, e.State(id).Annotations["dev.runv.exit-status"], "0")
		e.OK("delete", id)
	}
	cycle(0)
	cycle(1)
	before, links := e.Census(), linkCount(t, world, namespaces[0], namespaces[1])
	held := holding(t, e)
	for i := range *cycles {
		cycle(i)
	}
	after := before
	defer func() { t.Logf("before: %+v, after: %+v", before, after) }()
	harness.Eventually(t, "all is as before", func() bool { after = e.Census(); return after == before })
	assert.DeepEqual(t, linkCount(t, world, namespaces[0], namespaces[1]), links)
	// The guest lets go of a container's files some seconds after its end.
	now := held
	harness.Eventually(t, "the guest has let go of the containers' files", func() bool {
		now = holding(t, e)
		return now[shareDaemon] <= held[shareDaemon]+filesOfFew
	})
	delete(now, shareDaemon)
	delete(held, shareDaemon)
	assert.DeepEqual(t, now, held)
	assert.Equal(t, len(namespaces[1].Traces()), 0)
	e.OK("delete", "--force", "pause")
	assert.Equal(t, len(namespaces[0].Traces()), 0)
}

// holding counts the descriptors of the pod's processes that stay: the supervisor, QEMU, the share server.
func holding(t *testing.T, e *harness.Env) map[string]int {
	t.Helper()
	pod := e.Pod("pause")
	pids := map[string]int{"supervisor": pod.Supervisor.PID}
	for i, p := range pod.VM {
		pids[fmt.Sprint("VM ", i)] = p.PID
	}
	counts := make(map[string]int)
	for name, pid := range pids {
		counts[name] = harness.OpenFiles(t, pid)
	}
	return counts
}

// bridge joins interfaces of the world by a bridge, at which the world is 10.9.0.1.
func bridge(t *testing.T, world *harness.NetNS, ports ...string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "bridge0"
	b := &netlink.Bridge{LinkAttrs: attrs}
	assert.NilError(t, world.LinkAdd(b))
	for _, port := range ports {
		assert.NilError(t, world.LinkSetMaster(world.Link(port), b))
	}
	world.AddAddr("bridge0", "10.9.0.1/24")
	assert.NilError(t, world.LinkSetUp(b))
}

// linkCount counts the interfaces of namespaces.
func linkCount(t *testing.T, all ...*harness.NetNS) (counts []int) {
	t.Helper()
	for _, ns := range all {
		links, err := ns.LinkList()
		assert.NilError(t, err)
		counts = append(counts, len(links))
	}
	return counts
}
