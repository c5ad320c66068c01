package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// inNetNS makes a container, which may send pings, live in a network namespace.
func inNetNS(path string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		harness.MayPing(s)
		for i := range s.Linux.Namespaces {
			if s.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				s.Linux.Namespaces[i].Path = path
			}
		}
	}
}

// networked is a container with an interface whose other end is in a namespace that stands for the world.
type networked struct {
	*harness.Env
	t          *testing.T
	pod, world *harness.NetNS
}

func newNetworked(t *testing.T, args ...string) *networked {
	t.Helper()
	return newNetworkedIn(t, harness.New(t), args...)
}

func newNetworkedIn(t *testing.T, e *harness.Env, args ...string) *networked {
	t.Helper()
	n := &networked{e, t, harness.NewNetNS(t), harness.NewNetNS(t)}
	n.pod.Veth("eth0", []string{"10.9.0.2/24", "fd09::2/64"}, n.world, "world0", []string{"10.9.0.1/24", "fd09::1/64"})
	n.pod.AddRoute("", "10.9.0.1")
	n.pod.AddRoute("", "fd09::1")
	if len(args) == 0 {
		args = []string{"sleep", "1000"}
	}
	n.OK("run", "--detach", "--bundle", n.Bundle(args, inNetNS(n.pod.Path)), "web")
	return n
}

// sh runs a script in the container.
func (n *networked) sh(script string) string {
	n.t.Helper()
	return n.OK("exec", "web", "sh", "-c", script)
}

// awaitOutput waits until a script in the container tells what it should.
func (n *networked) awaitOutput(script string, ok func(out string) bool) {
	n.t.Helper()
	out := ""
	defer func() {
		if n.t.Failed() {
			n.t.Logf("%s:\n%s", script, out)
		}
	}()
	harness.Eventually(n.t, "the guest follows: "+script, func() bool {
		r := n.Run("exec", "web", "sh", "-c", script)
		out = r.Stdout + r.Stderr
		return ok(out)
	})
}

func has(text string) func(string) bool {
	return func(out string) bool { return strings.Contains(out, text) }
}

func lacks(text string) func(string) bool {
	return func(out string) bool { return !strings.Contains(out, text) }
}

