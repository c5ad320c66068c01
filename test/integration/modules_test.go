package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// What a container may make the kernel do it can do without knowing of the modules that this needs.
func TestModulesOnDemand(t *testing.T) {
	e := harness.New(t)
	bundle := e.Bundle([]string{"sh", "-c", strings.Join([]string{
		"set -e",
		"ip link add d0 type dummy", "ip link add v0 type veth", "ip -o link show v0",
		"until iptables-legacy -nL >/dev/null 2>&1; do sleep 0.1; done", // its first module comes by itself, but late
		"for tables in iptables-nft ip6tables-nft iptables-legacy; do",
		"$tables -t nat -A POSTROUTING -o lo -j MASQUERADE",
		"$tables -A INPUT -m conntrack --ctstate ESTABLISHED -m comment --comment hello -j REJECT",
		"$tables -A OUTPUT -m owner --uid-owner 1 -p tcp -m multiport --dports 1,2 -j RETURN",
		"$tables -S",
		"$tables -t nat -S",
		"done",
	}, "\n")}, func(s *specs.Spec) {
		c := s.Process.Capabilities
		for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted} {
			*set = append(*set, "CAP_NET_ADMIN", "CAP_NET_RAW")
		}
		s.Process.Env = append(s.Process.Env, "XTABLES_LOCKFILE=/tmp/lock")
	})
	rootfs := filepath.Join(bundle, "rootfs")
	for _, program := range []string{"/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-legacy-multi"} {
		harness.CopyProgram(t, rootfs, program)
	}
	plugins, err := filepath.Glob("/usr/lib/x86_64-linux-gnu/xtables/*.so")
	assert.NilError(t, err)
	for _, plugin := range plugins {
		harness.CopyFile(t, rootfs, plugin)
	}
	for name, target := range map[string]string{
		"iptables-nft": "xtables-nft-multi", "ip6tables-nft": "xtables-nft-multi", "iptables-legacy": "xtables-legacy-multi",
	} {
		assert.NilError(t, os.Symlink("/usr/sbin/"+target, filepath.Join(rootfs, "bin", name)))
	}
	out := e.OK("run", "--bundle", bundle, "box")
	assert.Check(t, is.Contains(out, ": v0@"))
	assert.Check(t, is.Equal(strings.Count(out, "-A POSTROUTING -o lo -j MASQUERADE"), 3), out)
	assert.Check(t, is.Equal(strings.Count(out, "--comment hello -j REJECT"), 3), out)
}

