package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// probeTimeout bounds a run of the daemon that only prints something.
const probeTimeout = 10 * time.Second

// Daemon is a virtiofsd program.
type Daemon struct {
	Path string
	// Style is the way in which it takes its options.
	Style Style
	// Announces says that it shows mount points to the guest unless told not to.
	Announces bool
}

// Style is one of the two ways in which virtiofsd programs take options.
type Style string

const (
	// StyleC is the daemon that came with QEMU up to 7.2: "-o source=DIR".
	StyleC Style = "c"
	// StyleRust is the one of the virtio-fs project: "--shared-dir=DIR".
	StyleRust Style = "rust"
)

// FindVirtiofsd finds the daemon and asks it for its style of options. configured
// is a path or a name in PATH; empty means the usual places. errdefs.ErrNotFound
// if there is none, errdefs.ErrInvalidArgument if it is some other program.
func FindVirtiofsd(ctx context.Context, configured string) (Daemon, error) {
	path, err := lookVirtiofsd(configured)
	if err != nil {
		return Daemon{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--help")
	cmd.Env = []string{}
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	runErr := cmd.Run()
	d, ok := describe(path, out.String())
	if !ok {
		if runErr == nil {
			runErr = errors.New("its help names no shared directory")
		}
		return Daemon{}, fmt.Errorf("probe virtiofsd %s: %w: %w", path, runErr, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

func lookVirtiofsd(configured string) (string, error) {
	// The usual places: Debian 13 and Fedora, Debian 12, Debian 11.
	names := []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/kvm/virtiofsd", "virtiofsd"}
	if configured != "" {
		names = []string{configured}
	}
	var err error
	for _, name := range names {
		var path string
		if path, err = exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	if configured == "" {
		return "", fmt.Errorf("find virtiofsd in %s and PATH: %w", strings.Join(names[:len(names)-1], ", "), errdefs.ErrNotFound)
	}
	if why, ok := errors.AsType[*exec.Error](err); ok {
		err = why.Err
	}
	return "", fmt.Errorf("find virtiofsd %s: %v: %w", configured, err, errdefs.ErrNotFound)
}

// describe reads a daemon's help text. The Rust daemon knows "-o", too, for old callers.
func describe(path, help string) (d Daemon, ok bool) {
	switch {
	case strings.Contains(help, "--shared-dir"):
		d = Daemon{Path: path, Style: StyleRust, Announces: strings.Contains(help, "--no-announce-submounts")}
	case strings.Contains(help, "-o source=PATH"):
		d = Daemon{Path: path, Style: StyleC}
	default:
		return Daemon{}, false
	}
	return d, true
}

// serving is what a daemon is to do.
type serving struct {
	dir      string
	socketFD int    // listening, inherited
	files    uint64 // limit of open files; 0: as it is
}

// arguments are the daemon's command line.
func (d Daemon) arguments(s serving) []string {
	if d.Style == StyleRust {
		return d.rustArguments(s)
	}
	return d.cArguments(s)
}

// The choices, for both styles:
//   - what changes on the host the guest sees within a second. cache=auto alone would give
//     that, too, but with it each open throws the file's cached pages away, and each exec reads its
//     program anew: under TCG that doubles the time of an exec. cache=always keeps the
//     pages; the attributes, which expire after a second, tell the guest when to drop them
//     (FUSE_AUTO_INVAL_DATA). The Rust daemon cannot be told when attributes expire.
//   - namespace sandbox: the daemon sees the directory and nothing else.
//   - submounts not announced: a guest that knows of mount points has a file system for each,
//     and Linux (6.1) unmounts that while the daemon still has to answer to the release
//     of its last file: "Busy inodes after unmount", and a kernel BUG at the end of a container. The
//     price: files of two host file systems can have equal inode numbers on one device.
//   - extended attributes: file capabilities.
//   - messages at level info go to the log; there are few.

func (d Daemon) cArguments(s serving) []string {
	return []string{
		"--fd=" + strconv.Itoa(s.socketFD),
		// Commas part options, and this daemon has no way to quote them; see Share.Start.
		"-o", "source=" + s.dir,
		"-o", "sandbox=namespace",
		"-o", "cache=always",
		"-o", "timeout=1",
		"-o", "xattr",
		"-o", "log_level=info",
		"--rlimit-nofile=" + strconv.FormatUint(s.files, 10),
	}
}

func (d Daemon) rustArguments(s serving) []string {
	args := []string{
		"--fd=" + strconv.Itoa(s.socketFD),
		"--shared-dir=" + s.dir,
		"--sandbox=namespace",
		"--cache=auto",
		"--xattr",
		"--log-level=info",
		"--rlimit-nofile=" + strconv.FormatUint(s.files, 10),
	}
	if d.Announces {
		args = append(args, "--no-announce-submounts")
	}
	return args
}

// wantedFiles is what both daemons ask for themselves: a guest may hold that many inodes.
const wantedFiles = 1_000_000

// fileLimit is the limit of open files that a daemon can set for itself: without the
// capability, asking for more than the hard limit would end it.
func fileLimit() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	if limit.Max >= wantedFiles || mayRaiseLimits() {
		return wantedFiles
	}
	return limit.Max
}

func mayRaiseLimits() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