// TestNetwork uses one container for all that does not end it.
func TestNetwork(t *testing.T) {
	n := newNetworked(t, "sh", "-c", "ip addr show eth0 >/tmp/first; mv /tmp/first /tmp/told; exec sleep 1000")

	// All is there before the program starts.
	var first string
	n.awaitOutput("cat /tmp/told", func(out string) bool { first = out; return !strings.Contains(out, "No such file") })
	for _, want := range []string{"inet 10.9.0.2/24", "inet6 fd09::2/64", n.pod.Link("eth0").Attrs().HardwareAddr.String(), "mtu 1500", "UP"} {
		assert.Assert(t, strings.Contains(first, want), "%s: %s", want, first)
	}
	assert.Equal(t, n.sh("ls /sys/class/net"), "eth0\nlo\n")
	assert.Assert(t, has("default via 10.9.0.1 dev eth0")(n.sh("ip route")))
	assert.Assert(t, has("default via fd09::1 dev eth0")(n.sh("ip -6 route")))

	t.Run("packets", func(t *testing.T) {
		n.sh("ping -c 1 -W 5 10.9.0.1 && ping -c 1 -W 5 fd09::1")
		n.sh("nc -l -p 80 -e cat >/dev/null 2>&1 & nc -l -p 81 -e cat >/dev/null 2>&1 &")
		for _, addr := range []string{"10.9.0.2:80", "[fd09::2]:81"} {
			var conn net.Conn
			harness.Eventually(t, "the server listens", func() bool {
				return n.world.Do(func() (err error) { conn, err = net.Dial("tcp", addr); return err }) == nil
			})
			text := strings.Repeat("x", 1<<20)
			go func() { _, _ = io.WriteString(conn, text) }()
			got, err := io.ReadAll(io.LimitReader(conn, int64(len(text))))
			assert.NilError(t, err)
			assert.Equal(t, string(got), text)
			assert.NilError(t, conn.Close())
		}
	})

	t.Run("changes are followed", func(t *testing.T) {
		n.pod.Veth("eth1", []string{"10.10.0.2/24"}, n.world, "world1", []string{"10.10.0.1/24"})
		n.awaitOutput("ip addr", has("inet 10.10.0.2/24"))
		n.sh("ping -c 1 -W 5 10.10.0.1")

		n.pod.AddAddr("eth1", "10.10.0.3/24")
		n.awaitOutput("ip addr show eth1", has("inet 10.10.0.3/24"))
		addr, err := netlink.ParseAddr("10.10.0.3/24")
		assert.NilError(t, err)
		assert.NilError(t, n.pod.AddrDel(n.pod.Link("eth1"), addr))
		n.awaitOutput("ip addr show eth1", lacks("10.10.0.3"))

		route := n.pod.AddRoute("10.20.0.0/16", "10.10.0.1")
		n.awaitOutput("ip route", has("10.20.0.0/16 via 10.10.0.1 dev eth1"))
		assert.NilError(t, n.pod.RouteDel(route))
		n.awaitOutput("ip route", lacks("10.20.0.0/16"))

		assert.NilError(t, n.pod.LinkSetMTU(n.pod.Link("eth1"), 1300))
		n.awaitOutput("ip link show eth1", has("mtu 1300"))
		assert.NilError(t, n.pod.LinkSetDown(n.pod.Link("eth1")))
		n.awaitOutput("ip link show eth1", lacks(",UP"))
		assert.NilError(t, n.pod.LinkSetName(n.pod.Link("eth1"), "lan"))
		n.awaitOutput("ls /sys/class/net", func(out string) bool { return out == "eth0\nlan\nlo\n" })
		assert.NilError(t, n.pod.LinkDel(n.pod.Link("lan")))
		n.awaitOutput("ls /sys/class/net", func(out string) bool { return out == "eth0\nlo\n" })
	})

	t.Run("interfaces come and go in bursts", func(t *testing.T) {
		var names []string
		for i := range 8 {
			name := fmt.Sprintf("burst%d", i)
			names = append(names, name)
			n.pod.Veth(name, []string{fmt.Sprintf("10.30.%d.2/24", i)}, n.world, "w"+name, []string{fmt.Sprintf("10.30.%d.1/24", i)})
		}
		n.awaitOutput("ip addr", func(out string) bool { return strings.Count(out, "inet 10.30.") == len(names) })
		for i := range names {
			n.sh(fmt.Sprintf("ping -c 1 -W 5 10.30.%d.1", i))
		}
		for _, name := range names {
			assert.NilError(t, n.pod.LinkDel(n.pod.Link(name)))
		}
		n.awaitOutput("ls /sys/class/net", func(out string) bool { return out == "eth0\nlo\n" })
	})

	n.OK("delete", "--force", "web")
	assert.DeepEqual(t, n.pod.Traces(), []string(nil))
}

