package mirror

import (
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "runv/api/agent/v1"
)

// onThread runs f on a thread that ends with it, so that f may change what belongs to a thread.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: nobody else may get the thread
		done <- f()
	}()
	return <-done
}

// becomeMaker lets the thread make files for others, with just the mode that it says: what is made with
// the right owner and mode needs no change afterwards, which watches would see.
func becomeMaker() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	unix.Umask(0)
	const noFixup = 1 << 2 // SECBIT_NO_SETUID_FIXUP: keep the capabilities
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, noFixup, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	return nil
}

// as makes the thread make files for an owner while f runs.
func as(uid, gid uint32, f func() error) error {
	if err := errors.Join(unix.Setfsgid(int(gid)), unix.Setfsuid(int(uid))); err != nil {
		return fmt.Errorf("take on owner %d:%d: %w", uid, gid, err)
	}
	return errors.Join(f(), unix.Setfsuid(0), unix.Setfsgid(0))
}

// place is where something is, or will be: a name in a directory.
type place struct {
	dir  int // O_PATH; whoever has got the place closes it
	name string
}

func (p place) close() { _ = unix.Close(p.dir) }

const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// locate finds the place of a path in the tree, or in the staging place.
func (m *mirror) locate(p string, staged bool) (place, error) {
	if p == "" && !staged {
		dir, err := unix.FcntlInt(uintptr(m.tree), unix.F_DUPFD_CLOEXEC, 0)
		return place{dir, m.name}, err
	}
	if !validPath(p) {
		return place{}, invalid("it is not a path")
	}
	from := m.root
	if staged {
		from = m.stage
	}
	if from < 0 {
		return place{}, unix.ENOENT
	}
	dir, err := unix.Openat2(from, path.Dir(p), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: beneath,
	})
	return place{dir, path.Base(p)}, err
}

// look opens what is at a path, O_PATH. The tree's root is found even when its name is gone.
func (m *mirror) look(p string, staged bool) (int, error) {
	if p == "" && !staged {
		if m.root < 0 {
			return -1, unix.ENOENT
		}
		return unix.FcntlInt(uintptr(m.root), unix.F_DUPFD_CLOEXEC, 0)
	}
	at, err := m.locate(p, staged)
	if err != nil {
		return -1, err
	}
	defer at.close()
	return at.look()
}

func (p place) look() (int, error) {
	return unix.Openat2(p.dir, p.name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV})
}

func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// make makes something. In the tree the birth of a directory is its one event.
func (m *mirror) make(r *agentv1.MirrorMake) error {
	a := r.Attributes
	if a == nil {
		return invalid("attributes are missing")
	}
	at, err := m.locate(r.Path, r.Staged)
	if err != nil {
		return err
	}
	defer at.close()
	if err := as(a.Uid, a.Gid, func() error {
		switch a.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			return unix.Mkdirat(at.dir, at.name, a.Mode&0o7777)
		case unix.S_IFLNK:
			return unix.Symlinkat(r.Target, at.dir, at.name)
		case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
			return unix.Mknodat(at.dir, at.name, a.Mode, int(r.Rdev))
		}
		return invalid("mode %#o has no type", a.Mode)
	}); err != nil {
		return err
	}
	fd, err := at.look()
	if err != nil {
		return err
	}
	if r.Path == "" && !r.Staged {
		if m.root >= 0 {
			_ = unix.Close(m.root)
		}
		if m.root, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			m.root = -1
			return errors.Join(err, unix.Close(fd))
		}
	}
	defer unix.Close(fd)
	_, err = settle(fd, a)
	if err == nil && a.Mode&unix.S_IFMT != unix.S_IFDIR { // a directory's time changes with what comes into it
		err = setTimes(at, fd, a)
	}
	return err
}

