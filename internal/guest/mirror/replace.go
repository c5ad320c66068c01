package mirror

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// maxProblems bounds an answer.
const maxProblems = 16

// Replace mounts what is at another path over the mirror, wherever that is mounted. The problems are a
// line each.
func (s *Set) Replace(r *agentv1.ReplaceMirrorRequest) (problems []string, err error) {
	if !filepath.IsAbs(r.Source) {
		return nil, invalid("mirror %q: source %q is not absolute", r.Id, r.Source)
	}
	m, err := s.use(r.Id)
	if err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(proc)
	// This namespace is the first, so that who takes the mirror from here now gets the other, and is seen below
	// if he was earlier.
	spaces, err := mountNamespaces()
	defer func() {
		for _, ns := range spaces {
			_ = ns.Close()
		}
	}()
	if err != nil {
		return nil, fmt.Errorf("mirror %s: %w", r.Id, err)
	}
	for _, ns := range spaces {
		err := onThread(func() error {
			own, err := unix.Openat(proc, "thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(own)
			return m.replaceIn(proc, own, int(ns.Fd()), r.Source)
		})
		if err != nil && len(problems) < maxProblems {
			problems = append(problems, err.Error())
		}
	}
	return problems, nil
}

// mountNamespaces opens all that processes are in, the agent's own first.
func mountNamespaces() (all []*os.File, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	names := []string{"self"}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			names = append(names, e.Name())
		}
	}
	known := make(map[uint64]bool)
	for _, name := range names {
		f, err := os.Open(filepath.Join("/proc", name, "ns/mnt"))
		if err != nil {
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EACCES) {
				continue // it has ended, or is about to
			}
			return all, err
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || known[st.Ino] {
			_ = f.Close()
			continue
		}
		known[st.Ino] = true
		all = append(all, f)
	}
	return all, nil
}

// mounted is a mount of a mirror's.
type mounted struct {
	at    string // path in its namespace
	below string // path of what is mounted, in the tree; "": all of it
	attrs uint64 // MOUNT_ATTR_*
}

// replaceIn does it in a namespace, on a thread that is in the agent's own and that ends afterwards.
func (m *mirror) replaceIn(proc, own, ns int, source string) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter mount namespace: %w", err)
	}
	fd, err := unix.Openat(proc, "thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	info := os.NewFile(uintptr(fd), "mountinfo")
	mounts, err := m.mounts(info)
	_ = info.Close()
	if err != nil {
		return err
	}
	var errs []error
	for _, mnt := range mounts {
		if err := m.cover(own, ns, mnt, source); err != nil {
			errs = append(errs, fmt.Errorf("replace mount at %q: %w", mnt.at, err))
		}
	}
	return errors.Join(errs...)
}

// mounts are those of the mirror's file system in a mountinfo.
func (m *mirror) mounts(info *os.File) (all []mounted, err error) {
	dev := fmt.Sprintf("%d:%d", unix.Major(m.dev), unix.Minor(m.dev))
	root := path.Join("/", treeDir, m.name)
	lines := bufio.NewScanner(info)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 6 || f[2] != dev {
			continue
		}
		mnt := mounted{at: unescape(f[4]), attrs: attributes(f[5])}
		what := strings.TrimSuffix(unescape(f[3]), "//deleted")
		switch {
		case strings.HasPrefix(root+"/", strings.TrimSuffix(what, "/")+"/"): // all of it, or more
			mnt.at = path.Join(mnt.at, strings.TrimPrefix(root, what))
		case strings.HasPrefix(what, root+"/"):
			mnt.below = strings.TrimPrefix(what, root+"/")
		default:
			continue // of the staging place
		}
		all = append(all, mnt)
	}
	return all, lines.Err()
}

// cover mounts what is at source in the agent's namespace over a mount of the mirror's.
func (m *mirror) cover(own, ns int, mnt mounted, source string) error {
	target, err := unix.Openat2(unix.AT_FDCWD, mnt.at, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if errors.Is(err, unix.ENOENT) {
		return nil // unmounted just now
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	var st unix.Stat_t
	if err := unix.Fstat(target, &st); err != nil {
		return err
	}
	if st.Dev != m.dev {
		return nil // something covers it already
	}
	if err := unix.Setns(own, unix.CLONE_NEWNS); err != nil {
		return err
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, path.Join(source, mnt.below), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW|unix.AT_RECURSIVE)
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err != nil {
		return fmt.Errorf("open %q: %w", source, err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: mnt.attrs, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	return unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// attributes are those of a mount by its options in mountinfo.
func attributes(options string) (attrs uint64) {
	known := map[string]uint64{
		"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV,
		"noexec": unix.MOUNT_ATTR_NOEXEC, "nodiratime": unix.MOUNT_ATTR_NODIRATIME, "nosymfollow": unix.MOUNT_ATTR_NOSYMFOLLOW,
	}
	for o := range strings.SplitSeq(options, ",") {
		attrs |= known[o]
	}
	return attrs
}

// unescape undoes what mountinfo does to spaces and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
