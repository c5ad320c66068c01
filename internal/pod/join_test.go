package pod_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	agentv1 "runv/api/agent/v1"
	"runv/internal/pod"
	"runv/internal/state"
)

// ofStandIn is the path of a namespace of a stand-in, which this process is for all containers.
func ofStandIn(file string) string { return fmt.Sprintf("/proc/%d/ns/%s", os.Getpid(), file) }

// sharing makes the containers to come share a namespace with the first.
func (w *world) sharing(kind specs.LinuxNamespaceType, path string) {
	w.t.Helper()
	w.edit(func(s *specs.Spec) {
		i := slices.IndexFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
		s.Linux.Namespaces[i].Path = path
	})
}

func TestJoinTellsTheGuest(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	w.sharing(specs.IPCNamespace, ofStandIn("ipc"))
	w.sharing(specs.PIDNamespace, ofStandIn("pid"))
	_, err = w.create("b", 2)
	assert.NilError(t, err)
	assert.Equal(t, len(w.driver.VMs()), 1)
	w.agent.mu.Lock()
	paths := map[specs.LinuxNamespaceType]string{}
	for _, ns := range w.agent.created["b"].Linux.Namespaces {
		paths[ns.Type] = ns.Path
	}
	w.agent.mu.Unlock()
	assert.DeepEqual(t, paths, map[specs.LinuxNamespaceType]string{
		"ipc": "container:a", "pid": "container:a", "network": "network:net1", "uts": "", "mount": "", "cgroup": "",
	})

	// What is not there any more cannot be joined; the others live on.
	assert.NilError(t, w.pod.Start(t.Context(), "a"))
	w.agent.exit("a", "", "", 0)
	_, _, err = w.pod.Wait(t.Context(), "a", "")
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Delete(t.Context(), "a", false, nil))
	assert.Equal(t, w.status("b"), state.Created)
	_, err = w.create("c", 3)
	assert.NilError(t, err, "b has the pid now")
	w.sharing(specs.IPCNamespace, "/proc/1/ns/ipc")
	_, err = w.create("d", 4)
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	assert.Error(t, err, "create d: linux.namespaces[2].path: /proc/1/ns/ipc is not a namespace of a container of runv")
	assert.Equal(t, w.status("b"), state.Created)
}

// A container that is being made has no namespaces yet.
func TestJoinBeforeCreated(t *testing.T) {
	w := newWorld(t)
	reached, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.agent.create = func() error {
		once.Do(func() { close(reached); <-goOn })
		return nil
	}
	w.reserve("a")
	first := w.standIn(1)
	done := make(chan error)
	go func() {
		_, err := w.pod.Create(t.Context(), pod.CreateRequest{ID: "a", Bundle: w.bundle, StandIn: first.token})
		done <- err
	}()
	<-reached
	w.edit(func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "a"}
	})
	w.sharing(specs.IPCNamespace, ofStandIn("ipc"))
	_, err := w.create("b", 2)
	assert.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	assert.Error(t, err, "create b: cannot share namespaces with container a: it is being created")
	close(goOn)
	assert.NilError(t, <-done)
	assert.Equal(t, w.status("a"), state.Created)
	assert.Equal(t, w.status("b"), state.Status(""))
}

// A create that comes when the last container goes gets one of the exact answers, and nothing stays.
func TestCreateWhileThePodStops(t *testing.T) {
	for range 20 {
		w := newWorld(t)
		_, err := w.create("a", 1)
		assert.NilError(t, err)
		assert.NilError(t, w.pod.Start(t.Context(), "a"))
		w.reserve("b")
		second := w.standIn(2)
		done := make(chan error)
		go func() {
			_, err := w.pod.Create(t.Context(), pod.CreateRequest{ID: "b", Bundle: w.bundle, StandIn: second.token})
			done <- err
		}()
		time.AfterFunc(time.Duration(rand.IntN(3000))*time.Microsecond, func() { w.agent.exit("a", "", "", 0) })
		err = <-done
		switch {
		case err == nil:
			assert.Equal(t, w.status("b"), state.Created)
			assert.NilError(t, w.pod.Delete(t.Context(), "b", true, nil))
		case errors.Is(err, pod.ErrEnded): // it was not admitted: whoever reserved it takes it back
			assert.Error(t, err, "create b: pod has ended")
		default:
			assert.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
			assert.ErrorContains(t, err, "create b: pod is stop")
		}
		select {
		case err := <-w.ran:
			assert.NilError(t, err)
			w.ran <- nil
		case <-time.After(20 * time.Second):
			t.Fatal("the pod does not end")
		}
		all, err := w.store.Containers()
		assert.NilError(t, err)
		for _, c := range all {
			assert.Assert(t, c.ID == "a" && c.Status == state.Stopped || c.ID == "b" && c.StandIn.IsZero(), "%+v", c)
		}
	}
}

