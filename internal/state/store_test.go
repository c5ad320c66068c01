package state_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/internal/state"
)

func open(t *testing.T) *state.Store {
	t.Helper()
	s, err := state.Open(filepath.Join(t.TempDir(), "run"))
	assert.NilError(t, err)
	return s
}

func container(id, pod string) state.Container {
	return state.Container{ID: id, PodID: pod, Status: state.Running, Created: time.Now()}
}

func self(t *testing.T) state.Process {
	t.Helper()
	p, err := state.ProcessOf(os.Getpid())
	assert.NilError(t, err)
	return p
}

func TestMissingRootIsEmptyAndStaysMissing(t *testing.T) {
	s := open(t)
	list, err := s.Containers()
	assert.NilError(t, err)
	assert.Equal(t, len(list), 0)
	pods, err := s.Pods()
	assert.NilError(t, err)
	assert.Equal(t, len(pods), 0)
	_, err = s.LoadContainer("a")
	assert.Assert(t, errdefs.IsNotFound(err))
	assert.Assert(t, errdefs.IsNotFound(s.SaveContainer(container("a", "p"))))
	assert.NilError(t, removeContainer(s, "a"))
	assert.NilError(t, s.RemovePod("a"))
	assert.NilError(t, purge(t.Context(), s, "a"))
	assert.NilError(t, s.SweepPods(t.Context()))
	_, err = os.Stat(s.Root())
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
}

func TestOpenRefusesRootOfOthers(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	assert.NilError(t, os.WriteFile(file, nil, 0o600))
	_, err := state.Open(file)
	assert.ErrorContains(t, err, "not a directory")

	shared := filepath.Join(dir, "shared")
	assert.NilError(t, os.Mkdir(shared, 0o700))
	assert.NilError(t, os.Chmod(shared, 0o777))
	_, err = state.Open(shared)
	assert.ErrorContains(t, err, "others may write to it (mode 0777)")
	assert.Assert(t, errdefs.IsPermissionDenied(err))

	if os.Geteuid() == 0 {
		foreign := filepath.Join(dir, "foreign")
		assert.NilError(t, os.Mkdir(foreign, 0o700))
		assert.NilError(t, os.Chown(foreign, 12345, -1))
		_, err = state.Open(foreign)
		assert.ErrorContains(t, err, "belongs to uid 12345")
	}
}

func TestContainerLife(t *testing.T) {
	s := open(t)
	c := container("a", "p")
	assert.NilError(t, s.ReserveContainer(c))
	err := s.ReserveContainer(c)
	assert.Error(t, err, "container with id a exists already")
	assert.Assert(t, errdefs.IsAlreadyExists(err))

	for path, mode := range map[string]os.FileMode{
		s.Root():            os.ModeDir | 0o700,
		s.ContainerDir("a"): os.ModeDir | 0o700,
		filepath.Join(s.ContainerDir("a"), "state.json"): 0o600,
	} {
		fi, err := os.Stat(path)
		assert.NilError(t, err)
		assert.Equal(t, fi.Mode(), mode, path)
	}

	c, err = s.LoadContainer("a")
	assert.NilError(t, err)
	assert.Equal(t, c.Creator, self(t))
	status := uint32(7)
	c.Status, c.ExitStatus = state.Stopped, &status
	assert.NilError(t, s.SaveContainer(c))
	got, err := s.LoadContainer("a")
	assert.NilError(t, err)
	assert.DeepEqual(t, got, c)

	assert.NilError(t, removeContainer(s, "a"))
	assert.NilError(t, removeContainer(s, "a"))
	_, err = s.LoadContainer("a")
	assert.Error(t, err, "container a does not exist")
	assert.Assert(t, errdefs.IsNotFound(err))
	err = s.SaveContainer(c)
	assert.Assert(t, errdefs.IsNotFound(err), "a removed container must not come back: %v", err)

	// The id has a new owner: the old one's supervisor must not write to it.
	assert.NilError(t, s.ReserveContainer(container("a", "p2")))
	err = s.SaveContainer(c)
	assert.Assert(t, errdefs.IsFailedPrecondition(err), "%v", err)
	emptyTmp(t, s)
}

func TestPodLife(t *testing.T) {
	s := open(t)
	p := state.Pod{ID: "p", Created: time.Now()}
	assert.NilError(t, s.CreatePod(p))
	assert.Assert(t, errdefs.IsAlreadyExists(s.CreatePod(p)))
	p.Supervisor = self(t)
	assert.NilError(t, s.SavePod(p))
	got, err := s.LoadPod("p")
	assert.NilError(t, err)
	assert.Equal(t, got.Supervisor, self(t))

	assert.NilError(t, s.ReserveContainer(container("a", "p")))
	err = s.RemovePod("p")
	assert.Error(t, err, "remove pod p: container a is in it")
	assert.Assert(t, errdefs.IsFailedPrecondition(err))
	assert.NilError(t, removeContainer(s, "a"))
	assert.NilError(t, s.RemovePod("p"))
	assert.Assert(t, errdefs.IsNotFound(s.SavePod(p)))
	emptyTmp(t, s)
}

