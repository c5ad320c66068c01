package stage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// setupContainer makes the process the init of a new container: when it returns
// nil, the container's root is the root and everything in it is in place.
//
// The process enters the container's root before it makes anything there. From
// then on whatever symlinks the image holds can lead nowhere else.
func setupContainer(c *Container, p *program) error {
	if c.NewCgroupNS {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("unshare cgroup namespace: %w", err)
		}
	}
	if err := setNames(c); err != nil {
		return err
	}
	if c.NewNetNS {
		if err := loopback(); err != nil {
			return err
		}
	}
	// What has to be taken from outside.
	sysctl, err := unix.Open("/proc/sys", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /proc/sys: %w", err)
	}
	defer unix.Close(sysctl)
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	trees, err := takeTrees(c.Mounts)
	if err != nil {
		return err
	}
	nodes, err := takeNodes(c.Devices)
	if err != nil {
		return err
	}
	if err := enterRoot(c.Root); err != nil {
		return err
	}

	unix.Umask(0)
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if err := mount(m, trees[i]); err != nil {
			return fmt.Errorf("mount %q to rootfs at %q: %w", m.Source, m.Destination, err)
		}
	}
	if !bindsDev(c.Mounts) {
		if err := setupDev(c.Devices, nodes); err != nil {
			return err
		}
	}
	if err := makeDir(p.Cwd); err != nil {
		return fmt.Errorf("mkdir %s: %w", p.Cwd, err)
	}
	if p.Terminal {
		if err := p.makeTerminal(); err != nil {
			return err
		}
		if err := mountConsole(); err != nil {
			return fmt.Errorf("mount /dev/console: %w", err)
		}
	}
	if err := reopenNull(); err != nil {
		return fmt.Errorf("reopen /dev/null: %w", err)
	}
	if err := WriteSysctl(sysctl, c.Sysctl); err != nil {
		return err
	}
	return closeRoot(c)
}

// loopback brings up the one interface of a new network namespace.
func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	return nil
}

func setNames(c *Container) error {
	if c.Hostname != "" {
		if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
			return fmt.Errorf("set hostname: %w", err)
		}
	}
	if c.Domainname != "" {
		if err := unix.Setdomainname([]byte(c.Domainname)); err != nil {
			return fmt.Errorf("set domainname: %w", err)
		}
	}
	return nil
}

// takeTrees makes the detached mounts that can be made outside only, by index: copies of the
// sources of bind mounts, and new file systems of processes and devices, which a user namespace may
// have only while it sees another one.
func takeTrees(mounts []Mount) (map[int]int, error) {
	trees := make(map[int]int)
	for i := range mounts {
		m := &mounts[i]
		var err error
		switch m.Type {
		case "bind":
			if m.Flags&unix.MS_REMOUNT != 0 || m.Inside {
				continue
			}
			flags := uint(unix.AT_SYMLINK_NOFOLLOW)
			if m.Flags&unix.MS_REC != 0 {
				flags |= unix.AT_RECURSIVE
			}
			if trees[i], err = cloneTree(unix.AT_FDCWD, m.Source, flags); err != nil {
				return nil, fmt.Errorf("open source %q of mount at %q: %w", m.Source, m.Destination, err)
			}
		case "proc", "sysfs":
			if trees[i], err = newTree(m); err != nil {
				return nil, fmt.Errorf("mount %q to rootfs at %q: %w", m.Source, m.Destination, err)
			}
		}
	}
	return trees, nil
}

func cloneTree(dir int, path string, flags uint) (int, error) {
	return unix.OpenTree(dir, path, flags|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
}

// newTree makes a new file system and leaves it attached nowhere.
func newTree(m *Mount) (int, error) {
	const at = "/proc"
	if err := unix.Mount(m.Source, at, m.Type, m.Flags, m.Data); err != nil {
		return -1, err
	}
	tree, err := cloneTree(unix.AT_FDCWD, at, 0)
	return tree, errors.Join(err, unix.Unmount(at, unix.MNT_DETACH))
}

// enterRoot makes dir the root and working directory, and lets go of the old root.
func enterRoot(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind rootfs %s: %w", dir, err)
	}
	old, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open old root: %w", err)
	}
	defer unix.Close(old)
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("chdir to rootfs: %w", err)
	}
	// The old root ends up on top of the new one, from where it is unmounted.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Fchdir(old); err != nil {
		return fmt.Errorf("chdir to old root: %w", err)
	}
	if err := unix.Mount("", ".", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make old root private: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("chdir to new root: %w", err)
	}
	return nil
}