func resources(memory, quota int64) *specs.LinuxResources {
	r := &specs.LinuxResources{}
	if memory != 0 {
		r.Memory = &specs.LinuxMemory{Limit: &memory}
	}
	if quota != 0 {
		r.CPU = &specs.LinuxCPU{Quota: &quota}
	}
	return r
}

// The VM grows with the limits of those that join, and the host's limits follow both ways.
func TestRoomForMore(t *testing.T) {
	w := newWorld(t)
	limit := func(r *specs.LinuxResources) { w.edit(func(s *specs.Spec) { s.Linux.Resources = r }) }
	size := func(vcpus int, mib int64) {
		t.Helper()
		record := w.podRecord()
		assert.Equal(t, record.VCPUs, vcpus)
		assert.Equal(t, record.MemoryBytes, mib<<20)
		assert.Equal(t, w.cgroup.limited.Load(), mib<<20)
	}
	limit(resources(100<<20, 50_000))
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	size(1, 232)
	limit(resources(200<<20, 50_000))
	_, err = w.create("b", 2)
	assert.NilError(t, err)
	size(1, 438)
	limits := w.cgroup.limits.Load()
	assert.Equal(t, *limits.Memory.Limit, int64(300<<20))
	assert.Equal(t, *limits.CPU.Quota, int64(100_000))

	// Without a limit there is none for all. What has none has the default together.
	limit(nil)
	_, err = w.create("c", 3)
	assert.NilError(t, err)
	size(1, 822)
	assert.Equal(t, *w.cgroup.limits.Load().Memory.Limit, int64(-1))
	assert.Equal(t, *w.cgroup.limits.Load().CPU.Quota, int64(-1))
	_, err = w.create("d", 4)
	assert.NilError(t, err)
	size(1, 822)

	// An update counts the others, too.
	res, err := w.pod.Update(t.Context(), "a", []byte(`{"memory":{"limit":209715200}}`))
	assert.NilError(t, err)
	assert.Equal(t, res.MemoryBytes, int64(925<<20))

	// What goes away takes its limit along; the VM stays as it is.
	for _, id := range []string{"c", "d"} {
		assert.NilError(t, w.pod.Delete(t.Context(), id, true, nil))
	}
	for deadline := time.Now().Add(10 * time.Second); *w.cgroup.limits.Load().Memory.Limit != 400<<20; {
		assert.Assert(t, time.Now().Before(deadline), "%d", *w.cgroup.limits.Load().Memory.Limit)
		runtime.Gosched()
	}
	size(1, 925)
}

// Who asks for more than there can be is refused and leaves the others as they were.
func TestNoRoomForMore(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	w.edit(func(s *specs.Spec) { s.Linux.Resources = resources(0, math.MaxInt32*100_000) })
	_, err = w.create("b", 2)
	assert.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	assert.ErrorContains(t, err, fmt.Sprintf("create b: linux.resources.cpu.quota: the pod's containers need a VM of %d vCPUs and 512 MiB together, "+
		"but it has %d vCPUs and 512 MiB", math.MaxInt32, runtime.NumCPU()))
	assert.Equal(t, w.status("a"), state.Created)
	assert.Equal(t, w.status("b"), state.Status(""))
	w.agent.online = func(r *agentv1.OnlineRequest) (*agentv1.OnlineResponse, error) {
		return &agentv1.OnlineResponse{Cpus: r.Cpus, PluggedBytes: 0, Problem: "no"}, nil
	}
	w.edit(func(s *specs.Spec) { s.Linux.Resources = resources(256<<20, 0) })
	_, err = w.create("c", 3)
	assert.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	assert.ErrorContains(t, err, "create c: linux.resources.memory.limit")
	assert.ErrorContains(t, err, "the guest uses")
}
