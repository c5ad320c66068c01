package pod_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/mountns"
	"runv/internal/network"
	"runv/internal/pod"
	"runv/internal/state"
)

// mirrors makes mirrors that write down what is done with them.
type mirrors struct {
	mu      sync.Mutex
	deeds   []string
	prepare error
	start   error
	close   error
}

func (m *mirrors) did(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.deeds = append(m.deeds, fmt.Sprintf(format, args...))
}

// told returns the deeds so far.
func (m *mirrors) told() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.deeds)
}

func (m *mirrors) make(id string, ns *network.Namespace, _ int, save func(network.Record) error) pod.Mirror {
	return &paperMirror{m, id, ns, save}
}

type paperMirror struct {
	all  *mirrors
	id   string
	ns   *network.Namespace
	save func(network.Record) error
}

func (m *paperMirror) Prepare(context.Context, network.VM) error {
	m.all.did("prepare %s", m.id)
	return errors.Join(m.all.prepare, m.save(network.Record{Path: m.ns.Path(), Namespace: m.ns.ID(), Links: []int{7}}))
}

func (m *paperMirror) Start(context.Context, network.VM, network.Guest) error {
	m.all.did("start %s", m.id)
	return m.all.start
}

func (m *paperMirror) Close(context.Context) error {
	m.all.did("close %s", m.id)
	return m.all.close
}

// inNetNS makes a network namespace and returns a path of it that lasts as long as the test.
func netNS(t *testing.T) string {
	t.Helper()
	var file *os.File
	assert.NilError(t, mountns.OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	}))
	t.Cleanup(func() { file.Close() })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd())
}

// setNetNS changes the network namespace of the bundle.
func (w *world) setNetNS(change func(ns []specs.LinuxNamespace) []specs.LinuxNamespace) {
	w.t.Helper()
	w.edit(func(s *specs.Spec) { s.Linux.Namespaces = change(s.Linux.Namespaces) })
}

// edit changes the bundle of the containers to come.
func (w *world) edit(change func(*specs.Spec)) {
	w.t.Helper()
	path := filepath.Join(w.bundle, "config.json")
	data, err := os.ReadFile(path)
	assert.NilError(w.t, err)
	var spec specs.Spec
	assert.NilError(w.t, json.Unmarshal(data, &spec))
	change(&spec)
	data, err = json.Marshal(spec)
	assert.NilError(w.t, err)
	assert.NilError(w.t, os.WriteFile(path, data, 0o644))
}

func (w *world) podRecord() state.Pod {
	w.t.Helper()
	p, err := w.store.LoadPod("p")
	assert.NilError(w.t, err)
	return p
}

// Containers in one network namespace of the host share a network of the guest, which is there as
// long as one of them is.
func TestNetworkIsShared(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	assert.DeepEqual(t, w.mirrors.told(), []string{"prepare net1", "start net1"})
	c, err := w.store.LoadContainer("a")
	assert.NilError(t, err)
	var st unix.Stat_t
	assert.NilError(t, unix.Stat("/proc/self/ns/net", &st))
	assert.Assert(t, c.NetNS.Same(state.NetNS{Dev: st.Dev, Ino: st.Ino}))
	assert.DeepEqual(t, w.podRecord().Networks[0].Links, []int{7})

	_, err = w.create("b", 2)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Delete(t.Context(), "a", true, nil))
	assert.DeepEqual(t, w.mirrors.told(), []string{"prepare net1", "start net1"})
	assert.NilError(t, w.pod.Delete(t.Context(), "b", true, nil))
	assert.DeepEqual(t, w.mirrors.told(), []string{"prepare net1", "start net1", "close net1"})
}

// A container without a network namespace would have the host's.
func TestNoNetwork(t *testing.T) {
	w := newWorld(t)
	w.setNetNS(func(list []specs.LinuxNamespace) []specs.LinuxNamespace {
		return slices.DeleteFunc(list, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.NetworkNamespace })
	})
	_, err := w.create("a", 1)
	assert.ErrorContains(t, err, "a virtual machine cannot use the host's network")
	assert.Equal(t, len(w.mirrors.told()), 0)
}

// What cannot be mirrored fails the creation, and is taken down.
func TestNetworkFails(t *testing.T) {
	for _, step := range []string{"prepare", "start"} {
		w := newWorld(t)
		deeds := []string{"prepare net1", "close net1"}
		if step == "prepare" {
			w.mirrors.prepare = errors.New("network: eth0: no tap")
		} else {
			w.mirrors.start = errors.New("network: eth0: no tap")
			deeds = []string{"prepare net1", "start net1", "close net1"}
		}
		_, err := w.create("a", 1)
		assert.Error(t, err, "create a: network: eth0: no tap")
		assert.NilError(t, <-w.ran)
		w.ran <- nil
		assert.DeepEqual(t, w.mirrors.told(), deeds)
		assert.Equal(t, len(w.podRecord().Networks), 0)
	}
}

// The record of a pod stays small, however many containers come and go.
func TestPhasesGoWithTheirContainer(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	before := w.podRecord().Phases
	for i := range 3 {
		_, err := w.create("b", byte(2+i))
		assert.NilError(t, err)
		assert.Assert(t, len(w.podRecord().Phases) > len(before))
		assert.NilError(t, w.pod.Start(t.Context(), "b"))
		assert.NilError(t, w.pod.Delete(t.Context(), "b", true, nil))
	}
	_, err = w.create("c", 9)
	assert.NilError(t, err)
	for _, ph := range w.podRecord().Phases {
		assert.Assert(t, !strings.HasSuffix(ph.Name, " b"), ph.Name)
	}
}

// What a mirror could not take down stays in the record, for whoever removes the pod.
func TestRecordOutlivesAFailedClose(t *testing.T) {
	w := newWorld(t)
	w.mirrors.close = errors.New("qdisc is busy")
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	assert.NilError(t, w.pod.Shutdown(t.Context()))
	assert.NilError(t, <-w.ran)
	w.ran <- nil
	assert.DeepEqual(t, w.podRecord().Networks[0].Links, []int{7})
}

// The wish for a network like the host's is not passed over where it cannot be granted.
func TestNetworkAnnotationOfOneThatJoins(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("a", 1)
	assert.NilError(t, err)
	w.edit(func(s *specs.Spec) {
		s.Annotations = map[string]string{"dev.runv.network": "user"}
		for i := range s.Linux.Namespaces {
			if ns := &s.Linux.Namespaces[i]; ns.Type == specs.NetworkNamespace {
				ns.Path = "/proc/self/ns/net"
			}
		}
	})
	_, err = w.create("b", 2)
	assert.ErrorContains(t, err, "annotations[dev.runv.network]: the container has a network namespace of somebody else's")
	assert.Equal(t, w.status("a"), state.Created)
}