func TestInvalidIsNotWritten(t *testing.T) {
	s := open(t)
	for _, id := range []string{"", ".", "..", "a/b", "../x", "a\x00", strings.Repeat("a", 256)} {
		assert.Assert(t, errdefs.IsInvalidArgument(s.ReserveContainer(container(id, "p"))), "%q", id)
		assert.Assert(t, errdefs.IsInvalidArgument(purge(t.Context(), s, id)), "%q", id)
		assert.Assert(t, errdefs.IsInvalidArgument(removeContainer(s, id)), "%q", id)
		assert.Assert(t, errdefs.IsInvalidArgument(s.RemovePod(id)), "%q", id)
		_, err := s.LoadContainer(id)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q", id)
	}
	big := container("big", "p")
	big.Annotations = map[string]string{"a": strings.Repeat("x", 16<<20)}
	assert.Assert(t, errdefs.IsInvalidArgument(s.ReserveContainer(big)))
	list, err := s.Containers()
	assert.NilError(t, err)
	assert.Equal(t, len(list), 0)
	emptyTmp(t, s)
}

func TestBrokenEntriesDoNotHideOthers(t *testing.T) {
	s := open(t)
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		assert.NilError(t, s.ReserveContainer(container(id, id)))
	}
	file := func(id string) string { return filepath.Join(s.ContainerDir(id), "state.json") }
	assert.NilError(t, os.WriteFile(file("b"), []byte("{"), 0o600))
	assert.NilError(t, os.Remove(file("c")))
	data, err := os.ReadFile(file("a"))
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(file("d"), data, 0o600))

	list, err := s.Containers()
	assert.Equal(t, len(list), 2)
	assert.Equal(t, list[0].ID+list[1].ID, "ae")
	for _, want := range []string{
		"read container b: ", "read container c: damaged state file: state.json is missing",
		`read container d: damaged state file: it is of container "a"`,
	} {
		assert.ErrorContains(t, err, want)
	}
	var entry *state.EntryError
	assert.Assert(t, errors.As(err, &entry) && entry.ID == "b")

	// A FIFO in the place of the file must not hang the reader.
	assert.NilError(t, os.Remove(file("b")))
	assert.NilError(t, mkfifo(file("b")))
	_, err = s.LoadContainer("b")
	assert.ErrorContains(t, err, "not a regular file")
}

func TestOneOfManyReserves(t *testing.T) {
	s := open(t)
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			switch err := s.ReserveContainer(container("a", "p")); {
			case err == nil:
				won.Add(1)
			case !errdefs.IsAlreadyExists(err):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	assert.Equal(t, won.Load(), int32(1))
}

func TestReadersNeverSeeHalves(t *testing.T) {
	s := open(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := s.Containers(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 50 {
		c := container(fmt.Sprint("c", i%3), "p")
		assert.NilError(t, s.ReserveContainer(c))
		assert.NilError(t, s.SaveContainer(c))
		assert.NilError(t, removeContainer(s, c.ID))
	}
	close(stop)
	wg.Wait()
}

func TestLive(t *testing.T) {
	s := open(t)
	c := container("a", "p")
	c.Creator = self(t)
	assert.Equal(t, s.Live(c), state.Stopped, "without a pod")
	c.Status = state.Creating
	assert.Equal(t, s.Live(c), state.Creating, "the pod is about to be created")

	p := state.Pod{ID: "p", Created: time.Now()}
	assert.NilError(t, s.CreatePod(p))
	assert.Equal(t, s.Live(c), state.Creating, "the supervisor is about to start")
	p.Supervisor = self(t)
	assert.NilError(t, s.SavePod(p))
	for _, st := range []state.Status{state.Creating, state.Created, state.Running, state.Paused, state.Stopped} {
		c.Status = st
		assert.Equal(t, s.Live(c), st, "supervisor alive")
	}

	p.Supervisor.StartTime++ // its pid has another owner now
	assert.NilError(t, s.SavePod(p))
	for _, st := range []state.Status{state.Creating, state.Created, state.Running, state.Paused, state.Stopped} {
		c.Status = st
		assert.Equal(t, s.Live(c), state.Stopped, "supervisor dead")
	}
}

// emptyTmp checks that nothing was left on its way in or out.
func emptyTmp(t *testing.T, s *state.Store) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(s.Root(), "tmp"))
	if !errors.Is(err, fs.ErrNotExist) {
		assert.NilError(t, err)
	}
	assert.Equal(t, len(left), 0, "%v", left)
}

func purge(ctx context.Context, s *state.Store, id string) error {
	_, err := s.Purge(ctx, id)
	return err
}

func removeContainer(s *state.Store, id string) error {
	_, err := s.RemoveContainer(id)
	return err
}

// Whoever removes a container's record gets it, and nobody else does.
func TestOneTakesTheRecord(t *testing.T) {
	s := open(t)
	c := container("a", "p")
	c.Hooks.Poststop = []specs.Hook{{Path: "/bin/x", Timeout: new(3)}}
	for _, remove := range []func() (*state.Container, error){
		func() (*state.Container, error) { return s.Purge(t.Context(), "a") },
		func() (*state.Container, error) { return s.RemoveContainer("a") },
	} {
		taken, err := remove()
		assert.NilError(t, err)
		assert.Assert(t, taken == nil)
		assert.NilError(t, s.ReserveContainer(c))
		var takers atomic.Int32
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				taken, err := remove()
				assert.Check(t, err)
				if taken != nil {
					takers.Add(1)
					assert.Check(t, cmp.Diff(taken.Hooks, c.Hooks) == "")
				}
			})
		}
		all.Wait()
		assert.Equal(t, takers.Load(), int32(1))
	}
	assert.NilError(t, s.ReserveContainer(c))
	assert.NilError(t, os.WriteFile(filepath.Join(s.ContainerDir("a"), "state.json"), []byte("{"), 0o600))
	taken, err := s.Purge(t.Context(), "a")
	assert.NilError(t, err)
	assert.Equal(t, taken.ID, "a", "a damaged record is told, too")
}
