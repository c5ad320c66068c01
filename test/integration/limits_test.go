package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// provenLimits prove the rows of README's table of limits, by name. Each must fail once its limit has gone, so that the row goes, too.
// They share containers, which start when the first needs them.
var provenLimits = map[string]func(*testing.T, *limited){
	"tcg": func(t *testing.T, l *limited) {
		var f struct{ Annotations map[string]string }
		assert.NilError(t, json.Unmarshal([]byte(l.OK("features")), &f))
		if f.Annotations["dev.runv.accel"] != "tcg" {
			t.Skip("this machine has hardware virtualization")
		}
		assert.Assert(t, cmp.Contains(f.Annotations["dev.runv.accel-note"], "no security boundary"))
		l.Setenv = map[string]string{"RUNV_ACCEL": "kvm"}
		defer func() { l.Setenv = nil }()
		l.refuses(t, "kvm")
	},
	"qemu-view": func(t *testing.T, l *limited) {
		l.box(t)
		qemu := fmt.Sprintf("/proc/%d", l.Pod("box").VM[0].PID)
		here, err := os.Stat("/etc/passwd")
		assert.NilError(t, err)
		there, err := os.Stat(qemu + "/root/etc/passwd")
		assert.NilError(t, err)
		assert.Assert(t, os.SameFile(here, there))
		ours, err := os.Readlink("/proc/self/ns/pid")
		assert.NilError(t, err)
		theirs, err := os.Readlink(qemu + "/ns/pid")
		assert.NilError(t, err)
		assert.Equal(t, theirs, ours)
	},
	"pod-kernel": func(t *testing.T, l *limited) {
		boot := l.box(t)("cat /proc/sys/kernel/random/boot_id")
		assert.Equal(t, l.OK("run", "--bundle", l.Bundle([]string{"cat", "/proc/sys/kernel/random/boot_id"}, sharing(l.State("box").Pid, specs.IPCNamespace)), "other"), boot)
		l.OK("delete", "--force", "other")
	},
	"namespace-host": func(t *testing.T, l *limited) {
		l.refuses(t, "/proc/1/ns/ipc is not a namespace of a container of runv", sharing(1, specs.IPCNamespace))
	},
	"namespace-mount": func(t *testing.T, l *limited) {
		l.refuses(t, "a mount namespace cannot be joined", func(s *specs.Spec) {
			for i := range s.Linux.Namespaces {
				if s.Linux.Namespaces[i].Type == specs.MountNamespace {
					s.Linux.Namespaces[i].Path = "/proc/1/ns/mnt"
				}
			}
		})
	},
	"network-host": func(t *testing.T, l *limited) {
		l.refuses(t, "cannot use the host's network", func(s *specs.Spec) {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.NetworkNamespace })
		})
	},
	"network-by-hand": func(t *testing.T, l *limited) {
		assert.Equal(t, l.box(t)("ls /sys/class/net"), "lo\n")
	},
	"network-not-ethernet": func(t *testing.T, l *limited) {
		n := l.net(t)
		assert.NilError(t, n.pod.Do(func() error { // it is made in the thread's namespace, whose ever the handle is
			return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN})
		}))
		assert.NilError(t, n.pod.LinkSetUp(n.pod.Link("tun0")))
		l.awaitChange()
		assert.Assert(t, lacks("tun0")(n.sh("ls /sys/class/net")))
	},
	"network-stacked": func(t *testing.T, l *limited) {
		n := l.net(t)
		assert.NilError(t, n.pod.LinkAdd(&netlink.Macvlan{
			LinkAttrs: netlink.LinkAttrs{Name: "above0", ParentIndex: n.pod.Link("eth0").Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE,
		}))
		assert.NilError(t, n.pod.LinkSetUp(n.pod.Link("above0")))
		l.awaitChange()
		assert.Assert(t, lacks("above0")(n.sh("ls /sys/class/net")))
	},
	"network-netfilter": func(t *testing.T, l *limited) {
		n := l.net(t)
		for _, chain := range []string{"INPUT", "OUTPUT", "FORWARD"} {
			assert.NilError(t, n.pod.Do(func() error { return exec.Command("iptables", "-w", "-I", chain, "-j", "DROP").Run() }))
		}
		n.sh("ping -c 1 -W 5 10.9.0.1")
	},
	"hook-path": func(t *testing.T, l *limited) {
		program := filepath.Join(l.Dir, "hook")
		assert.NilError(t, os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755))
		l.refuses(t, "no such file", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: program}}}
		})
	},
	"userns-ids": func(t *testing.T, l *limited) {
		bundle := l.Bundle([]string{"sleep", "1000"})
		inUserNS(t, l.Env, bundle)
		l.OK("run", "--detach", "--bundle", bundle, "mapped")
		defer l.OK("delete", "--force", "mapped")
		assert.Assert(t, cmp.Contains(l.OK("exec", "mapped", "cat", "/proc/self/uid_map"), fmt.Sprint(mappedUID)))
		theirs, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", l.State("mapped").Pid))
		assert.NilError(t, err)
		assert.Assert(t, !strings.Contains(string(theirs), fmt.Sprint(mappedUID)), "%s", theirs)
	},
	"time-past": func(t *testing.T, l *limited) {
		l.refuses(t, "linux.timeOffsets", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: -3600}}
		})
	},
	"seccomp-notify": func(t *testing.T, l *limited) {
		l.refuses(t, "linux.seccomp.syscalls[0].action", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{syscalls(specs.ActNotify, "mkdir")}}
		})
	},
	"preserve-fds": func(t *testing.T, l *limited) {
		r := l.Run("run", "--preserve-fds", "1", "--bundle", l.Bundle([]string{"true"}), "refused")
		assert.Assert(t, r.Code != 0)
		assert.Assert(t, cmp.Contains(r.Stderr, "preserve-fds"))
	},
	"bind-special": func(t *testing.T, l *limited) {
		sh := l.box(t)
		assert.Equal(t, sh("test -p /fifo && echo there"), "there\n")
		reader := l.Command("exec", "box", "sh", "-c", "echo opens; cat /fifo")
		out, err := reader.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, reader.Start())
		defer func() { _ = reader.Wait() }()
		_, err = out.Read(make([]byte, 1))
		assert.NilError(t, err)
		harness.Eventually(t, "the reader waits for a writer", func() bool {
			return l.Run("exec", "box", "sh", "-c", "grep -q State:.S /proc/$(pidof cat)/status").Code == 0
		})
		_, err = unix.Open(filepath.Join(l.Dir, "fifo"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		assert.Equal(t, err, unix.ENXIO, "nobody reads it on the host")
		sh("kill -9 $(pidof cat)")
	},
	"propagation": func(t *testing.T, l *limited) {
		r := l.Run("run", "--bundle", l.Bundle([]string{"true"}, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt", Source: l.Dir, Type: "bind", Options: []string{"rbind", "rshared"}})
		}), "warned")
		assert.Equal(t, r.Code, 0, r.Stderr)
		assert.Assert(t, cmp.Contains(r.Stderr, "rshared ends at the VM"))
	},
	"checkpoint": func(t *testing.T, l *limited) {
		l.box(t)
		for _, verb := range []string{"checkpoint", "restore"} {
			r := l.Run(verb, "box")
			assert.Assert(t, r.Code != 0)
			assert.Assert(t, cmp.Contains(r.Stderr, verb))
		}
	},
	"update-shrink": func(t *testing.T, l *limited) {
		sh := l.box(t)
		before := sh("grep MemTotal /proc/meminfo")
		l.OK("update", "--memory", "64M", "box")
		assert.Equal(t, sh("cat /sys/fs/cgroup/memory.max"), "67108864\n")
		assert.Equal(t, sh("grep MemTotal /proc/meminfo"), before)
	},
	"update-v1": func(t *testing.T, l *limited) {
		l.box(t)
		for flag, value := range map[string]string{"--cpu-rt-period": "1000", "--cpu-rt-runtime": "1000", "--l3-cache-schema": "L3:0=f", "--mem-bw-schema": "MB:0=10"} {
			r := l.Run("update", flag, value, "box")
			assert.Equal(t, r.Code, 1)
			assert.Assert(t, cmp.Contains(r.Stderr, flag))
		}
	},
	"device-limits": func(t *testing.T, l *limited) {
		l.refuses(t, "8:0", func(s *specs.Spec) {
			device := specs.LinuxThrottleDevice{Rate: 1 << 20}
			device.Major, device.Minor = 8, 0
			s.Linux.Resources.BlockIO = &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{device}}
		})
	},
	"cpuset": func(t *testing.T, l *limited) {
		l.OK("run", "--detach", "--bundle", l.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
			s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "0"}
		}), "first")
		defer l.OK("delete", "--force", "first")
		allowed := func(pid int) string {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			assert.NilError(t, err)
			return regexp.MustCompile(`Cpus_allowed_list:.*`).FindString(string(data))
		}
		assert.Assert(t, cmp.Contains(l.OK("exec", "first", "grep", "Cpus_allowed_list", "/proc/self/status"), "\t0\n"))
		if allowed(os.Getpid()) == "Cpus_allowed_list:\t0" {
			t.Skip("this machine has one CPU")
		}
		assert.Equal(t, allowed(l.Pod("first").VM[0].PID), allowed(os.Getpid()))
	},
	"host-pid": func(t *testing.T, l *limited) {
		l.box(t)
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", l.State("box").Pid))
		assert.NilError(t, err)
		assert.Assert(t, cmp.Contains(exe, "runv"))
	},
	"host-mounts": func(t *testing.T, l *limited) {
		l.box(t)("touch /scratch/file")
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/scratch", l.State("box").Pid))
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 0)
	},
	"root": func(t *testing.T, l *limited) {
		dir, err := os.MkdirTemp("", "limits") //nolint:usetesting // others than root must get there
		assert.NilError(t, err)
		defer os.RemoveAll(dir)
		program, bundle, state := filepath.Join(dir, "runv"), filepath.Join(dir, "bundle"), filepath.Join(dir, "state")
		data, err := os.ReadFile(l.Runv)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(program, data, 0o755))
		assert.NilError(t, os.CopyFS(bundle, os.DirFS(l.Bundle([]string{"true"}))))
		assert.NilError(t, os.Mkdir(state, 0o755))
		for _, path := range []string{dir, bundle, filepath.Join(bundle, "config.json")} {
			assert.NilError(t, os.Chmod(path, 0o755))
		}
		assert.NilError(t, os.Chown(state, 65534, 65534))
		cmd := exec.Command(program, "--root", state, "run", "--bundle", bundle, "refused")
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		r := harness.Finish(cmd)
		assert.Assert(t, r.Code != 0, "it ran")
		assert.Assert(t, cmp.Contains(r.Stderr, "not permitted"))
	},
	"x86-64": func(t *testing.T, _ *limited) {
		kernels, err := filepath.Glob(filepath.Join(harness.TreeRoot(), "image", "kernels", "*.toml"))
		assert.NilError(t, err)
		assert.Assert(t, len(kernels) > 0)
		for _, path := range kernels {
			data, err := os.ReadFile(path)
			assert.NilError(t, err)
			assert.Assert(t, cmp.Contains(string(data), `arch = "amd64"`))
		}
	},
	"shared-memory": func(t *testing.T, l *limited) {
		l.box(t)
		path := filepath.Join(l.Dir, "volume", "mapped")
		assert.NilError(t, os.WriteFile(path, []byte("1"+strings.Repeat(" ", 4095)), 0o666))
		cmd := l.Command("exec", "box", "/mapper", "/volume/mapped")
		in, err := cmd.StdinPipe()
		assert.NilError(t, err)
		out, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		var first, second string
		_, err = fmt.Fscan(out, &first)
		assert.NilError(t, err)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		assert.NilError(t, err)
		defer f.Close()
		_, err = f.WriteAt([]byte("2"), 0) // a process of the host that has mapped the file would have it at once
		assert.NilError(t, err)
		_, err = io.WriteString(in, "\n")
		assert.NilError(t, err)
		_, err = fmt.Fscan(out, &second)
		assert.NilError(t, err)
		assert.NilError(t, cmd.Wait())
		assert.Equal(t, first+second, "11")
	},
	"watches": func(t *testing.T, l *limited) {
		sh := l.box(t)
		out := make(chan string, 1)
		go func() { out <- l.Run("exec", "box", "/watcher", "/volume").Stdout }()
		harness.Eventually(t, "the watcher watches", func() bool { return strings.Contains(sh("cat /proc/[0-9]*/fdinfo/* 2>/dev/null; true"), "inotify wd") })
		assert.NilError(t, os.WriteFile(filepath.Join(l.Dir, "volume", "by-host"), nil, 0o666))
		sh("ls /volume/by-host; touch /volume/by-guest; touch /volume/end")
		assert.Check(t, !strings.Contains(<-out, "by-host"))
		sh("rm /volume/end")
	},
	"overlay-upper": func(t *testing.T, l *limited) {
		l.box(t)("mkdir /volume/lower /volume/upper /volume/work; chmod 777 /volume/*")
		overlay := func(options string) harness.Result {
			capabilities := []string{"--cap", "CAP_SYS_ADMIN", "--cap", "CAP_DAC_OVERRIDE", "--cap", "CAP_FOWNER", "--cap", "CAP_CHOWN"}
			return l.Run(append(append([]string{"exec"}, capabilities...), "box", "mount", "-t", "overlay", "overlay", "-o",
				options+"lowerdir=/volume/lower,upperdir=/volume/upper,workdir=/volume/work", "/mnt")...)
		}
		r := overlay("")
		assert.Check(t, r.Code != 0)
		assert.Check(t, cmp.Contains(r.Stderr, "Invalid argument"))
		r = overlay("userxattr,")
		assert.Check(t, cmp.Equal(r.Code, 0), r.Stderr)
	},
	"file-details": func(t *testing.T, l *limited) {
		out := l.box(t)(`cd /volume; dd if=/dev/zero of=file bs=4096 count=4 2>/dev/null
/usr/bin/stat -c "born %W" file; /usr/bin/fallocate --collapse-range --offset 0 --length 4096 file 2>&1; filefrag file 2>&1; true`)
		for _, want := range []string{"born 0\n", "fallocate failed: Operation not supported", "FIBMAP"} {
			assert.Check(t, cmp.Contains(out, want))
		}
	},
}