// TestNameServer lets a container ask a name server that listens as Docker's does.
func TestNameServer(t *testing.T) {
	n := newNetworked(t)
	serve := func() (udp net.PacketConn) {
		assert.NilError(t, n.pod.Do(func() (err error) { udp, err = net.ListenPacket("udp4", "127.0.0.11:53"); return err }))
		go func() {
			buf := make([]byte, 1500)
			for {
				size, from, err := udp.ReadFrom(buf)
				if err != nil {
					return
				}
				var m dnsmessage.Message
				if m.Unpack(buf[:size]) != nil || len(m.Questions) == 0 {
					continue
				}
				m.Response, m.Additionals = true, nil
				if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
					m.Answers = []dnsmessage.Resource{{
						Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
						Body:   &dnsmessage.AResource{A: [4]byte{10, 9, 0, 77}},
					}}
				}
				answer, _ := m.Pack()
				_, _ = udp.WriteTo(answer, from)
			}
		}()
		return udp
	}
	server := serve()
	defer server.Close()
	// It is noticed with the next change of the network, with which it comes.
	n.pod.AddAddr("eth0", "10.9.0.3/24")
	n.awaitOutput("nslookup db.test 127.0.0.11", has("10.9.0.77"))
	assert.Assert(t, has("10.9.0.77")(n.OK("exec", "web", "nslookup", "other.test", "127.0.0.11")))
	// Its port is free.
	assert.Equal(t, n.sh("nc -l -p 53 -e cat >/dev/null & until echo hello | nc 127.0.0.1 53 2>/dev/null; do :; done"), "hello\n")
	n.OK("delete", "--force", "web")

	// One that is there from the beginning is reached by the first program.
	n.OK("run", "--detach", "--bundle", n.Bundle([]string{"sh", "-c", "nslookup db.test 127.0.0.11 >/tmp/out 2>&1; exec sleep 1000"}, inNetNS(n.pod.Path)), "web")
	n.awaitOutput("cat /tmp/out", has("10.9.0.77"))
}

// TestKillsLeaveNoTraces kills what serves a network; delete removes what is left in the namespace.
func TestKillsLeaveNoTraces(t *testing.T) {
	n := newNetworked(t)
	assert.Assert(t, len(n.pod.Traces()) > 0)
	assert.NilError(t, syscall.Kill(n.Pod("web").Supervisor.PID, syscall.SIGKILL))
	n.OK("delete", "--force", "web")
	assert.DeepEqual(t, n.pod.Traces(), []string(nil))

	// The interface is the namespace's again.
	l := n.pod.Link("eth0")
	assert.Assert(t, l != nil)
	assert.NilError(t, n.pod.Do(func() error {
		conn, err := (&net.Dialer{}).DialContext(context.Background(), "udp", "10.9.0.1:9")
		if err == nil {
			_ = conn.Close()
		}
		return err
	}))
	// And can be used again.
	n.OK("run", "--detach", "--bundle", n.Bundle([]string{"sleep", "1000"}, inNetNS(n.pod.Path)), "web")
	n.sh("ping -c 1 -W 5 10.9.0.1")
	n.OK("delete", "--force", "web")
	assert.DeepEqual(t, n.pod.Traces(), []string(nil))
}

// TestHookBringsTheInterface gives a container, which has a user namespace, its interface as Docker does: by a
// hook that finds the namespace through the pid in its state.
func TestHookBringsTheInterface(t *testing.T) {
	e := harness.New(t)
	world := harness.NewNetNS(t)
	bundle := e.Bundle([]string{"sleep", "1000"})
	inUserNS(t, e, bundle)
	script := filepath.Join(e.Dir, "hook")
	assert.NilError(t, os.WriteFile(script, []byte(fmt.Sprintf(`#!/bin/sh
set -e
pid=$(sed 's/.*"pid": *\([0-9]*\).*/\1/')
nsenter --net=%s ip link add hook0 type veth peer name eth0 netns $pid
nsenter --net=%[1]s ip addr add 10.9.0.1/24 dev hook0
nsenter --net=%[1]s ip link set hook0 up
nsenter --net=/proc/$pid/ns/net ip addr add 10.9.0.2/24 dev eth0
nsenter --net=/proc/$pid/ns/net ip link set eth0 up
`, world.Path)), 0o755))
	e.EditSpec(bundle, func(s *specs.Spec) {
		harness.MayPing(s)
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: script, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}}}
	})
	e.OK("run", "--detach", "--bundle", bundle, "web")
	sh := func(script string) string { return e.OK("exec", "web", "sh", "-c", script) }
	assert.Equal(t, sh("ls /sys/class/net"), "eth0\nlo\n")
	sh("ping -c 1 -W 5 10.9.0.1")
	e.OK("delete", "--force", "web")
	harness.Eventually(t, "the namespace goes with its container", func() bool {
		_, err := world.LinkByName("hook0")
		return err != nil
	})
}

