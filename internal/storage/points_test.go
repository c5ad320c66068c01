package storage_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/storage"
)

// TestMountPointsStayInside: a read-only root gets the mount points that it lacks, where its links lead
// inside of it.
func TestMountPointsStayInside(t *testing.T) {
	s, _ := newShare(t)
	outside := t.TempDir()
	for name, tc := range map[string]struct {
		links map[string]string
		point storage.MountPoint
		made  string // "": nothing
		err   string
	}{
		"plain":        {nil, storage.MountPoint{Path: "/a/b"}, "a/b/", ""},
		"file":         {nil, storage.MountPoint{Path: "/a/b", File: true}, "a/b", ""},
		"dangling":     {map[string]string{"etc/resolv.conf": "../run/x/resolv.conf"}, storage.MountPoint{Path: "/etc/resolv.conf", File: true}, "run/x/resolv.conf", ""},
		"directory":    {map[string]string{"etc/dir": "/run/dir"}, storage.MountPoint{Path: "/etc/dir"}, "run/dir/", ""},
		"in the path":  {map[string]string{"etc": "usr/etc"}, storage.MountPoint{Path: "/etc/a/b"}, "usr/etc/a/b/", ""},
		"absolute":     {map[string]string{"dev": outside}, storage.MountPoint{Path: "/dev/x"}, outside[1:] + "/x/", ""},
		"dots":         {map[string]string{"dev": strings.Repeat("../", 30) + outside[1:]}, storage.MountPoint{Path: "/dev/x", File: true}, outside[1:] + "/x", ""},
		"dots in path": {nil, storage.MountPoint{Path: "/../.." + outside + "/y"}, outside[1:] + "/y/", ""},
		"loop":         {map[string]string{"a": "b", "b": "a"}, storage.MountPoint{Path: "/a"}, "", "too many levels of symbolic links"},
		"there":        {map[string]string{"a": "/"}, storage.MountPoint{Path: "/a"}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			assert.NilError(t, os.Mkdir(root, 0o755))
			for link, target := range tc.links {
				path := filepath.Join(root, link)
				assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
				assert.NilError(t, os.Symlink(target, path))
			}
			m, err := s.Add(t.Context(), "c", storage.Root{Path: root, ReadOnly: true, MountPoints: []storage.MountPoint{tc.point}}, nil)
			if tc.err != "" {
				assert.ErrorContains(t, err, "make mount point "+tc.point.Path)
				assert.ErrorContains(t, err, tc.err)
				return
			}
			assert.NilError(t, err)
			assert.NilError(t, s.Remove("c"))
			if tc.made != "" {
				assert.DeepEqual(t, m.Made, []string{tc.point.Path})
			} else {
				assert.Equal(t, len(m.Made), 0)
			}
			if tc.made != "" {
				fi, err := os.Lstat(filepath.Join(root, tc.made))
				assert.NilError(t, err)
				assert.Equal(t, fi.IsDir(), strings.HasSuffix(tc.made, "/"))
				assert.Assert(t, fi.IsDir() || fi.Mode().IsRegular())
			}
			entries, err := os.ReadDir(outside)
			assert.NilError(t, err)
			assert.Equal(t, len(entries), 0)
		})
	}
}
