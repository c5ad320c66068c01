package pod_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	agentv1 "runv/api/agent/v1"
	"runv/internal/pod"
	"runv/internal/state"
)

// guestMirrors are the agent's mirrors: records.
type guestMirrors struct {
	mu       sync.Mutex
	applied  map[string]int // operations, by mirror
	replaced map[string]string
	removed  []string
	refuse   error
}

func (g *guestMirrors) Create(_ context.Context, r *agentv1.CreateMirrorRequest) (*agentv1.CreateMirrorResponse, error) {
	return &agentv1.CreateMirrorResponse{Path: "/mirror/" + r.Id + "/" + r.Name}, nil
}

func (g *guestMirrors) Apply(_ context.Context, r *agentv1.ApplyMirrorRequest) (*agentv1.ApplyMirrorResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.applied == nil {
		g.applied = map[string]int{}
	}
	g.applied[r.Id] += len(r.Operations)
	return &agentv1.ApplyMirrorResponse{}, g.refuse
}

func (g *guestMirrors) Replace(_ context.Context, r *agentv1.ReplaceMirrorRequest) (*agentv1.ReplaceMirrorResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.replaced == nil {
		g.replaced = map[string]string{}
	}
	g.replaced[r.Id] = r.Source
	return &agentv1.ReplaceMirrorResponse{}, nil
}

func (g *guestMirrors) Remove(_ context.Context, r *agentv1.RemoveMirrorRequest) (*agentv1.RemoveMirrorResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removed = append(g.removed, r.Id)
	return &agentv1.RemoveMirrorResponse{}, nil
}

func (g *guestMirrors) operations(id string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.applied[id]
}

// binds gives the bundle these mounts beside its own, and takes the right to write to its root.
func (w *world) binds(mounts ...specs.Mount) {
	w.t.Helper()
	path := filepath.Join(w.bundle, "config.json")
	data, err := os.ReadFile(path)
	assert.NilError(w.t, err)
	var spec specs.Spec
	assert.NilError(w.t, json.Unmarshal(data, &spec))
	spec.Mounts = mounts
	data, err = json.Marshal(spec)
	assert.NilError(w.t, err)
	assert.NilError(w.t, os.WriteFile(path, data, 0o600))
}

func bind(source string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: "/x", Options: append([]string{"rbind"}, options...)}
}

// sources are where the guest finds what a container has bound.
func (w *world) sources(id string) (sources []string) {
	w.agent.mu.Lock()
	defer w.agent.mu.Unlock()
	for _, m := range w.agent.created[id].Mounts {
		sources = append(sources, m.Source)
	}
	return sources
}

// TestMirrors has the right binds mirrored, and told when they are not any more.
func TestMirrors(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	for _, name := range []string{"config", "data", "fifo"} {
		assert.NilError(t, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	config, data, fifo, single := filepath.Join(dir, "config"), filepath.Join(dir, "data"), filepath.Join(dir, "fifo"), filepath.Join(dir, "single")
	assert.NilError(t, os.WriteFile(single, nil, 0o600))
	assert.NilError(t, unix.Mkfifo(filepath.Join(fifo, "fifo"), 0o600))
	w.binds(bind(config, "ro"), bind(data, "rw"), bind(data, "ro"), bind(fifo, "ro"), bind(single, "ro"), bind(config, "ro", "rslave"), bind(config, "ro"))
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	share := func(path string) string { return "/share/binds" + path }
	assert.DeepEqual(t, w.sources("web"), []string{
		"/mirror/m1/config", share(data), share(data), share(fifo), "/mirror/m4/single", share(config), "/mirror/m1/config",
	})
	assert.Assert(t, w.agent.mirrors.operations("m1") > 0)

	// What was changed before the start is there.
	before := w.agent.mirrors.operations("m1")
	assert.NilError(t, os.WriteFile(filepath.Join(config, "new"), nil, 0o600))
	assert.NilError(t, w.pod.Start(t.Context(), "web"))
	assert.Assert(t, w.agent.mirrors.operations("m1") > before)
	before = w.agent.mirrors.operations("m1")
	assert.NilError(t, os.WriteFile(filepath.Join(config, "newer"), nil, 0o600))
	_, _, err = w.pod.Exec(t.Context(), pod.ExecRequest{
		Container: "web", ExecID: "job", Process: []byte(`{"cwd":"/","args":["true"]}`), StandIn: w.standIn(2).token,
	})
	assert.NilError(t, err)
	assert.Assert(t, w.agent.mirrors.operations("m1") > before)

	// Another container that may write.
	w.binds(bind(dir, "rw"))
	_, err = w.create("writer", 3)
	assert.NilError(t, err)
	w.agent.mirrors.mu.Lock()
	assert.DeepEqual(t, w.agent.mirrors.replaced, map[string]string{"m1": share(config), "m4": share(single)})
	w.agent.mirrors.mu.Unlock()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		c, err := w.pod.State(t.Context(), "web")
		if err == nil && len(c.LostWatches) == 3 && c.LostWatches[0] != "" {
			return poll.Success()
		}
		return poll.Continue("%v %v", c.LostWatches, err)
	})
	assert.NilError(t, w.pod.Delete(t.Context(), "writer", true, nil))
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
}

// TestMirrorsOfOneThatGoes has them removed with their container, while the pod lives on.
func TestMirrorsOfOneThatGoes(t *testing.T) {
	w := newWorld(t)
	_, err := w.create("infra", 1)
	assert.NilError(t, err)
	config := t.TempDir()
	w.binds(bind(config, "ro"))
	_, err = w.create("web", 2)
	assert.NilError(t, err)
	assert.DeepEqual(t, w.sources("web"), []string{"/mirror/m1/" + filepath.Base(config)})
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		w.agent.mirrors.mu.Lock()
		defer w.agent.mirrors.mu.Unlock()
		if len(w.agent.mirrors.removed) == 1 {
			return poll.Success()
		}
		return poll.Continue("%v", w.agent.mirrors.removed)
	}, poll.WithTimeout(10*time.Second))
	assert.NilError(t, w.pod.Delete(t.Context(), "infra", true, nil))
}

// TestMirrorRefused has a guest that cannot have a mirror: the container has the share, and that is no loss.
func TestMirrorRefused(t *testing.T) {
	w := newWorld(t)
	w.agent.mirrors.refuse = errdefs.ErrInternal
	config := t.TempDir()
	w.binds(bind(config, "ro"))
	_, err := w.create("web", 1)
	assert.NilError(t, err)
	assert.DeepEqual(t, w.sources("web"), []string{"/share/binds" + config})
	c, err := w.pod.State(t.Context(), "web")
	assert.NilError(t, err)
	assert.Equal(t, len(c.LostWatches), 0)
	assert.Equal(t, c.Status, state.Created)
	assert.NilError(t, w.pod.Delete(t.Context(), "web", true, nil))
}
