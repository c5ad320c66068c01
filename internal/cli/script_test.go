package cli_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"runv/internal/cli"
	"runv/internal/standin"
	"runv/internal/state"
)

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){
		"runv": func() {
			if len(os.Args) > 1 && os.Args[1] == "supervisor" {
				os.Exit(fakeMain(os.Args[2:]))
			}
			if len(os.Args) > 1 && os.Args[1] == "standin" {
				os.Exit(standin.Main(os.Args[2:]))
			}
			os.Exit(cli.Main(context.Background(), cli.Program{
				Version: "1.2.3", Args: os.Args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
			}))
		},
	})
}

// leakChecked runs the tests and then looks for goroutines that they left.
type leakChecked struct{ m *testing.M }

func (l leakChecked) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		return 1
	}
	return code
}

// TestScripts runs the command line as its callers do. Each script has a state
// directory of its own, $ROOT, and these commands beside testscript's:
//
//	container ID STATUS    make a container in pod ID, whose supervisor is this
//	                       test (a fake) unless STATUS begins with "dead-"
//	status N ARGS          runv ARGS, which must exit with status N
//	detached ARGS          runv --root $ROOT ARGS with the files of a caller that does
//	                       not wait for their end; the output is in the file out
//	nopods                 there is no pod
//	pods ID...             these are the containers of the one pod there is
//	deafpod ID             nobody listens any more to what is asked of a container's pod
//	killpod ID             kill the supervisor of a container's pod
//	share BUNDLE TYPE ID   give the bundle's namespace of a type the path of that of a container's stand-in
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			root := filepath.Join(env.WorkDir, "root")
			env.Setenv("ROOT", root)
			env.Setenv("HOME", env.WorkDir)
			env.Defer(func() { purge(t, root) })
			return os.Mkdir(root, 0o700)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"container": container,
			"status":    status,
			"detached":  detached,
			"nopods":    noPods,
			"pods":      onePod,
			"deafpod":   deafPod,
			"killpod":   killPod,
			"share":     share,
		},
	})
}

func container(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: container ID STATUS")
	}
	id := args[0]
	status, dead := strings.CutPrefix(args[1], "dead-")
	store, err := state.Open(ts.Getenv("ROOT"))
	ts.Check(err)
	self, err := state.ProcessOf(os.Getpid())
	ts.Check(err)
	created := time.Date(2026, 11, 23, 17, 44, 51, 33439861, time.UTC)
	bundle := ts.MkAbs("bundle")
	c := state.Container{
		ID: id, PodID: "pod-" + id, Bundle: bundle, Rootfs: filepath.Join(bundle, "rootfs"), OCIVersion: "1.2.0",
		Status: state.Status(status), Created: created, Annotations: map[string]string{"a": "b"},
	}
	if !dead {
		c.StandIn = state.Process{PID: 4711, StartTime: 1}
	}
	ts.Check(store.ReserveContainer(c))
	pod := state.Pod{
		ID: c.PodID, Created: created, Driver: "qemu", Accel: "tcg", AccelNote: "because", Kernel: "6.1.0",
		Phases: []state.Phase{{Name: "boot", Duration: 1500 * time.Millisecond}, {Name: "start", Duration: 2 * time.Millisecond}},
	}
	if !dead {
		pod.Supervisor = self
	}
	ts.Check(store.CreatePod(pod))
	if dead {
		return
	}
	_, stop, err := serveFake(store, c.PodID)
	ts.Check(err)
	ts.Defer(stop)
}

func share(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: share BUNDLE TYPE ID")
	}
	store, err := state.Open(ts.Getenv("ROOT"))
	ts.Check(err)
	c, err := store.LoadContainer(args[2])
	ts.Check(err)
	config := filepath.Join(ts.MkAbs(args[0]), "config.json")
	var spec specs.Spec
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(config)), &spec))
	kind := specs.LinuxNamespaceType(args[1])
	spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: fmt.Sprintf("/proc/%d/ns/%s", c.StandIn.PID, kind)})
	data, err := json.Marshal(&spec)
	ts.Check(err)
	ts.Check(os.WriteFile(config, data, 0o600))
}

func status(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec("runv", args[1:]...)
	exit, ok := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil && args[0] == "0":
	case err == nil:
		ts.Fatalf("exit status 0, want %s", args[0])
	case !ok:
		ts.Check(err)
	case strconv.Itoa(exit.ExitCode()) != args[0]:
		ts.Fatalf("%v, want %s", exit, args[0])
	}
}

func detached(ts *testscript.TestScript, neg bool, args []string) {
	out, err := os.Create(ts.MkAbs("out"))
	ts.Check(err)
	defer out.Close()
	cmd := exec.Command("runv", append([]string{"--root", ts.Getenv("ROOT")}, args...)...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "RUNV_FAKE="+ts.Getenv("RUNV_FAKE"))
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); (err != nil) != neg {
		ts.Logf("%s", ts.ReadFile("out"))
		ts.Fatalf("runv: %v", err)
	}
}

func noPods(ts *testscript.TestScript, _ bool, _ []string) {
	store, err := state.Open(ts.Getenv("ROOT"))
	ts.Check(err)
	pods, err := store.Pods()
	ts.Check(err)
	if len(pods) > 0 {
		ts.Fatalf("left: %+v", pods)
	}
}

func onePod(ts *testscript.TestScript, _ bool, args []string) {
	store, err := state.Open(ts.Getenv("ROOT"))
	ts.Check(err)
	pods, err := store.Pods()
	ts.Check(err)
	all, err := store.Containers()
	ts.Check(err)
	var ids []string
	for _, c := range all {
		ids = append(ids, c.ID)
		if len(pods) != 1 || c.PodID != pods[0].ID {
			ts.Fatalf("container %s is in pod %s of %+v", c.ID, c.PodID, pods)
		}
	}
	if !slices.Equal(ids, args) {
		ts.Fatalf("containers: %s", ids)
	}
}

func deafPod(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.Remove(filepath.Join(ts.Getenv("ROOT"), "containers", args[0], "pod", state.SupervisorSocket)))
}

func killPod(ts *testscript.TestScript, _ bool, args []string) {
	store, err := state.Open(ts.Getenv("ROOT"))
	ts.Check(err)
	c, err := store.LoadContainer(args[0])
	ts.Check(err)
	pod, err := store.LoadPod(c.PodID)
	ts.Check(err)
	ts.Check(pod.Supervisor.Kill(context.Background()))
}

// purge removes what a script that has failed left running.
func purge(t *testing.T, root string) {
	store, err := state.Open(root)
	if err != nil {
		t.Error(err)
		return
	}
	all, _ := store.Containers()
	for _, c := range all {
		// The fakes in this process need no killing, and Purge refuses to.
		if _, err := store.Purge(t.Context(), c.ID); err != nil {
			t.Log(err)
		}
	}
}
