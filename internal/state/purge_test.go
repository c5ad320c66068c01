package state_test

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/state"
	"runv/internal/unixsock"
)

func mkfifo(path string) error { return unix.Mkfifo(path, 0o600) }

// TestMain lets the test binary play a process of a pod: "idle" until it is
// killed, or a supervisor that listens in the directory it is given.
func TestMain(m *testing.M) {
	switch os.Getenv("STATE_TEST_ROLE") {
	case "idle":
		_, _ = os.Stdout.WriteString("ready\n")
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	case "listen":
		l, err := unixsock.Listen(os.Getenv("STATE_TEST_DIR"), "supervisor.sock", "unix")
		if err != nil {
			panic(err)
		}
		_, _ = os.Stdout.WriteString("ready\n")
		_, _ = os.Stdin.Read(make([]byte, 1))
		_ = l.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child starts a process of a pod. done is closed when it has been reaped.
func child(t *testing.T, role, dir string) (p state.Process, done chan struct{}) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STATE_TEST_ROLE="+role, "STATE_TEST_DIR="+dir)
	_, err := cmd.StdinPipe()
	assert.NilError(t, err)
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	_, err = bufio.NewReader(out).ReadString('\n')
	assert.NilError(t, err)
	done = make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	p, err = state.ProcessOf(cmd.Process.Pid)
	assert.NilError(t, err)
	return p, done
}

func ended(t *testing.T, done chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the process was not killed")
	}
}

func running(t *testing.T, p state.Process) {
	t.Helper()
	assert.Assert(t, p.Alive(), "process %d was killed", p.PID)
}

func missing(t *testing.T, path string) {
	t.Helper()
	_, err := os.Lstat(path)
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%s: %v", path, err)
}

func TestProcess(t *testing.T) {
	p, done := child(t, "idle", "")
	assert.Assert(t, p.Alive())
	assert.Assert(t, !state.Process{PID: p.PID, StartTime: p.StartTime + 1}.Alive())
	assert.Assert(t, !state.Process{}.Alive())

	other := p
	other.StartTime++
	assert.NilError(t, other.Kill(t.Context()))
	running(t, p)

	assert.NilError(t, p.Kill(t.Context()))
	ended(t, done)
	assert.Assert(t, !p.Alive())
	assert.NilError(t, p.Kill(t.Context()))
	assert.NilError(t, state.Process{}.Kill(t.Context()))
	assert.ErrorContains(t, self(t).Kill(t.Context()), "the caller itself")
	_, err := state.ProcessOf(p.PID)
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
}

func TestZombieIsDead(t *testing.T) {
	cmd := exec.Command("true")
	assert.NilError(t, cmd.Start())
	p, err := state.ProcessOf(cmd.Process.Pid)
	assert.NilError(t, err)
	// Wait for its end without reaping it.
	assert.NilError(t, unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil))
	assert.Assert(t, !p.Alive())
	assert.NilError(t, p.Kill(t.Context()))
	assert.NilError(t, cmd.Wait())
}

func TestParseStat(t *testing.T) {
	tail := " S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200"
	start, dead, err := state.ParseStat([]byte("12 (a) Z (b)" + tail))
	assert.NilError(t, err)
	assert.Equal(t, start, uint64(4711))
	assert.Assert(t, !dead)
	for _, bad := range []string{"", "12 (a", "12 (a)", "12 (a) S 1 2"} {
		_, _, err := state.ParseStat([]byte(bad))
		assert.Assert(t, err != nil, "%q", bad)
	}
}

// pod makes a pod with living processes and one container in it.
type pod struct {
	standIn, supervisor, vm state.Process
	done                    [3]chan struct{}
}

func makePod(t *testing.T, s *state.Store, id string) *pod {
	t.Helper()
	var p pod
	p.standIn, p.done[0] = child(t, "idle", "")
	p.supervisor, p.done[1] = child(t, "idle", "")
	p.vm, p.done[2] = child(t, "idle", "")
	c := container(id, "pod-"+id)
	c.StandIn = p.standIn
	assert.NilError(t, s.ReserveContainer(c))
	assert.NilError(t, s.CreatePod(state.Pod{
		ID: "pod-" + id, Supervisor: p.supervisor, VM: []state.Process{p.vm}, Created: time.Now(),
	}))
	return &p
}