// TestUserNetwork gives a container that asks for it a network like the host's, without a namespace of anybody else's.
func TestUserNetwork(t *testing.T) {
	e := harness.New(t)
	host, world := harness.NewNetNS(t), harness.NewNetNS(t)
	host.Veth("up0", []string{"10.9.0.2/24"}, world, "world0", []string{"10.9.0.1/24", "10.9.0.7/24"})
	host.AddRoute("", "10.9.0.1")
	asks := func(value string) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Annotations = map[string]string{"dev.runv.network": value} }
	}
	bundle := e.Bundle([]string{"sleep", "1000"}, asks("user"))
	onHost := func(args ...string) (r harness.Result) {
		assert.NilError(t, host.Do(func() error { r = e.Run(args...); return nil }))
		return r
	}
	r := onHost("run", "--detach", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 1)
	assert.Equal(t, r.Stderr, "runv: create web: annotations[dev.runv.network]: no pasta is configured\n")

	e.Setenv = map[string]string{"RUNV_PASTA": "pasta"}
	r = onHost("run", "--bundle", e.Bundle([]string{"true"}, asks("mine")), "web")
	assert.Assert(t, strings.Contains(r.Stderr, `annotations[dev.runv.network]: "mine" is not "user"`), r.Stderr)
	r = onHost("run", "--detach", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 0, r.Stderr)
	var server net.Listener
	assert.NilError(t, world.Do(func() (err error) { server, err = net.Listen("tcp", "10.9.0.7:80"); return err }))
	defer server.Close()
	go func() {
		for {
			conn, err := server.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "hello\n")
			_ = conn.Close()
		}
	}()
	// This pasta does not always pass on that the connection has ended.
	assert.Equal(t, e.OK("exec", "web", "sh", "-c", "timeout 3 nc 10.9.0.7 80; true"), "hello\n")
	assert.Assert(t, has("inet 10.9.0.2/24")(e.OK("exec", "web", "ip", "addr", "show", "up0")))
	e.OK("delete", "--force", "web")
	assert.Equal(t, len(host.Traces()), 0)

	// It dies with the supervisor, however that dies.
	r = onHost("run", "--detach", "--bundle", bundle, "web")
	assert.Equal(t, r.Code, 0, r.Stderr)
	assert.NilError(t, syscall.Kill(e.Pod("web").Supervisor.PID, syscall.SIGKILL))
	e.OK("delete", "--force", "web")
	e.CheckNothingLeft()

	// Without the annotation there is none.
	r = onHost("run", "--bundle", e.Bundle([]string{"ls", "/sys/class/net"}), "web")
	assert.Equal(t, r.Stdout, "lo\n", r.Stderr)
}