// TestReadmeLimits proves the rows of README's table of limits: each has a test, and each test a row.
func TestReadmeLimits(t *testing.T) {
	_, section, ok := strings.Cut(readme(t), "\n## Limits\n")
	assert.Assert(t, ok)
	section, _, _ = strings.Cut(section, "\n## ")
	section, _, _ = strings.Cut(section, "<!--") // the table of fields, which test/conformance checks
	l := &limited{Env: harness.New(t), t: t}
	rows := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\| (.*) \\|$").FindAllStringSubmatch(section, -1) {
		name := m[1]
		assert.Check(t, !rows[name], "two rows are named %s", name)
		assert.Check(t, cmp.Equal(strings.Count(m[2], " | "), 2), "%s: cells", name)
		rows[name] = true
		prove := provenLimits[name]
		if prove == nil {
			t.Errorf("no test proves the row %s", name)
			continue
		}
		t.Run(name, func(t *testing.T) { prove(t, l) })
	}
	for name := range provenLimits {
		assert.Check(t, rows[name], "README has no row %s", name)
	}
}

// limited is the container, and the one with a network, that proofs of limits share.
type limited struct {
	*harness.Env
	t         *testing.T // that lasts as long as the containers
	started   bool
	networked *networked
	changes   int
}

// box starts the container at the first call, and returns what runs scripts in it.
func (l *limited) box(t *testing.T) func(script string) string {
	t.Helper()
	if !l.started {
		l.started = true
		fifo := filepath.Join(l.Dir, "fifo")
		assert.NilError(t, unix.Mkfifo(fifo, 0o666))
		assert.NilError(t, os.Mkdir(filepath.Join(l.Dir, "volume"), 0o777))
		bundle := l.Bundle([]string{"sleep", "1000"}, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/volume", Source: filepath.Join(l.Dir, "volume"), Type: "bind", Options: []string{"bind"}},
				specs.Mount{Destination: "/fifo", Source: fifo, Type: "bind", Options: []string{"bind"}},
				specs.Mount{Destination: "/scratch", Source: "tmpfs", Type: "tmpfs"})
		})
		rootfs := filepath.Join(bundle, "rootfs")
		assert.NilError(t, os.Mkdir(filepath.Join(rootfs, "mnt"), 0o755))
		for _, program := range []string{"stat", "fallocate", "filefrag"} {
			path, err := exec.LookPath(program)
			assert.NilError(t, err)
			assert.NilError(t, os.RemoveAll(filepath.Join(rootfs, "bin", program))) // busybox's
			harness.CopyProgram(t, rootfs, path)
		}
		for _, program := range []string{"watcher", "mapper"} {
			out, err := exec.Command("go", "build", "-o", filepath.Join(rootfs, program), "runv/test/integration/"+program).CombinedOutput()
			assert.NilError(t, err, "%s", out)
		}
		l.OK("run", "--detach", "--bundle", bundle, "box")
	}
	return func(script string) string {
		t.Helper()
		return l.OK("exec", "box", "sh", "-c", script)
	}
}

// net is a container with an interface, started at the first call.
func (l *limited) net(t *testing.T) *networked {
	t.Helper()
	if l.networked == nil {
		l.networked = newNetworkedIn(l.t, l.Env)
	}
	return l.networked
}

// awaitChange makes a change in the namespace of net and waits until the guest has followed, and so all changes before it.
func (l *limited) awaitChange() {
	l.changes++
	address := fmt.Sprintf("10.9.0.%d/24", 100+l.changes)
	l.networked.pod.AddAddr("eth0", address)
	l.networked.awaitOutput("ip addr", has(address))
}

// refuses runs a bundle that the limit is about: it ends with an error that says so.
func (l *limited) refuses(t *testing.T, want string, edit ...func(*specs.Spec)) {
	t.Helper()
	r := l.Run("run", "--bundle", l.Bundle([]string{"true"}, edit...), "refused")
	assert.Assert(t, r.Code != 0, "it ran")
	assert.Assert(t, cmp.Contains(r.Stderr, want))
}