func TestPurge(t *testing.T) {
	s := open(t)
	p := makePod(t, s, "a")
	bystander := makePod(t, s, "b")
	assert.NilError(t, purge(t.Context(), s, "a"))
	for _, done := range p.done {
		ended(t, done)
	}
	missing(t, s.ContainerDir("a"))
	missing(t, s.PodDir("pod-a"))
	emptyTmp(t, s)
	assert.NilError(t, purge(t.Context(), s, "a"))
	for _, q := range []state.Process{bystander.standIn, bystander.supervisor, bystander.vm} {
		running(t, q)
	}
}

func TestPurgeSparesSharedPod(t *testing.T) {
	s := open(t)
	p := makePod(t, s, "a")
	assert.NilError(t, s.ReserveContainer(container("b", "pod-a")))
	assert.NilError(t, purge(t.Context(), s, "a"))
	ended(t, p.done[0])
	running(t, p.supervisor)
	running(t, p.vm)
	missing(t, s.ContainerDir("a"))

	// Damage does not make b forget its pod.
	assert.NilError(t, os.WriteFile(filepath.Join(s.ContainerDir("b"), "state.json"), nil, 0o600))
	assert.NilError(t, s.SweepPods(t.Context()))
	running(t, p.supervisor)
	assert.NilError(t, purge(t.Context(), s, "b"))
	ended(t, p.done[1])
	ended(t, p.done[2])
	missing(t, s.PodDir("pod-a"))
	emptyTmp(t, s)
}

func TestPurgeOfReusedPids(t *testing.T) {
	s := open(t)
	innocent, _ := child(t, "idle", "")
	stale := innocent
	stale.StartTime--
	c := container("a", "p")
	c.StandIn = stale
	assert.NilError(t, s.ReserveContainer(c))
	assert.NilError(t, s.CreatePod(state.Pod{ID: "p", Supervisor: stale, VM: []state.Process{stale}, Created: time.Now()}))
	assert.NilError(t, purge(t.Context(), s, "a"))
	running(t, innocent)
	missing(t, s.ContainerDir("a"))
	missing(t, s.PodDir("p"))
}

func TestPurgeOfDamagedState(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, container, pod string){
		"both files empty": func(t *testing.T, c, p string) {
			assert.NilError(t, os.WriteFile(c, nil, 0o600))
			assert.NilError(t, os.WriteFile(p, nil, 0o600))
		},
		"both files missing": func(t *testing.T, c, p string) {
			assert.NilError(t, os.Remove(c))
			assert.NilError(t, os.Remove(p))
		},
		"garbage": func(t *testing.T, c, p string) {
			assert.NilError(t, os.WriteFile(c, []byte(`{"version":1,"id":7,"podId":"../../x"`), 0o600))
			assert.NilError(t, os.WriteFile(p, []byte("\x00\xff"), 0o600))
		},
		"FIFOs": func(t *testing.T, c, p string) {
			assert.NilError(t, os.Remove(c))
			assert.NilError(t, os.Remove(p))
			assert.NilError(t, mkfifo(c))
			assert.NilError(t, mkfifo(p))
		},
		"state alone, without the link": func(t *testing.T, c, p string) {
			assert.NilError(t, os.Remove(filepath.Join(filepath.Dir(c), state.PodLinkName)))
		},
		"wrong link": func(t *testing.T, c, p string) {
			link := filepath.Join(filepath.Dir(c), state.PodLinkName)
			assert.NilError(t, os.Remove(link))
			assert.NilError(t, os.Symlink("/", link))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			assert.NilError(t, s.ReserveContainer(container("a", "p")))
			assert.NilError(t, s.CreatePod(state.Pod{ID: "p", Created: time.Now()}))
			// Known by nothing but the socket it listens on.
			_, done := child(t, "listen", s.PodDir("p"))
			damage(t, filepath.Join(s.ContainerDir("a"), "state.json"), filepath.Join(s.PodDir("p"), "pod.json"))
			assert.NilError(t, purge(t.Context(), s, "a"))
			ended(t, done)
			missing(t, s.ContainerDir("a"))
			missing(t, s.PodDir("p"))
			emptyTmp(t, s)
		})
	}
}