// closeRoot takes away what the container must not write or see.
func closeRoot(c *Container) error {
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if staysWritable(m) && m.Flags&unix.MS_RDONLY != 0 {
			if err := setReadonly(m.Destination, 0); err != nil {
				return fmt.Errorf("make %s read-only: %w", m.Destination, err)
			}
		}
	}
	// What may not be bound any more has to be bound before.
	unbindable := c.RootPropagation&unix.MS_UNBINDABLE != 0
	if !unbindable {
		if err := propagate(c.RootPropagation); err != nil {
			return err
		}
	}
	if c.ReadonlyRoot {
		if err := setReadonly("/", 0); err != nil {
			return fmt.Errorf("make rootfs read-only: %w", err)
		}
	}
	for _, path := range c.ReadonlyPaths {
		if err := makeReadonly(path); err != nil {
			return fmt.Errorf("make %s read-only: %w", path, err)
		}
	}
	for _, path := range c.MaskedPaths {
		if err := mask(path); err != nil {
			return fmt.Errorf("mask %s: %w", path, err)
		}
	}
	if unbindable {
		return propagate(c.RootPropagation)
	}
	return nil
}

// propagate sets how mounts in the root propagate; 0: as it is.
func propagate(flags uintptr) error {
	if flags == 0 {
		return nil
	}
	if err := unix.Mount("", "/", "", flags, ""); err != nil {
		return fmt.Errorf("set rootfs propagation: %w", err)
	}
	return nil
}

// open opens a path in the container. Links of /proc that lead to what a process
// has open are not followed: this process has things from outside open.
func open(path string, flags int) (int, error) {
	return unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_NO_MAGICLINKS,
	})
}

// openDir opens a directory of the container, O_PATH, and creates it and its
// parents, mode 0755, when they are missing: also those that links lead to.
func openDir(path string) (int, error) {
	fd, err := open("/"+path, unix.O_PATH|unix.O_DIRECTORY)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	if path, err = resolve(path); err != nil {
		return -1, err
	}
	if err := makeDirs(path); err != nil {
		return -1, err
	}
	return open(path, unix.O_PATH|unix.O_DIRECTORY)
}

// makeDirs makes a directory and its parents. There are no links in path.
func makeDirs(path string) error {
	err := unix.Mkdir(path, 0o755)
	if errors.Is(err, unix.ENOENT) {
		if err := makeDirs(filepath.Dir(path)); err != nil {
			return err
		}
		err = unix.Mkdir(path, 0o755)
	}
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// maxLinks is how many links a path may lead through: as many as for the kernel.
const maxLinks = 40

// resolve returns a path in the container as one without links. What is missing counts as directories.
func resolve(path string) (string, error) {
	done, rest := "/", path
	buf := make([]byte, unix.PathMax)
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if name == "" || name == "." {
			continue
		}
		if name == ".." {
			done = filepath.Dir(done)
			continue
		}
		next := filepath.Join(done, name)
		n, err := unix.Readlink(next, buf)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // no link, or nothing
			done = next
			continue
		}
		if err != nil {
			return "", err
		}
		if links++; links > maxLinks {
			return "", unix.ELOOP
		}
		target := string(buf[:n])
		if filepath.IsAbs(target) {
			done = "/"
		}
		rest = target + "/" + rest
	}
	return done, nil
}

