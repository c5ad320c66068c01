package join

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// File is what the path of a namespace leads to. Of a process that the caller has no right to look
// at nothing is known but PID.
type File struct {
	Type     specs.LinuxNamespaceType
	Dev, Ino uint64
	// PID is the process whose namespace it is, when the path leads through /proc; else 0: then
	// only a network namespace can be told from that of the host, in whose others stand-ins are.
	PID int
	// OfHost tells that it is the host's, or the caller's own.
	OfHost bool
}

// types are the namespaces by their CLONE_NEW*, as ioctl_ns(2) tells them, with their files below
// /proc/PID/ns.
var types = map[int]struct {
	kind specs.LinuxNamespaceType
	file string
}{
	unix.CLONE_NEWNET:    {specs.NetworkNamespace, "net"},
	unix.CLONE_NEWPID:    {specs.PIDNamespace, "pid"},
	unix.CLONE_NEWIPC:    {specs.IPCNamespace, "ipc"},
	unix.CLONE_NEWUTS:    {specs.UTSNamespace, "uts"},
	unix.CLONE_NEWNS:     {specs.MountNamespace, "mnt"},
	unix.CLONE_NEWUSER:   {specs.UserNamespace, "user"},
	unix.CLONE_NEWCGROUP: {specs.CgroupNamespace, "cgroup"},
	unix.CLONE_NEWTIME:   {specs.TimeNamespace, "time"},
}

// maxLinks is how many links a path may lead through: as many as for the kernel.
const maxLinks = 40

// Look looks at the file that a path leads to, which must be absolute. Only a namespace is opened:
// whatever else is there, a device or a FIFO, does not notice.
func Look(path string) (File, error) {
	file, err := look(path)
	if err != nil {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err // the path is said already
		}
		return File{}, fmt.Errorf("%s: %w", path, err)
	}
	return file, nil
}

func look(path string) (f File, err error) {
	if !filepath.IsAbs(path) {
		return f, errors.New("is not an absolute path")
	}
	if path, f.PID, err = follow(path); err != nil {
		return f, err
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) && f.PID != 0 {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	defer unix.Close(fd)
	var fsType unix.Statfs_t
	if err := unix.Fstatfs(fd, &fsType); err != nil {
		return f, err
	}
	if fsType.Type != unix.NSFS_MAGIC {
		return f, errors.New("is not a namespace")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return f, err
	}
	f.Dev, f.Ino = st.Dev, st.Ino
	flag, err := nsType(fd)
	if err != nil {
		return f, fmt.Errorf("ask for its type: %w", err)
	}
	t, ok := types[flag]
	if !ok {
		return f, fmt.Errorf("is a namespace of an unknown type %#x", flag)
	}
	f.Type = t.kind
	for _, owner := range []string{"1", "self"} {
		var st unix.Stat_t
		err := unix.Stat("/proc/"+owner+"/ns/"+t.file, &st)
		f.OfHost = f.OfHost || err == nil && st.Dev == f.Dev && st.Ino == f.Ino
	}
	return f, nil
}

func nsType(pathFD int) (int, error) {
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(pathFD), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
}

// follow resolves a path up to the link of /proc that leads to a namespace, and tells whose that
// link is, or to the end if there is none.
func follow(path string) (_ string, pid int, err error) {
	for range maxLinks {
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return "", 0, err
		}
		path = filepath.Join(dir, filepath.Base(path))
		if pid := processOf(dir); pid != 0 {
			return path, pid, nil
		}
		target, err := os.Readlink(path)
		if errors.Is(err, unix.EINVAL) { // no link
			return path, 0, nil
		}
		if err != nil {
			return "", 0, err
		}
		if nsLink.MatchString(target) { // a file that is open, below /proc/PID/fd
			return path, 0, nil
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(dir, target)
		}
		path = target
	}
	return "", 0, unix.ELOOP
}

// nsLink is where links to namespaces seem to lead, see namespaces(7).
var nsLink = regexp.MustCompile(`^[a-z]+:\[[0-9]+\]$`)

// processOf returns the process whose namespaces are in a directory, one of /proc; else 0.
func processOf(dir string) int {
	rest, ok := strings.CutPrefix(dir, "/proc/")
	if !ok {
		return 0
	}
	parts := strings.Split(rest, "/")
	if len(parts) == 4 && parts[1] == "task" {
		parts = []string{parts[0], parts[3]}
	}
	if len(parts) != 2 || parts[1] != "ns" {
		return 0
	}
	pid, err := strconv.Atoi(parts[0])
	if err != nil || pid <= 0 {
		return 0
	}
	return pid
}
