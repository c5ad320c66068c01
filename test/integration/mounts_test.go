package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"runv/test/harness"
)

// optionMounts are mounts with each option that runv knows, and with some combinations.
func optionMounts(t *testing.T, e *harness.Env, source string) (mounts []specs.Mount) {
	t.Helper()
	var f features.Features
	assert.NilError(t, json.Unmarshal([]byte(e.OK("features")), &f))
	assert.Assert(t, len(f.MountOptions) > 60)
	lists := append(f.MountOptions, "nosuid,suid", "ro,rw", "noatime,relatime", "relatime,noatime", "strictatime,noatime",
		"nodiratime,noatime", "ro,rrw", "rro,rw", "noatime,atime", "strictatime,nostrictatime", "nodev,noexec,nosuid", "ro,nosymfollow",
		"shared,private", "slave,shared", "rbind,rslave", "rbind,rshared")
	for _, list := range lists {
		switch list {
		case "idmap", "ridmap": // need mappings
			continue
		case "remount": // of what is mounted there
			continue
		}
		add := func(kind, source string, options ...string) {
			mounts = append(mounts, specs.Mount{
				Type: kind, Source: source, Destination: "/mnt/" + kind + "-" + strings.ReplaceAll(list, ",", "+"),
				Options: append(options, strings.Split(list, ",")...),
			})
		}
		if list == "defaults" { // the old runc gives it to file systems as their own, and the new one refuses it for binds
			continue
		}
		// The runcs pass half of the access times, which the kernel refuses.
		if list != "ratime" && list != "rnostrictatime" {
			add("bind", source, "bind")
		}
		// And they give the file system what are no options of its.
		if !strings.Contains(list, "bind") {
			add("tmpfs", "tmpfs", "mode=755", "size=64k")
		}
	}
	mounts = append(mounts, specs.Mount{Type: "tmpfs", Source: "x", Destination: "/mnt/tmpfs-nodev", Options: []string{"remount", "noexec"}},
		specs.Mount{Type: "bind", Source: source, Destination: "/mnt/bind-nosuid", Options: []string{"bind", "remount", "nodev"}})
	return mounts
}

// numbers are those of peer groups.
var numbers = regexp.MustCompile(`(shared|master):[0-9]+`)

// TestMountsLikeRunc compares mounts with all options, and on links that lead nowhere or out of the
// root, in what the container and the host see of them.
func TestMountsLikeRunc(t *testing.T) {
	e := harness.New(t)
	outside := filepath.Join(e.Dir, "outside")
	source := filepath.Join(e.Dir, "source")
	for _, dir := range []string{outside, source} {
		assert.NilError(t, os.Mkdir(dir, 0o755))
	}
	single := filepath.Join(e.Dir, "single")
	assert.NilError(t, os.WriteFile(single, []byte("single\n"), 0o644))
	mounts := optionMounts(t, e, source)
	all := runtimes(e)
	results := make([]string, len(all))
	for i, rt := range all {
		bundle := e.Bundle([]string{"sh", "-c", `
awk '$5 ~ /^.mnt|^.run/ {s = $5" "$6; for (i = 7; $i != "-"; i++) s = s" "$i; print s, $NF ~ /size/ ? $NF : ""}' /proc/self/mountinfo
cat /run/x/resolv.conf /etc/abs; find /etc /run ! -type l | sort; ls -d ` + outside + `/*; cat /etc/loop`},
			func(s *specs.Spec) {
				s.Process.Rlimits = nil
				s.Mounts = append(s.Mounts[:3:3], mounts...)
				bind := func(at string) {
					s.Mounts = append(s.Mounts, specs.Mount{Destination: at, Type: "bind", Source: single, Options: []string{"bind"}})
				}
				bind("/etc/resolv.conf")
				bind("/etc/abs")
				bind("/etc/out/file")
				bind("/etc/up/other")
				s.Mounts = append(s.Mounts, specs.Mount{Destination: "/run/tmp/deep", Type: "tmpfs", Source: "tmpfs"})
			})
		rootfs := filepath.Join(bundle, "rootfs")
		for link, target := range map[string]string{
			"etc/resolv.conf": "../run/x/resolv.conf", "etc/abs": "/run/abs/file", "etc/out": outside,
			"etc/up": strings.Repeat("../", 30) + outside[1:], "run": "var/run", "etc/loop": "loop",
		} {
			assert.NilError(t, os.Symlink(target, filepath.Join(rootfs, link)))
		}
		anyRunc(e, bundle)
		r := harness.Finish(rt.command("run", "--bundle", bundle, "box"))
		assert.Equal(t, r.Code, 1, r.Stderr)
		assert.Assert(t, cmp.Contains(r.Stderr, "loop"))
		results[i] = numbers.ReplaceAllString(r.Stdout, "$1")
		// What was made in the root file system.
		assert.NilError(t, filepath.WalkDir(rootfs, func(path string, d fs.DirEntry, err error) error {
			if name := strings.TrimPrefix(path, rootfs); err == nil && !strings.HasPrefix(name, "/bin/") {
				results[i] += fmt.Sprintln(name, d.Type())
			}
			return err
		}))
		entries, err := os.ReadDir(outside)
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 0, "%v", entries)
	}
	// Linux 6.1 says so of a tmpfs, Debian's kernels with 64 bits do.
	ours := strings.ReplaceAll(results[len(all)-1], ",inode64", "")
	assert.Assert(t, cmp.Contains(ours, "/run/x/resolv.conf"))
	for i, theirs := range results[:len(all)-1] {
		assert.Check(t, cmp.Equal(ours, theirs), all[i].name)
	}
}

