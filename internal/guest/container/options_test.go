package container_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/guest/container"
	"runv/internal/guest/stage"
)

func TestMountOptions(t *testing.T) {
	for _, tc := range []struct {
		kind, options string
		want          stage.Mount
	}{
		{"proc", "", stage.Mount{Type: "proc"}},
		{"cgroup", "ro,relatime", stage.Mount{Type: "cgroup2", Flags: unix.MS_RDONLY | unix.MS_RELATIME}},
		{"tmpfs", "nosuid,strictatime,mode=755,size=65536k", stage.Mount{
			Type: "tmpfs", Flags: unix.MS_NOSUID | unix.MS_STRICTATIME, Data: "mode=755,size=65536k",
		}},
		{"tmpfs", "ro,rw,noexec,exec,nodev", stage.Mount{Type: "tmpfs", Flags: unix.MS_NODEV}},
		{"tmpfs", "tmpcopyup,rprivate", stage.Mount{
			Type: "tmpfs", CopyUp: true, Propagation: []uintptr{unix.MS_PRIVATE | unix.MS_REC},
		}},
		{"none", "bind", stage.Mount{Type: "bind", Flags: unix.MS_BIND}},
		{"", "rbind,ro,nosuid", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND | unix.MS_REC | unix.MS_RDONLY | unix.MS_NOSUID,
			Set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID,
		}},
		{"bind", "rbind,ro,rw", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND | unix.MS_REC, Clear: unix.MOUNT_ATTR_RDONLY,
		}},
		{"bind", "bind,rro,rnoatime", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND,
			RecSet: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOATIME, RecClear: unix.MOUNT_ATTR__ATIME,
		}},
		{"bind", "bind,noatime,strictatime,norelatime", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND | unix.MS_NOATIME | unix.MS_STRICTATIME,
			Set: unix.MOUNT_ATTR_STRICTATIME, Clear: unix.MOUNT_ATTR__ATIME,
		}},
		{"bind", "bind,norelatime,sync", stage.Mount{Type: "bind", Flags: unix.MS_BIND | unix.MS_SYNCHRONOUS}},
		{"bind", "bind,remount,ro,dev", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, Set: unix.MOUNT_ATTR_RDONLY,
			Clear: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOSYMFOLLOW,
		}},
		{"bind", "rbind,rstrictatime,rnorelatime,rro,rrw", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND | unix.MS_REC,
			RecSet: unix.MOUNT_ATTR_STRICTATIME, RecClear: unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_RDONLY,
		}},
		{"bind", "bind,relatime,rslave", stage.Mount{
			Type: "bind", Flags: unix.MS_BIND | unix.MS_RELATIME, Clear: unix.MOUNT_ATTR__ATIME,
			Propagation: []uintptr{unix.MS_SLAVE | unix.MS_REC},
		}},
	} {
		t.Run(tc.kind+" "+tc.options, func(t *testing.T) {
			var options []string
			if tc.options != "" {
				options = strings.Split(tc.options, ",")
			}
			got := container.TranslateMount(specs.Mount{Type: tc.kind, Options: options})
			assert.Equal(t, cmp.Diff(tc.want, got), "")
		})
	}
}

func TestParseStat(t *testing.T) {
	name, parent, start, err := container.ParseStat("42 (a) b (c) S 7 1 1 34816 1 0 0 0 0 0 11 22 0 0 20 0 1 0 555 0 0")
	assert.NilError(t, err)
	assert.Equal(t, name, "a) b (c")
	assert.Equal(t, parent, uint64(7))
	assert.Equal(t, start, uint64(555))
	for _, line := range []string{"", "1", "1 (a", "1 (a) S", ") 1 ("} {
		_, _, _, err := container.ParseStat(line)
		assert.ErrorContains(t, err, "parse stat")
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("42 (a) b (c) S 7 1 1 34816 1 0 0 0 0 0 11 22 0 0 20 0 1 0 555 0 0")
	f.Fuzz(func(_ *testing.T, line string) { _, _, _, _ = container.ParseStat(line) })
}