// settle sets owner, mode and extended attributes that differ, and tells whether any did.
func settle(fd int, a *agentv1.MirrorAttributes) (changed bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT != a.Mode&unix.S_IFMT {
		return false, invalid("it is of another type")
	}
	if st.Uid != a.Uid || st.Gid != a.Gid {
		if err := unix.Fchownat(fd, "", int(a.Uid), int(a.Gid), unix.AT_EMPTY_PATH); err != nil {
			return false, fmt.Errorf("change owner: %w", err)
		}
		changed = true
	}
	if a.Mode&unix.S_IFMT == unix.S_IFLNK {
		return changed, nil
	}
	set, err := settleXattrs(procPath(fd), a.Xattrs) // an owner's change takes some away, and some set the mode
	if err != nil {
		return false, err
	}
	changed = changed || set
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if st.Mode != a.Mode {
		if err := unix.Chmod(procPath(fd), a.Mode&0o7777); err != nil {
			return false, fmt.Errorf("change mode: %w", err)
		}
		changed = true
	}
	return changed, nil
}

// settleXattrs makes extended attributes what they should be, and tells whether they were not.
func settleXattrs(file string, want map[string][]byte) (changed bool, err error) {
	have, err := listXattrs(file)
	if err != nil {
		return false, err
	}
	for _, name := range have {
		if _, ok := want[name]; ok || name == "security.selinux" {
			continue
		}
		if err := unix.Removexattr(file, name); err != nil {
			return false, fmt.Errorf("remove attribute %s: %w", name, err)
		}
		changed = true
	}
	for name, value := range want {
		buf := make([]byte, len(value)+1)
		n, err := unix.Getxattr(file, name, buf)
		if err == nil && string(buf[:n]) == string(value) {
			continue
		}
		if err := unix.Setxattr(file, name, value, 0); err != nil {
			return false, fmt.Errorf("set attribute %s: %w", name, err)
		}
		changed = true
	}
	return changed, nil
}

func listXattrs(file string) ([]string, error) {
	buf := make([]byte, 64<<10) // the kernel's own limit
	n, err := unix.Listxattr(file, buf)
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attributes: %w", err)
	}
	return strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00"), nil
}

// setTimes sets the time of the last modification as utime does: watches see changed attributes.
func setTimes(at place, fd int, a *agentv1.MirrorAttributes) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, {Sec: a.MtimeSec, Nsec: int64(a.MtimeNsec)}}
	var err error
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		err = unix.UtimesNanoAt(at.dir, at.name, times, unix.AT_SYMLINK_NOFOLLOW)
	} else { // by the descriptor: the name may be gone
		err = unix.UtimesNanoAt(unix.AT_FDCWD, procPath(fd), times, 0)
	}
	if err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

func (m *mirror) setAttributes(r *agentv1.MirrorSetAttributes) error {
	a := r.Attributes
	if a == nil {
		return invalid("attributes are missing")
	}
	fd, err := m.look(r.Path, r.Staged)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	changed, err := settle(fd, a)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	sameTime := st.Mtim.Sec == a.MtimeSec && st.Mtim.Nsec == int64(a.MtimeNsec)
	// One event is enough. A directory's time is the guest's own anyhow, once something was made in it.
	if changed && (sameTime || isDir) {
		return nil
	}
	at, err := m.locate(r.Path, r.Staged)
	if err != nil {
		return err
	}
	defer at.close()
	return setTimes(at, fd, a)
}

