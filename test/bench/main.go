// Command bench measures runv, and runc beside it in the same run, and prints a
// table in Markdown. It needs root, bin/runv, the guest's files and runc.
//
//	make bench
//	go run ./test/bench -n 20
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/test/harness"
)

func main() {
	n := flag.Int("n", 10, "runs of each measurement")
	size := flag.Int("mb", 100, "MB through stdin and stdout")
	flag.Parse()
	if err := bench(*n, *size); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// speedUnit and bitUnit mark figures of which more is better.
const speedUnit = "MB/s"

// subject is a runtime under measurement.
type subject struct {
	name   string
	argv   []string // program and global flags
	bundle string
}

func bench(n, size int) (err error) {
	dir, err := os.MkdirTemp("", "runv-bench")
	if err != nil {
		return err
	}
	defer func() { err = firstError(err, os.RemoveAll(dir)) }()
	bundle := filepath.Join(dir, "bundle")
	if err := harness.WriteRootfs(filepath.Join(bundle, "rootfs")); err != nil {
		return err
	}
	bin := filepath.Join(harness.TreeRoot(), "bin", "runv")
	if out, err := exec.Command(bin, "spec", "--bundle", bundle).CombinedOutput(); err != nil {
		return fmt.Errorf("runv spec: %w: %s", err, out)
	}
	runv := subject{"runv", []string{bin, "--root", filepath.Join(dir, "runv")}, bundle}
	runc := subject{"runc", []string{"runc", "--root", filepath.Join(dir, "runc")}, bundle}

	printMachine(bin)
	t := &table{}
	if err := benchRun(t, runv, runc, n); err != nil {
		return err
	}
	if err := benchRunning(t, runv, runc, n, size); err != nil {
		return err
	}
	if err := benchNetwork(t, runv, runc, n); err != nil {
		return err
	}
	if err := benchFiles(t, runv, runc, dir, n); err != nil {
		return err
	}
	if err := edit(runv.bundle, "sleep", "100000"); err != nil {
		return err
	}
	if err := benchIdle(t, runv, n); err != nil {
		return err
	}
	t.print()
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func printMachine(bin string) {
	model := "unknown CPU"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.SplitSeq(string(data), "\n") {
			if name, ok := strings.CutPrefix(line, "model name\t: "); ok {
				model = name
				break
			}
		}
	}
	fmt.Printf("%s, %d CPUs, %s, %s\n\n", model, runtime.NumCPU(), firstLine("runc", "--version"), firstLine(bin, "--version"))
}

func firstLine(argv ...string) string {
	out, err := exec.Command(argv[0], argv[1:]...).Output()
	if err != nil {
		return argv[0] + ": " + err.Error()
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// benchRun measures a whole `run true`, alternating the runtimes.
func benchRun(t *table, runv, runc subject, n int) error {
	if err := edit(runv.bundle, "true"); err != nil {
		return err
	}
	var ours, theirs []float64
	for range n {
		for s, times := range map[*subject]*[]float64{&runv: &ours, &runc: &theirs} {
			began := time.Now()
			if err := s.run(nil, nil, "run", "--bundle", s.bundle, "bench"); err != nil {
				return err
			}
			*times = append(*times, ms(time.Since(began)))
		}
	}
	t.add("`run true`, cold: command to its exit", "ms", ours, theirs)
	return nil
}

// benchRunning measures what happens in a running container.
func benchRunning(t *table, runv, runc subject, n, size int) error {
	if err := edit(runv.bundle, "sleep", "100000"); err != nil {
		return err
	}
	type figures struct{ exec, fork, second, out, in []float64 }
	var got [2]figures
	for i, s := range []subject{runv, runc} {
		f := &got[i]
		err := s.with(func() error {
			for range n {
				began := time.Now()
				if err := s.run(nil, nil, "exec", "bench", "true"); err != nil {
					return err
				}
				f.exec = append(f.exec, ms(time.Since(began)))
				fork, err := s.fork()
				if err != nil {
					return err
				}
				f.fork = append(f.fork, fork)
				second, err := s.second("bench")
				if err != nil {
					return err
				}
				f.second = append(f.second, second)
			}
			for range n {
				speed, err := s.output(size)
				if err != nil {
					return err
				}
				f.out = append(f.out, speed)
				if speed, err = s.input(size); err != nil {
					return err
				}
				f.in = append(f.in, speed)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	t.add("`exec true`", "ms", got[0].exec, got[1].exec)
	t.add("fork and execve of `true` by a shell in it", "ms", got[0].fork, got[1].fork)
	t.add("`run true` in the pod of a container that runs", "ms", got[0].second, got[1].second)
	t.add("stdout of `exec`", speedUnit, got[0].out, got[1].out)
	t.add("stdin of `exec`", speedUnit, got[0].in, got[1].in)
	return nil
}

// benchIdle measures the phases of a start and the memory of an idle container. runc has
// neither: nothing of it is left when the container runs.
func benchIdle(t *table, runv subject, n int) error {
	phases := make(map[string][]float64)
	var order []string
	pss := make(map[string][]float64)
	for range n {
		err := runv.with(func() error {
			var state struct {
				PID int `json:"pid"`
			}
			out, err := exec.Command(runv.argv[0], append(runv.argv[1:], "state", "bench")...).Output()
			if err != nil {
				return err
			}
			if err := json.Unmarshal(out, &state); err != nil {
				return err
			}
			pod, err := readPod(runv)
			if err != nil {
				return err
			}
			for _, p := range pod.Phases {
				if phases[p.Name] == nil {
					order = append(order, p.Name)
				}
				phases[p.Name] = append(phases[p.Name], p.MS)
			}
			pids := map[string][]int{"supervisor": {pod.Supervisor.PID}, "stand-in": {state.PID}, "QEMU": {pod.VM[0].PID}, "share server": {pod.VM[1].PID}}
			for name, list := range pids {
				var sum float64
				for _, pid := range list {
					mb, err := readPSS(pid)
					if err != nil {
						return err
					}
					sum += mb
				}
				pss[name] = append(pss[name], sum)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, name := range order {
		t.add("start phase: "+strings.TrimSuffix(name, " bench"), "ms", phases[name], nil)
	}
	for _, name := range []string{"QEMU", "share server", "supervisor", "stand-in"} {
		t.add("memory when idle (PSS): "+name, "MB", pss[name], nil)
	}
	return nil
}

// run runs a command of the runtime.
func (s subject) run(stdin io.Reader, stdout io.Writer, args ...string) error {
	cmd := exec.Command(s.argv[0], append(s.argv[1:], args...)...)
	var errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, &errs
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", s.name, strings.Join(args, " "), err, errs.String())
	}
	return nil
}

// with runs do while a container runs, detached and without stdio.
func (s subject) with(do func() error) (err error) {
	const id = "bench"
	cmd := exec.Command(s.argv[0], append(s.argv[1:], "run", "--detach", "--bundle", s.bundle, id)...)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s run --detach: %w", s.name, err)
	}
	defer func() { err = firstError(err, s.run(nil, nil, "delete", "--force", id)) }()
	return do()
}

// second measures the whole life of a second container in a pod, in milliseconds.
func (s subject) second(first string) (float64, error) {
	out, err := exec.Command(s.argv[0], append(s.argv[1:], "state", first)...).Output()
	if err != nil {
		return 0, fmt.Errorf("%s state: %w", s.name, err)
	}
	var state specs.State
	if err := json.Unmarshal(out, &state); err != nil {
		return 0, err
	}
	bundle := s.bundle + "-second"
	defer os.RemoveAll(bundle)
	if err := joining(s.bundle, bundle, state.Pid); err != nil {
		return 0, err
	}
	began := time.Now()
	err = s.run(nil, nil, "run", "--bundle", bundle, "second")
	return ms(time.Since(began)), err
}

// joining makes a bundle that shares a pod's namespaces with the process, and another's root file system.
func joining(from, to string, pid int) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	s, err := readSpec(from)
	if err != nil {
		return err
	}
	s.Root.Path = filepath.Join(from, "rootfs")
	s.Process.Args, s.Hostname = []string{"true"}, ""
	for i := range s.Linux.Namespaces {
		ns := &s.Linux.Namespaces[i]
		if file := map[specs.LinuxNamespaceType]string{"network": "net", "ipc": "ipc", "uts": "uts"}[ns.Type]; file != "" {
			ns.Path = fmt.Sprintf("/proc/%d/ns/%s", pid, file)
		}
	}
	return writeSpec(to, s)
}

// fork measures what a program costs that a shell in the container starts, in milliseconds: the
// least that an exec could take.
func (s subject) fork() (float64, error) {
	const rounds = 50
	shell := func(n int) (time.Duration, error) {
		began := time.Now()
		loop := fmt.Sprintf("i=0; while [ $i -lt %d ]; do /bin/true; i=$((i+1)); done", n)
		err := s.run(nil, nil, "exec", "bench", "sh", "-c", loop)
		return time.Since(began), err
	}
	none, err := shell(0)
	if err != nil {
		return 0, err
	}
	all, err := shell(rounds)
	return ms(all-none) / rounds, err
}

// output measures stdout in MB/s: from the first byte to the last.
func (s subject) output(mb int) (float64, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	done := make(chan error, 1)
	go func() {
		err := s.run(nil, w, "exec", "bench", "dd", "if=/dev/zero", "bs=65536", "count="+strconv.Itoa(mb*16), "status=none")
		done <- firstError(err, w.Close())
	}()
	if _, err := r.Read(make([]byte, 1)); err != nil {
		return 0, err
	}
	began := time.Now()
	got, err := io.Copy(io.Discard, r)
	took := time.Since(began)
	if err := firstError(err, <-done); err != nil {
		return 0, err
	}
	if want := int64(mb)<<20 - 1; got != want {
		return 0, fmt.Errorf("%s: %d bytes of %d arrived", s.name, got, want)
	}
	return float64(mb) / took.Seconds(), nil
}

// input measures stdin in MB/s, up to the process's exit and less the time of an
// exec without input.
func (s subject) input(mb int) (float64, error) {
	began := time.Now()
	if err := s.run(bytes.NewReader(nil), nil, "exec", "bench", "dd", "of=/dev/null", "bs=65536", "status=none"); err != nil {
		return 0, err
	}
	empty := time.Since(began)
	began = time.Now()
	zeros := io.LimitReader(zero{}, int64(mb)<<20)
	if err := s.run(zeros, nil, "exec", "bench", "dd", "of=/dev/null", "bs=65536", "status=none"); err != nil {
		return 0, err
	}
	return float64(mb) / (time.Since(began) - empty).Seconds(), nil
}

type zero struct{}

func (zero) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// edit sets the process of a bundle.
func edit(bundle string, args ...string) error {
	return editSpec(bundle, func(s *specs.Spec) { s.Process.Args = args })
}

func editSpec(bundle string, change func(s *specs.Spec)) error {
	s, err := readSpec(bundle)
	if err != nil {
		return err
	}
	s.Process.Terminal = false
	change(&s)
	return writeSpec(bundle, s)
}

func readSpec(bundle string) (s specs.Spec, err error) {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	return s, err
}

func writeSpec(bundle string, s specs.Spec) error {
	data, err := json.Marshal(&s)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600)
}

func readPod(s subject) (pod harness.Pod, err error) {
	paths, err := filepath.Glob(filepath.Join(s.argv[2], "pods", "*", "pod.json"))
	if err != nil || len(paths) != 1 {
		return pod, fmt.Errorf("find the pod: %w, %d found", err, len(paths))
	}
	data, err := os.ReadFile(paths[0])
	if err != nil {
		return pod, err
	}
	return pod, json.Unmarshal(data, &pod)
}

// readPSS is a process's proportional set size in MB.
func readPSS(pid int) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss:" {
			kb, err := strconv.ParseFloat(f[1], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("no Pss of process %d", pid)
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// table collects rows and prints them aligned.
type table struct{ rows [][]string }

// add adds a row: median and best of each runtime, which is the lowest but for speeds.
func (t *table) add(what, unit string, ours, theirs []float64) {
	best := slices.Min[[]float64]
	if unit == speedUnit || unit == bitUnit {
		best = slices.Max[[]float64]
	}
	cell := func(v []float64) string { return format(median(v)) + " (" + format(best(v)) + ")" }
	row := []string{what, unit, cell(ours), "", ""}
	if theirs != nil {
		row[3], row[4] = cell(theirs), format(median(ours)/median(theirs))
	}
	t.rows = append(t.rows, row)
}

func (t *table) print() {
	head := []string{"what", "unit", "runv median (best)", "runc median (best)", "runv / runc"}
	rows := append([][]string{head}, t.rows...)
	width := make([]int, len(head))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], len(cell))
		}
	}
	for i, row := range rows {
		for j, cell := range row {
			fmt.Printf("| %-*s ", width[j], cell)
		}
		fmt.Println("|")
		if i == 0 {
			for _, w := range width {
				fmt.Print("|" + strings.Repeat("-", w+2))
			}
			fmt.Println("|")
		}
	}
}

func format(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}
