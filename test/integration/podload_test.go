package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"

	"runv/test/harness"
)

// held is what a pod's processes hold while nothing happens.
type held struct {
	supervisorFDs, vmmFDs, serverFDs, shares int // on the host
	processes, mounts, cgroups               int // in the guest
	supervisorKiB, agentKiB, agentThreads    int // may vary
}

// hold looks at a pod. The watcher is a container that sees the guest's processes and cgroups.
func hold(t *testing.T, e *harness.Env, watcher string) (h held) {
	t.Helper()
	pod := e.Pod(watcher)
	count := func(pattern string) int {
		found, err := filepath.Glob(pattern)
		assert.NilError(t, err)
		return len(found)
	}
	h.supervisorFDs = count(fmt.Sprintf("/proc/%d/fd/*", pod.Supervisor.PID))
	h.vmmFDs = count(fmt.Sprintf("/proc/%d/fd/*", pod.VM[0].PID))
	h.serverFDs = harness.OpenFiles(t, pod.VM[1].PID)
	h.shares = count(filepath.Join(e.PodDir(watcher), "share", "*"))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pod.Supervisor.PID))
	assert.NilError(t, err)
	number := func(text, pattern string) int {
		t.Helper()
		m := regexp.MustCompile(pattern).FindStringSubmatch(text)
		assert.Assert(t, len(m) == 2, "%s in %s", pattern, text)
		n, err := strconv.Atoi(m[1])
		assert.NilError(t, err)
		return n
	}
	h.supervisorKiB = number(string(status), `RssAnon:\s+(\d+)`)
	guest := e.OK("exec", watcher, "sh", "-c", `cat /proc/1/status
		echo processes: $(grep -l . /proc/[0-9]*/cmdline | grep -c .)
		echo mounts: $(grep -c . /proc/1/mountinfo)
		echo cgroups: $(find /sys/fs/cgroup -type d | grep -c .)`)
	h.processes, h.mounts, h.cgroups = number(guest, `processes: (\d+)`), number(guest, `mounts: (\d+)`), number(guest, `cgroups: (\d+)`)
	h.agentKiB, h.agentThreads = number(guest, `RssAnon:\s+(\d+)`), number(guest, `Threads:\s+(\d+)`)
	return h
}

// TestManyContainersInAPod makes and removes containers in random order, several at once, and then finds
// the pod as it was.
func TestManyContainersInAPod(t *testing.T) {
	e := harness.New(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	sleep := []string{"sleep", "100000"}
	e.OK("run", "-d", "--bundle", e.Bundle(sleep), "infra")
	e.OK("run", "-d", "--bundle", e.Bundle(sleep, sharing(e.State("infra").Pid, specs.NetworkNamespace), func(s *specs.Spec) {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
			return ns.Type == specs.PIDNamespace || ns.Type == specs.CgroupNamespace
		})
	}), "watcher")
	bundle := e.Bundle(sleep)
	kinds := []specs.LinuxNamespaceType{
		specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.PIDNamespace, specs.CgroupNamespace,
	}
	pid := e.State("infra").Pid
	// newBundle makes a bundle that shares some of the namespaces.
	configs := 0
	newBundle := func() string {
		configs++
		dir := filepath.Join(e.Dir, fmt.Sprint("b", configs))
		assert.NilError(t, os.Mkdir(dir, 0o755))
		data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600))
		some := slices.Clone(kinds)
		random.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
		e.EditSpec(dir, func(s *specs.Spec) {
			s.Root.Path = filepath.Join(bundle, "rootfs")
			sharing(pid, some[:1+random.IntN(len(some))]...)(s)
		})
		return dir
	}
	round := func(n int) {
		ids := make([]string, n)
		var all sync.WaitGroup
		places := make(chan struct{}, 3)
		at := func(f func()) {
			places <- struct{}{}
			all.Go(func() { defer func() { <-places }(); f() })
		}
		for i := range ids {
			ids[i] = fmt.Sprint("c", i)
			dir, verb := newBundle(), []string{"create"}
			if random.IntN(4) > 0 {
				verb = []string{"run", "-d"}
			}
			at(func() {
				r := e.Run(append(verb, "--bundle", dir, ids[i])...)
				assert.Check(t, r.Code == 0, "%s: %s", ids[i], r.Stderr)
			})
		}
		all.Wait()
		random.Shuffle(n, func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
		for _, id := range ids {
			at(func() {
				r := e.Run("delete", "--force", id)
				assert.Check(t, r.Code == 0, "%s: %s", id, r.Stderr)
			})
		}
		all.Wait()
		assert.Equal(t, e.OK("list", "-q"), "infra\nwatcher\n")
	}
	exact := func(h held) held { // the part of it that must not change
		h.supervisorKiB, h.agentKiB, h.agentThreads = 0, 0, 0
		return h
	}
	settled := func(want held) (now held) {
		t.Helper()
		harness.Eventually(t, "the pod is as it was", func() bool {
			now = hold(t, e, "watcher")
			if exact(now) != exact(want) {
				t.Logf("%+v is not %+v yet", now, want)
			}
			return exact(now) == exact(want)
		})
		return now
	}
	hold(t, e, "watcher") // which opens files for the first time
	first := hold(t, e, "watcher")
	round(6)
	before := settled(first)
	round(20)
	after := settled(first)
	t.Logf("before %+v, after %+v", before, after)
	// Heaps double before they are collected.
	assert.Assert(t, after.supervisorKiB < before.supervisorKiB+4<<10, "the supervisor has grown from %d to %d KiB", before.supervisorKiB, after.supervisorKiB)
	assert.Assert(t, after.agentKiB < before.agentKiB+8<<10, "the agent has grown from %d to %d KiB", before.agentKiB, after.agentKiB)
	assert.Assert(t, after.agentThreads < before.agentThreads+8, "the agent has %d threads, before %d", after.agentThreads, before.agentThreads)
	assert.Assert(t, len(e.Pod("watcher").Phases) < 30)
	assert.Equal(t, strings.Count(e.OK("list", "-q"), "\n"), 2)
}
