package engines

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"runv/test/harness"
)

// systemdImage returns the path of an archive of a Debian with systemd, which is made once and kept in build.
var systemdImage = sync.OnceValues(func() (string, error) {
	build := filepath.Join(harness.TreeRoot(), "build")
	archive := filepath.Join(build, fmt.Sprintf("systemd-%.8x.tar", sha256.Sum256([]byte(makeSystemd))))
	if _, err := os.Stat(archive); err == nil {
		return archive, nil
	}
	if err := os.MkdirAll(build, 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(build, "systemd-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), systemdTimeout)
	defer cancel()
	// Namespaces of its own, so that it leaves no mount and no process, however it ends.
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-euc", makeSystemd, "sh", dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	if r := harness.Finish(cmd); r.Code != 0 {
		end := func(text string) string { return text[max(0, len(text)-2000):] }
		err := fmt.Errorf("make a Debian with systemd: status %d: %s%s", r.Code, end(r.Stdout), end(r.Stderr))
		return "", errors.Join(ctx.Err(), err)
	}
	return archive, os.Rename(filepath.Join(dir, "image.tar"), archive)
})

// systemdTimeout bounds the making of the image, and a line of a check that has systemd in a VM: under emulation
// its boot takes tens of seconds, and minutes on a busy machine.
const systemdTimeout = 10 * time.Minute

// makeSystemd makes image.tar in the directory $1. Its text is the archive's key.
const makeSystemd = `
debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus bookworm $1/root
cd $1/root
rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/doc usr/share/man usr/share/locale usr/share/info
tar -cf ../image.tar .`

// importSystemd gives the engine the image.
func (e *engine) importSystemd() {
	e.Helper()
	archive, err := systemdImage()
	if err != nil {
		e.Fatal(err)
	}
	e.ok(e.name, "import", "-c", "ENV container=oci", "-c", `CMD ["/sbin/init"]`, archive, "systemd")
}
