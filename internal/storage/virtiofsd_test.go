package storage

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// What the two kinds of daemon print, shortened.
const (
	helpC = `usage: /usr/lib/qemu/virtiofsd [options]

    -h   --help                print help
    -o sandbox=namespace|chroot
    -o announce_submounts      Announce sub-mount points to the guest
    -o source=PATH             shared directory tree
    --fd=FDNUM                 fd number of vhost-user socket
`
	helpOldC = `usage: virtiofsd [options]
    -o source=PATH             shared directory tree
`
	helpRust = `Launch a virtiofsd backend.

Usage: virtiofsd [OPTIONS]

Options:
      --shared-dir <SHARED_DIR>
          Shared directory path
      --announce-submounts
          Tell the guest which directories are mount points
  -o <COMPAT_OPTIONS>...
          Options in a format compatible with the legacy implementation
`
	helpNewRust = `Launch a virtiofsd backend.
      --shared-dir <SHARED_DIR>
      --no-announce-submounts
`
)

func TestDescribe(t *testing.T) {
	for name, test := range map[string]struct {
		help string
		want Daemon
		ok   bool
	}{
		"c":        {helpC, Daemon{"/d", StyleC, false}, true},
		"old c":    {helpOldC, Daemon{"/d", StyleC, false}, true},
		"rust":     {helpRust, Daemon{"/d", StyleRust, false}, true},
		"new rust": {helpNewRust, Daemon{"/d", StyleRust, true}, true},
		"other":    {"usage: true [ignored]", Daemon{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			d, ok := describe("/d", test.help)
			assert.Equal(t, ok, test.ok)
			assert.Equal(t, d, test.want)
		})
	}
}

func TestArguments(t *testing.T) {
	s := serving{dir: "/pod/share", socketFD: 3, files: 4096}
	assert.DeepEqual(t, Daemon{Style: StyleC}.arguments(s), []string{
		"--fd=3", "-o", "source=/pod/share", "-o", "sandbox=namespace", "-o", "cache=always", "-o", "timeout=1", "-o", "xattr",
		"-o", "log_level=info", "--rlimit-nofile=4096",
	})
	assert.DeepEqual(t, Daemon{Style: StyleRust, Announces: true}.arguments(s), []string{
		"--fd=3", "--shared-dir=/pod/share", "--sandbox=namespace", "--cache=auto", "--xattr",
		"--log-level=info", "--rlimit-nofile=4096", "--no-announce-submounts",
	})
	args := Daemon{Style: StyleRust}.arguments(s)
	assert.Equal(t, args[len(args)-1], "--rlimit-nofile=4096")
}

func TestFindVirtiofsd(t *testing.T) {
	script := func(text string) string {
		path := filepath.Join(t.TempDir(), "virtiofsd")
		assert.NilError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700))
		return path
	}
	good := script("echo '--shared-dir <DIR>'\n")
	d, err := FindVirtiofsd(t.Context(), good)
	assert.NilError(t, err)
	assert.Equal(t, d, Daemon{Path: good, Style: StyleRust})

	t.Setenv("PATH", filepath.Dir(good))
	d, err = FindVirtiofsd(t.Context(), "virtiofsd")
	assert.NilError(t, err)
	assert.Equal(t, d.Path, good)

	_, err = FindVirtiofsd(t.Context(), "/nonexistent/virtiofsd")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.ErrorContains(t, err, "find virtiofsd /nonexistent/virtiofsd: ")
	_, err = FindVirtiofsd(t.Context(), "no-such-virtiofsd")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)

	for _, other := range []string{"echo hello\n", "exit 1\n"} {
		_, err = FindVirtiofsd(t.Context(), script(other))
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.ErrorContains(t, err, "probe virtiofsd ")
	}
}