// Containers that may make links, mount file systems and use devices get what the kernel of one machine would have: the kinds
// of links and queues, file systems, ciphers, and the nodes of devices that come with modules.
func TestModulesOfLinksDevicesAndFileSystems(t *testing.T) {
	e := harness.New(t)
	// With whole paths: the shell has programs of its own by these names.
	var script []string
	try := func(format string, args ...any) {
		line := fmt.Sprintf(format, args...)
		script = append(script, line+" || failed '"+strings.ReplaceAll(line, "'", "")+"'")
	}
	for kind, args := range map[string]string{
		"bridge": "", "ifb": "", "bond": "", "team": "", "vrf": "table 10", "nlmon": "", "wireguard": "",
		"vxlan": "id 7 dstport 4789 remote 127.0.0.2", "geneve": "id 7 remote 127.0.0.2",
		"gretap": "local 127.0.0.1 remote 127.0.0.2", "gre": "local 127.0.0.1 remote 127.0.0.2",
		"ipip": "local 127.0.0.1 remote 127.0.0.2", "sit": "local 127.0.0.1 remote 127.0.0.2",
		"ip6tnl": "local ::1 remote ::2", "ip6gre": "local ::1 remote ::2", "vti": "local 127.0.0.1 remote 127.0.0.2 key 1",
		"xfrm": "dev lo if_id 5",
	} {
		try("/usr/sbin/ip link add x-%s type %s %s", kind, kind, args)
	}
	for kind, args := range map[string]string{"vlan": "id 5", "macvlan": "mode bridge", "ipvlan": "mode l2", "macvtap": "", "macsec": ""} {
		try("/usr/sbin/ip link add d-%s type dummy", kind) // most want a link of their own
		try("/usr/sbin/ip link add link d-%s name y-%s type %s %s", kind, kind, kind, args)
	}
	try("/usr/sbin/ip link add d0 type dummy")
	try("/usr/sbin/tc qdisc add dev d0 root handle 1: htb")
	try("/usr/sbin/tc class add dev d0 parent 1: classid 1:1 htb rate 1mbit")
	try("/usr/sbin/tc qdisc add dev d0 parent 1:1 fq_codel")
	try("/usr/sbin/tc qdisc add dev d0 ingress")
	try("/usr/sbin/tc filter add dev d0 parent ffff: protocol ip u32 match u32 0 0 action mirred egress redirect dev x-ifb")
	try("/usr/sbin/tc filter add dev d0 parent ffff: protocol ip prio 9 flower ip_proto tcp action drop")
	try("/usr/sbin/ip xfrm state add src 127.0.0.1 dst 127.0.0.2 proto esp spi 1 mode tunnel aead 'rfc4106(gcm(aes))' 0x%040d 128", 1)
	links := script
	script = nil
	try("truncate -s 8M /tmp/disk")
	try("/usr/sbin/mkfs.ext4 -q /tmp/disk")
	try("mkdir -p /mnt")
	try("mount -o loop /tmp/disk /mnt")
	try("sh -c 'echo kept > /mnt/file'")
	try("umount /mnt")
	try("mount -o loop,ro -t ext4 /tmp/disk /mnt")
	try("grep -q kept /mnt/file")
	try("umount /mnt")
	for _, node := range deviceNodes {
		try("sh -c ': < %s'", node.path)
	}
	try("mount -t binfmt_misc none /proc/sys/fs/binfmt_misc")
	for _, kind := range []string{"xfs", "btrfs", "squashfs", "iso9660", "vfat", "udf", "exfat", "nfs", "nfs4", "cifs", "autofs", "configfs"} {
		// There is nothing to mount, but the kernel knows what it would be.
		try("sh -c 'mount -t %s /dev/loop7 /mnt 2>/dev/null; grep -qw %s$ /proc/filesystems'", kind, kind)
	}
	bundle := e.Bundle([]string{"sleep", "100000"}, func(s *specs.Spec) {
		c := s.Process.Capabilities
		for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted} {
			*set = append(*set, "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN")
		}
		s.Linux.ReadonlyPaths = nil
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		s.Linux.Devices = deviceNodesOf()
	})
	rootfs := filepath.Join(bundle, "rootfs")
	for _, program := range []string{"/usr/sbin/ip", "/usr/sbin/tc", "/usr/sbin/mkfs.ext4"} {
		harness.CopyProgram(t, rootfs, program)
	}
	e.OK("run", "--detach", "--bundle", bundle, "box")
	for _, lines := range [][]string{links, script} {
		lines = append([]string{"failed() { echo FAILED: $*; }"}, lines...)
		out := e.OK("exec", "box", "sh", "-c", strings.Join(append(lines, "echo done"), "\n"))
		assert.Check(t, is.Equal(out, "done\n"))
	}
}

// deviceNodes are what callers of privileged containers pass on of the host's devices: nodes whose drivers are modules.
var deviceNodes = []struct {
	path         string
	kind         string
	major, minor int64
}{
	{"/dev/loop-control", "c", 10, 237},
	{"/dev/loop0", "b", 7, 0},
	{"/dev/loop1", "b", 7, 1},
	{"/dev/loop7", "b", 7, 7},
	{"/dev/fuse", "c", 10, 229},
	{"/dev/cuse", "c", 10, 203},
	{"/dev/net/tun", "c", 10, 200},
	{"/dev/btrfs-control", "c", 10, 234},
	{"/dev/mapper/control", "c", 10, 236},
}

func deviceNodesOf() (list []specs.LinuxDevice) {
	for _, node := range deviceNodes {
		list = append(list, specs.LinuxDevice{Path: node.path, Type: node.kind, Major: node.major, Minor: node.minor})
	}
	return list
}