// write writes to a file. The change of its time at the end, which is not accompanied by one of the access
// time, is a modification to watches.
func (m *mirror) write(r *agentv1.MirrorWrite) (err error) {
	fd, err := m.openWritten(r.Path, r.Staged)
	if err != nil {
		return err
	}
	if r.Staged {
		defer unix.Close(fd)
	}
	for _, e := range r.Extents {
		for done := 0; done < len(e.Data); {
			n, err := unix.Pwrite(fd, e.Data[done:], int64(e.Offset)+int64(done))
			if err != nil {
				return err
			}
			done += n
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Size != int64(r.Size) {
		if err := unix.Ftruncate(fd, int64(r.Size)); err != nil {
			return err
		}
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: r.MtimeSec, Nsec: int64(r.MtimeNsec)}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, procPath(fd), times, 0); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// openWritten opens a regular file for writing. One of the tree stays open, and is found there.
func (m *mirror) openWritten(p string, staged bool) (int, error) {
	found, err := m.look(p, staged)
	if err != nil {
		return -1, err
	}
	defer unix.Close(found)
	var st unix.Stat_t
	if err := unix.Fstat(found, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, invalid("it is not a regular file")
	}
	if !staged {
		if i := m.findOpen(st.Ino); i >= 0 {
			return m.open[i].fd, nil
		}
	}
	fd, err := unix.Open(procPath(found), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil || staged {
		return fd, err
	}
	if len(m.open) >= maxOpen {
		m.closeFile(0)
	}
	m.open = append(m.open, openFile{st.Ino, fd})
	return fd, nil
}

func (m *mirror) findOpen(ino uint64) int {
	for i := range m.open {
		if m.open[i].ino == ino {
			return i
		}
	}
	return -1
}

func (m *mirror) closeFile(i int) {
	_ = unix.Close(m.open[i].fd)
	m.open = append(m.open[:i], m.open[i+1:]...)
}

// closeWritten closes a file; one that was not written is opened first: that is what happened on the host.
func (m *mirror) closeWritten(p string) error {
	fd, err := m.openWritten(p, false)
	if err != nil {
		return err
	}
	for i := range m.open {
		if m.open[i].fd == fd {
			m.closeFile(i)
			break
		}
	}
	return nil
}

func (m *mirror) publish(r *agentv1.MirrorPublish) error {
	from, err := m.locate(r.Staged, true)
	if err != nil {
		return fmt.Errorf("%s: %w", r.Staged, err)
	}
	defer from.close()
	to, err := m.locate(r.Path, false)
	if err != nil {
		return err
	}
	defer to.close()
	if !r.Moved {
		// A link is a file that appears: a rename would be one that is moved in.
		if err := unix.Linkat(from.dir, from.name, to.dir, to.name, 0); err != nil {
			return err
		}
		return unix.Unlinkat(from.dir, from.name, 0)
	}
	err = unix.Renameat2(from.dir, from.name, to.dir, to.name, 0)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		// Something of another type is there, of whose end the host has not heard.
		if err := removeAll(to.dir, to.name, 0); err != nil {
			return err
		}
		err = unix.Renameat2(from.dir, from.name, to.dir, to.name, 0)
	}
	return err
}

func (m *mirror) link(r *agentv1.MirrorLink) error {
	from, err := m.locate(r.Path, r.Staged)
	if err != nil {
		return err
	}
	defer from.close()
	to, err := m.locate(r.Link, r.LinkStaged)
	if err != nil {
		return err
	}
	defer to.close()
	return unix.Linkat(from.dir, from.name, to.dir, to.name, 0)
}

func (m *mirror) rename(r *agentv1.MirrorRename) error {
	if r.Path == "" || r.To == "" {
		return invalid("the root cannot be renamed")
	}
	from, err := m.locate(r.Path, false)
	if err != nil {
		return err
	}
	defer from.close()
	to, err := m.locate(r.To, false)
	if err != nil {
		return err
	}
	defer to.close()
	var flags uint
	if r.Exchange {
		flags = unix.RENAME_EXCHANGE
	}
	return unix.Renameat2(from.dir, from.name, to.dir, to.name, flags)
}

func (m *mirror) remove(r *agentv1.MirrorRemove) error {
	at, err := m.locate(r.Path, false)
	if err != nil {
		return err
	}
	defer at.close()
	var st unix.Stat_t
	if err := unix.Fstatat(at.dir, at.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if !r.Moved {
		err = removeAll(at.dir, at.name, 0)
	} else {
		const gone = "gone"
		if err := unix.Renameat2(at.dir, at.name, m.stage, gone, 0); err != nil {
			return err
		}
		err = removeAll(m.stage, gone, 0)
	}
	if i := m.findOpen(st.Ino); i >= 0 && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink <= 1 {
		m.closeFile(i)
	}
	return err
}

// maxDepth bounds how deep removeAll goes.
const maxDepth = 256

// removeAll removes what has a name, a directory with all that is in it.
func removeAll(dir int, name string, depth int) error {
	err := unix.Unlinkat(dir, name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	if depth >= maxDepth {
		return unix.ELOOP
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, below := range names {
		if err := removeAll(int(f.Fd()), below, depth+1); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}