// A newer runv's files are not understood, but what they name is killed.
func TestPurgeOfNewerState(t *testing.T) {
	s := open(t)
	p := makePod(t, s, "a")
	for _, file := range []string{
		filepath.Join(s.ContainerDir("a"), "state.json"),
		filepath.Join(s.PodDir("pod-a"), "pod.json"),
	} {
		data, err := os.ReadFile(file)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(file, []byte(strings.Replace(string(data), `"version": 1`, `"version": 2`, 1)), 0o600))
	}
	_, err := s.LoadContainer("a")
	assert.ErrorContains(t, err, "written by a newer runv")
	assert.NilError(t, purge(t.Context(), s, "a"))
	for _, done := range p.done {
		ended(t, done)
	}
	missing(t, s.ContainerDir("a"))
	missing(t, s.PodDir("pod-a"))
}

func TestPurgeConcurrently(t *testing.T) {
	s := open(t)
	p := makePod(t, s, "a")
	assert.NilError(t, s.ReserveContainer(container("b", "pod-a")))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := purge(t.Context(), s, string("ab"[i%2])); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Go(func() {
		if err := s.SweepPods(t.Context()); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	for _, done := range p.done {
		ended(t, done)
	}
	missing(t, s.ContainerDir("a"))
	missing(t, s.ContainerDir("b"))
	missing(t, s.PodDir("pod-a"))
	emptyTmp(t, s)
}

func TestPurgeHasADeadline(t *testing.T) {
	s := open(t)
	p := makePod(t, s, "a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// Either the processes died in time or the record is still there; a second call ends it.
	if err := purge(ctx, s, "a"); err != nil {
		assert.Assert(t, errors.Is(err, context.Canceled), "%v", err)
	}
	assert.NilError(t, purge(t.Context(), s, "a"))
	assert.NilError(t, s.SweepPods(t.Context()))
	for _, done := range p.done {
		ended(t, done)
	}
	missing(t, s.ContainerDir("a"))
	emptyTmp(t, s)
}

func TestSweepPods(t *testing.T) {
	s := open(t)
	dead, done := child(t, "idle", "")
	assert.NilError(t, dead.Kill(t.Context()))
	ended(t, done)
	orphan, orphanDone := child(t, "idle", "")
	alive, _ := child(t, "idle", "")
	for _, p := range []state.Pod{
		{ID: "useless", Creator: dead, Supervisor: dead, VM: []state.Process{orphan}},
		{ID: "never-started", Creator: dead},
		{ID: "named", Creator: dead, Supervisor: dead},
		{ID: "starting"}, // its creator is this test
		{ID: "running", Creator: dead, Supervisor: alive},
		{ID: "damaged", Creator: dead},
		{ID: "damaged-but-served", Creator: dead},
	} {
		p.Created = time.Now()
		assert.NilError(t, s.CreatePod(p))
	}
	_, _ = child(t, "listen", s.PodDir("damaged-but-served"))
	for _, id := range []string{"damaged", "damaged-but-served"} {
		assert.NilError(t, os.WriteFile(filepath.Join(s.PodDir(id), "pod.json"), []byte("{"), 0o600))
	}
	assert.NilError(t, s.ReserveContainer(container("c", "named")))
	// What a crash left on its way.
	assert.NilError(t, os.MkdirAll(filepath.Join(s.Root(), "tmp", "123", "share"), 0o700))

	assert.NilError(t, s.SweepPods(t.Context()))
	left, err := os.ReadDir(filepath.Join(s.Root(), "pods"))
	assert.NilError(t, err)
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	assert.DeepEqual(t, names, []string{"damaged-but-served", "named", "running", "starting"})
	ended(t, orphanDone)
	running(t, alive)
	emptyTmp(t, s)
}

// Nobody's files may go when something is mounted where a pod is removed.
func TestMountsAreNotEmptied(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	privateMounts(t)
	s := open(t)
	assert.NilError(t, s.ReserveContainer(container("a", "p")))
	assert.NilError(t, s.CreatePod(state.Pod{ID: "p", Created: time.Now()}))

	// The user's files: on the same file system, with a mount below, shared so
	// that an unmount in the copy would reach the original.
	user := t.TempDir()
	assert.NilError(t, unix.Mount(user, user, "", unix.MS_BIND, ""))
	defer func() { _ = unix.Unmount(user, unix.MNT_DETACH) }()
	assert.NilError(t, unix.Mount("", user, "", unix.MS_SHARED, ""))
	sub := filepath.Join(user, "sub")
	assert.NilError(t, os.Mkdir(sub, 0o700))
	assert.NilError(t, unix.Mount("tmpfs", sub, "tmpfs", 0, ""))
	defer func() { _ = unix.Unmount(sub, unix.MNT_DETACH) }()
	precious := []string{filepath.Join(user, "file"), filepath.Join(sub, "file"), filepath.Join(user, "single")}
	for _, f := range precious {
		assert.NilError(t, os.WriteFile(f, []byte("precious"), 0o600))
	}
	untouched := func() {
		t.Helper()
		for _, f := range precious {
			data, err := os.ReadFile(f)
			assert.NilError(t, err)
			assert.Equal(t, string(data), "precious")
		}
	}

	share := filepath.Join(s.PodDir("p"), "share")
	rootfs, single := filepath.Join(share, "a", "rootfs"), filepath.Join(share, "a", "single")
	mount := func() {
		assert.NilError(t, os.MkdirAll(rootfs, 0o700))
		assert.NilError(t, os.WriteFile(single, nil, 0o600))
		assert.NilError(t, unix.Mount(user, rootfs, "", unix.MS_BIND|unix.MS_REC, ""))
		assert.NilError(t, unix.Mount(precious[2], single, "", unix.MS_BIND, ""))
	}

	// Even when the unmounting is skipped, a mount is not descended into.
	mount()
	parent, err := unix.Open(filepath.Dir(share), unix.O_PATH|unix.O_DIRECTORY, 0)
	assert.NilError(t, err)
	err = state.RemoveAt(parent, "share")
	assert.NilError(t, unix.Close(parent))
	assert.ErrorContains(t, err, "share/a/")
	untouched()

	// A link out of the directory is removed, not followed.
	assert.NilError(t, os.Symlink(user, filepath.Join(share, "link")))
	assert.NilError(t, purge(t.Context(), s, "a"))
	missing(t, s.PodDir("p"))
	untouched()
	emptyTmp(t, s)

	// The pod's directory itself may be a mount.
	assert.NilError(t, s.CreatePod(state.Pod{ID: "p", Created: time.Now()}))
	assert.NilError(t, unix.Mount(user, s.PodDir("p"), "", unix.MS_BIND, ""))
	assert.NilError(t, s.RemovePod("p"))
	missing(t, s.PodDir("p"))
	untouched()
}

// privateMounts moves the test's thread, and all that the test does, into a
// mount namespace of its own: the thread is never given back to the scheduler.
func privateMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	assert.NilError(t, unix.Unshare(unix.CLONE_NEWNS))
	assert.NilError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
}

func TestRemoveTree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tree")
	deep := dir
	for range 100 {
		deep = filepath.Join(deep, "d")
	}
	assert.NilError(t, os.MkdirAll(deep, 0o700))
	wide := filepath.Join(dir, "wide")
	assert.NilError(t, os.Mkdir(wide, 0o700))
	for i := range 1500 {
		assert.NilError(t, os.WriteFile(filepath.Join(wide, string(rune('a'+i%26))+time.Duration(i).String()), nil, 0o600))
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if err := state.RemoveTree(dir); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	missing(t, dir)
	assert.NilError(t, state.RemoveTree(dir))
	assert.NilError(t, state.RemoveTree(filepath.Join(dir, "below", "nothing")))
}

// Who listens on the supervisor's socket tells whether a pod with a damaged file lives.
func TestLiveOfDamagedPod(t *testing.T) {
	s := open(t)
	c := container("a", "p")
	assert.NilError(t, s.CreatePod(state.Pod{ID: "p", Created: time.Now()}))
	assert.NilError(t, os.WriteFile(filepath.Join(s.PodDir("p"), "pod.json"), nil, 0o600))
	assert.Equal(t, s.Live(c), state.Stopped)
	p, done := child(t, "listen", s.PodDir("p"))
	assert.Equal(t, s.Live(c), state.Running)
	assert.NilError(t, p.Kill(t.Context()))
	ended(t, done)
	assert.Equal(t, s.Live(c), state.Stopped)
}