// exists tells whether something is at a path of the container.
func exists(path string) bool {
	fd, err := open("/"+path, unix.O_PATH)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

func makeDir(path string) error {
	fd, err := openDir(path)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// openFile opens whatever is at path, O_PATH, and creates an empty file and its
// parents when nothing is, where links lead to.
func openFile(path string, mode uint32) (int, error) {
	fd, err := open("/"+path, unix.O_PATH)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	if path, err = resolve(path); err != nil {
		return -1, err
	}
	if err := makeDirs(filepath.Dir(path)); err != nil {
		return -1, err
	}
	if err := unix.Mknod(path, unix.S_IFREG|mode, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	return open(path, unix.O_PATH)
}

func clean(path string) string { return filepath.Clean("/" + path) }

// mount makes one mount of the specification. tree is the source of a bind.
func mount(m *Mount, tree int) error {
	if m.Type == "bind" {
		return mountBind(m, tree)
	}
	isNew := !exists(m.Destination)
	target, err := openTarget(m)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	if m.Type == "proc" || m.Type == "sysfs" {
		defer unix.Close(tree)
		if err := attach(tree, target); err != nil {
			return err
		}
		return setPropagation(m)
	}
	flags, data := m.Flags, m.Data
	if staysWritable(m) {
		flags &^= unix.MS_RDONLY
	}
	if m.Type == "tmpfs" && !isNew {
		var st unix.Stat_t
		if err := unix.Fstat(target, &st); err != nil {
			return err
		}
		// A mode in the options comes later and wins.
		data = strings.TrimSuffix(fmt.Sprintf("mode=%04o,%s", st.Mode&0o7777, data), ",")
	}
	// Relative to the working directory no link is in the way.
	if err := unix.Fchdir(target); err != nil {
		return err
	}
	defer func() { _ = unix.Chdir("/") }()
	if err := unix.Mount(m.Source, ".", m.Type, flags, data); err != nil {
		return err
	}
	if m.CopyUp {
		if err := copyUp(target, m.Destination); err != nil {
			return fmt.Errorf("copy up: %w", err)
		}
	}
	return setPropagation(m)
}

// staysWritable tells of mounts that become read-only last: places of other mounts, nodes of
// devices and copies are made on them before.
func staysWritable(m *Mount) bool { return m.Type != "bind" && (m.Type == "tmpfs" || isDev(m)) }

// openTarget opens the directory to mount on. /proc and /sys are special to many
// programs and to maskedPaths, so they must be where they seem to be.
func openTarget(m *Mount) (int, error) {
	target, err := openDir(m.Destination)
	if err != nil || (m.Type != "proc" && m.Type != "sysfs") {
		return target, err
	}
	unix.Close(target)
	target, err = unix.Openat2(unix.AT_FDCWD, clean(m.Destination), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if errors.Is(err, unix.ELOOP) {
		err = fmt.Errorf("filesystem %q must be mounted on ordinary directory", m.Type)
	}
	return target, err
}

func mountBind(m *Mount, tree int) error {
	if m.Flags&unix.MS_REMOUNT != 0 {
		return remount(m)
	}
	if m.Inside {
		var err error
		if tree, err = takeInside(m); err != nil {
			return err
		}
	}
	defer unix.Close(tree)
	if err := setAttr(tree, m.Set, m.Clear, 0); err != nil {
		return err
	}
	if err := setAttr(tree, m.RecSet, m.RecClear, unix.AT_RECURSIVE); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(tree, &st); err != nil {
		return err
	}
	var target int
	var err error
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		target, err = openDir(m.Destination)
	} else {
		target, err = openFile(m.Destination, 0o755)
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	if err := attach(tree, target); err != nil {
		return err
	}
	return setPropagation(m)
}

// takeInside copies what the container has at the source of a bind now.
func takeInside(m *Mount) (int, error) {
	source, err := open(m.Source, unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer unix.Close(source)
	flags := uint(unix.AT_EMPTY_PATH)
	if m.Flags&unix.MS_REC != 0 {
		flags |= unix.AT_RECURSIVE
	}
	return cloneTree(source, "", flags)
}

// remount changes the mount at the destination.
func remount(m *Mount) error {
	fd, err := open("/"+m.Destination, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := setAttr(fd, m.Set, m.Clear, 0); err != nil {
		return err
	}
	if err := setAttr(fd, m.RecSet, m.RecClear, unix.AT_RECURSIVE); err != nil {
		return err
	}
	return setPropagation(m)
}

// attach mounts a detached tree on what target is.
func attach(tree, target int) error {
	return unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

func setAttr(fd int, set, clr uint64, flags uint) error {
	if set == 0 && clr == 0 {
		return nil
	}
	return unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|flags, &unix.MountAttr{Attr_set: set, Attr_clr: clr})
}

func setPropagation(m *Mount) error {
	if len(m.Propagation) == 0 {
		return nil
	}
	fd, err := open(clean(m.Destination), unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, flag := range m.Propagation {
		attr := unix.MountAttr{Propagation: uint64(flag &^ unix.MS_REC)}
		flags := uint(unix.AT_EMPTY_PATH)
		if flag&unix.MS_REC != 0 {
			flags |= unix.AT_RECURSIVE
		}
		if err := unix.MountSetattr(fd, "", flags, &attr); err != nil {
			return fmt.Errorf("set propagation: %w", err)
		}
	}
	return nil
}

// setReadonly makes the mount at path read-only.
func setReadonly(path string, flags uint) error {
	fd, err := open(clean(path), unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return setAttr(fd, unix.MOUNT_ATTR_RDONLY, 0, flags)
}

// makeReadonly mounts what is at path over itself, read-only. Nothing there is fine.
func makeReadonly(path string) error {
	target, err := open(clean(path), unix.O_PATH)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	tree, err := cloneTree(target, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := setAttr(tree, unix.MOUNT_ATTR_RDONLY, 0, unix.AT_RECURSIVE); err != nil {
		return err
	}
	return attach(tree, target)
}

// mask hides what is at path: a directory under an empty one, a file under
// /dev/null. Nothing there is fine.
func mask(path string) error {
	target, err := open(clean(path), unix.O_PATH)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	var st unix.Stat_t
	if err := unix.Fstat(target, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := unix.Fchdir(target); err != nil {
			return err
		}
		defer func() { _ = unix.Chdir("/") }()
		return unix.Mount("tmpfs", ".", "tmpfs", unix.MS_RDONLY, "")
	}
	null, err := openNull(unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(null)
	tree, err := cloneTree(null, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return attach(tree, target)
}

func missing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

// WriteSysctl writes kernel parameters of the caller's namespaces through dir, which is the agent's
// /proc/sys: the container's could be anything.
func WriteSysctl(dir int, values []Sysctl) error {
	for _, v := range values {
		path := strings.ReplaceAll(v.Name, ".", "/")
		fd, err := unix.Openat2(dir, path, &unix.OpenHow{
			Flags:   unix.O_WRONLY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if err != nil {
			return fmt.Errorf("open sysctl %s: %w", v.Name, err)
		}
		f := os.NewFile(uintptr(fd), v.Name)
		_, err = f.WriteString(v.Value)
		f.Close()
		if err != nil {
			return fmt.Errorf("write sysctl %s: %w", v.Name, fault.Cause(err))
		}
	}
	return nil
}