// TestRoutesAreEqual lets ip(8) print the routes, rules and addresses of a network namespace on the host and in the container
// that lives in it: the text must be the same.
func TestRoutesAreEqual(t *testing.T) {
	ip, err := exec.LookPath("ip")
	assert.NilError(t, err)
	e := harness.New(t)
	pod, world := harness.NewNetNS(t), harness.NewNetNS(t)
	pod.Veth("eth0", []string{"10.9.0.2/24", "fd09::2/64"}, world, "world0", []string{"10.9.0.1/24", "fd09::1/64"})
	onHost := func(command string) string {
		t.Helper()
		out, err := exec.Command("nsenter", append([]string{"--net=" + pod.Path, ip}, strings.Fields(command)...)...).CombinedOutput()
		assert.NilError(t, err, "ip %s: %s", command, out)
		return string(out)
	}
	for command := range strings.Lines(`addr add 10.11.0.2/24 dev eth0 label eth0:x metric 77 scope link
		addr add fd11::2/64 dev eth0 metric 88
		addr add fd12::2/64 dev eth0 preferred_lft 0
		route add 10.40.1.0/24 via 10.9.0.1 mtu lock 1400 advmss 1300 window 4000 rtt 30ms rttvar 20ms ssthresh 7 cwnd lock 9
		route add 10.40.2.0/24 via 10.9.0.1 reordering 5 hoplimit 33 initcwnd 20 initrwnd 30 features ecn quickack 1
		route add 10.40.3.0/24 via 10.9.0.1 rto_min 200ms congctl reno fastopen_no_cookie 1
		route add 10.40.4.0/24 dev eth0 scope link src 10.9.0.2 proto static metric 7
		route add 10.40.5.0/24 via 192.0.2.1 dev eth0 onlink
		route add 10.40.6.0/24 tos 0x10 realms 3/4 via 10.9.0.1 table 1000
		route add 10.40.7.0/24 mtu 1300 nexthop via 10.9.0.1 weight 3 nexthop via 192.0.2.1 dev eth0 onlink weight 250
		route add 10.40.8.0/24 via inet6 fd09::1
		route add blackhole 10.40.9.0/24 metric 5
		route add unreachable 10.40.10.0/24
		route add prohibit 10.40.11.0/24
		route add throw 10.40.12.0/24 table 1000
		route add local 10.40.13.0/24 dev lo
		route add broadcast 10.40.14.255 dev eth0 table local
		route add multicast 239.1.0.0/16 dev eth0
		route add fd40:1::/64 via fd09::1 pref high metric 9 mtu lock 1380 hoplimit 44 initcwnd 12 congctl cubic
		route add fd40:2::/64 nexthop via fd09::1 weight 3 nexthop via fe80::1 dev eth0 weight 5
		route add fd40:3::/64 dev eth0 pref low
		route add fd40:4::/64 from fd11::/64 via fd09::1
		route add blackhole fd40:5::/64
		route add anycast fd40:6::1/128 dev eth0
		nexthop add id 7 via 10.9.0.1 dev eth0
		nexthop add id 8 via 10.9.0.9 dev eth0
		nexthop add id 9 group 7,5/8
		route add 10.40.15.0/24 nhid 9
		rule add from 10.9.0.2 iif eth0 tos 0x10 fwmark 0x1/0xff table 1000 priority 10
		neigh add 10.9.0.77 lladdr 02:00:00:00:00:77 dev eth0
		neigh add proxy 10.9.0.78 dev eth0`) {
		onHost(strings.TrimSpace(command))
	}
	bundle := e.Bundle([]string{"sleep", "1000"}, inNetNS(pod.Path), func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/usr", Type: "bind", Source: "/usr", Options: []string{"rbind", "ro"}})
	})
	for _, name := range []string{"lib", "lib64"} {
		assert.NilError(t, os.Symlink("usr/"+name, filepath.Join(bundle, "rootfs", name)))
	}
	ip, err = filepath.EvalSymlinks(ip)
	assert.NilError(t, err)
	e.OK("run", "--detach", "--bundle", bundle, "web")

	// What is the kernel's word for the state of the moment, or a handle of the host's for what is told in full; and that the
	// guest does not look for duplicates of addresses, since the host has.
	moment := regexp.MustCompile(` ?(nhid \d+|expires \d+sec|linkdown|error -?\d+|qlen \d+|REACHABLE|STALE|DELAY|PROBE|nodad)\b|(?m)^ +(link/|valid_lft).*$`)
	normal := func(text string) string {
		var lines []string
		for line := range strings.Lines(moment.ReplaceAllString(text, "")) {
			if !strings.Contains(line, "fe80::") && !strings.HasPrefix(line, "multicast ff00::/8") {
				lines = append(lines, strings.Join(strings.Fields(line), " "))
			}
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	for _, command := range []string{
		"route show table all", "-6 route show table all", "rule show", "-6 rule show", "neigh show nud permanent", "neigh show proxy",
		"-o addr show dev eth0",
	} {
		want, got := normal(onHost(command)), ""
		for deadline := time.Now().Add(20 * time.Second); got != want && time.Now().Before(deadline); {
			got = normal(e.OK("exec", "web", "sh", "-c", ip+" "+command))
		}
		assert.Check(t, cmp.Equal(got, want), "ip %s", command)
	}
}