// TestBindOfEarlierMountLikeRunc binds what earlier mounts show in the container's own root file system, where the host has something
// else, or nothing.
func TestBindOfEarlierMountLikeRunc(t *testing.T) {
	e := harness.New(t)
	volume := filepath.Join(e.Dir, "volume")
	assert.NilError(t, os.MkdirAll(filepath.Join(volume, "dir"), 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(volume, "dir", "file"), []byte("of the volume\n"), 0o644))
	all := runtimes(e)
	saw := make([]harness.Result, len(all))
	for i, rt := range all {
		bundle := e.Bundle([]string{"sh", "-c", "cat /copied/file /single /plain; echo kept > /scratch/x && cat /again/x; ls /only; touch /ro/y || echo read-only"})
		rootfs := filepath.Join(bundle, "rootfs")
		for name, content := range map[string]string{"data/dir/file": "of the root\n", "tmp/plain": "plain\n"} {
			assert.NilError(t, os.MkdirAll(filepath.Dir(filepath.Join(rootfs, name)), 0o755))
			assert.NilError(t, os.WriteFile(filepath.Join(rootfs, name), []byte(content), 0o644))
		}
		assert.NilError(t, os.Mkdir(filepath.Join(rootfs, "scratch"), 0o755))
		e.EditSpec(bundle, func(s *specs.Spec) {
			bind := func(source, destination string, options ...string) specs.Mount {
				return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"bind"}, options...)}
			}
			s.Mounts = append(s.Mounts, bind(volume, "/data"), specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/scratch"},
				bind(rootfs+"/data/dir", "/copied"), bind(rootfs+"/data/dir/file", "/single"), bind(rootfs+"/tmp/plain", "/plain"),
				bind(rootfs+"/scratch", "/again"), bind(rootfs+"/scratch", "/ro", "ro"), bind(rootfs+"/data", "/only"))
		})
		anyRunc(e, bundle)
		saw[i] = harness.Finish(rt.command("run", "--bundle", bundle, "box"))
	}
	ours := saw[len(all)-1]
	assert.Equal(t, ours.Stdout, "of the volume\nof the volume\nplain\nkept\ndir\nread-only\n", ours.Stderr)
	for i, theirs := range saw {
		assert.Check(t, cmp.Equal(ours.Stdout, theirs.Stdout), "%s: %s", all[i].name, theirs.Stderr)
	}
}

// TestReadOnlyRootParity looks at what a container finds on mount points that were missing from its read-only root, and at
// paths that are not absolute.
func TestReadOnlyRootParity(t *testing.T) {
	e := harness.New(t)
	all := runtimes(e)
	tmpfs := func(destination string, options ...string) specs.Mount {
		return specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: destination, Options: options}
	}
	const script = `stat -c "%n %a %u:%g" /new /owned /strict /there /parent /parent/below /twice
touch /new/file && ls -l /new/file | cut -c1-10; grep -e " /new" -e " /twice" -e " /strict" /proc/mounts | sed "s/,inode64//; s/,mode=755//"
stat -c "%n %F %t:%T" /dev/relative /dev/outside; ls /masked | wc -l; touch /tmp/file`
	saw := make([]harness.Result, len(all))
	for i, rt := range all {
		bundle := e.Bundle([]string{"sh", "-c", script}, func(s *specs.Spec) {
			s.Root.Readonly = true
			s.Process.User = specs.User{UID: 1000, GID: 1000}
			s.Mounts = append(s.Mounts, tmpfs("/new"), tmpfs("/owned", "uid=5", "gid=6"), tmpfs("/strict", "mode=700"),
				tmpfs("/there"), tmpfs("/parent/below"), tmpfs("/parent"), tmpfs("/twice", "mode=755"), tmpfs("/twice"))
			mode := os.FileMode(0o666)
			for _, path := range []string{"dev/relative", "../../dev/outside"} {
				s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: path, Type: "c", Major: 1, Minor: 5, FileMode: &mode})
			}
			s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "masked")
			s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, "tmp")
		})
		for name, mode := range map[string]os.FileMode{"there": 0o750, "masked/secret": 0o755} {
			path := filepath.Join(bundle, "rootfs", name)
			assert.NilError(t, os.MkdirAll(path, mode))
		}
		anyRunc(e, bundle)
		saw[i] = harness.Finish(rt.command("run", "--bundle", bundle, "box"))
	}
	ours := saw[len(all)-1]
	assert.Assert(t, cmp.Contains(ours.Stdout, "/new 1777 0:0\n"), ours.Stderr)
	for i, theirs := range saw[:len(all)-1] {
		assert.Check(t, cmp.Equal(ours.Stdout, theirs.Stdout), "%s: %s", all[i].name, ours.Stderr)
		assert.Check(t, cmp.Equal(ours.Code, theirs.Code), all[i].name)
	}
}
