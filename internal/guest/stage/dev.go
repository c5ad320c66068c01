package stage

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

func isDev(m *Mount) bool { return clean(m.Destination) == "/dev" }

// bindsDev tells whether the container gets a /dev of its caller's making.
func bindsDev(mounts []Mount) bool {
	for i := range mounts {
		if isDev(&mounts[i]) && mounts[i].Type == "bind" {
			return true
		}
	}
	return false
}

const ptmx = "/dev/ptmx"

// DefaultDevices are what the OCI runtime specification gives every container.
func DefaultDevices() []Device { return slices.Clone(defaultDevices) }

var defaultDevices = []Device{
	{Path: "/dev/null", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 3},
	{Path: "/dev/zero", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 5},
	{Path: "/dev/full", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 7},
	{Path: "/dev/random", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 8},
	{Path: "/dev/urandom", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 9},
	{Path: "/dev/tty", Mode: unix.S_IFCHR | 0o666, Major: 5, Minor: 0},
}

// takeNodes makes detached mounts of the nodes that are to be mounted, by index.
func takeNodes(devices []Device) (map[int]int, error) {
	trees := make(map[int]int)
	for i := range devices {
		d := &devices[i]
		if d.Node == "" {
			continue
		}
		// Only what is attached somewhere can be copied. This goes with the old root.
		if len(trees) == 0 {
			if err := unix.MoveMount(devicesFD, "", unix.AT_FDCWD, "/dev", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
				return nil, fmt.Errorf("mount device nodes: %w", err)
			}
		}
		var err error
		if trees[i], err = cloneTree(unix.AT_FDCWD, "/dev/"+d.Node, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, fmt.Errorf("open device node %s: %w", d.Path, err)
		}
	}
	return trees, nil
}

// setupDev fills /dev. nodes are the nodes to mount, by index in devices.
func setupDev(devices []Device, nodes map[int]int) error {
	for i := range devices {
		d := &devices[i]
		create := makeNode
		if tree, ok := nodes[i]; ok {
			create = func(d *Device) error { return mountNode(d, tree) }
		}
		if err := create(d); err != nil {
			return fmt.Errorf("create device %s: %w", d.Path, err)
		}
	}
	dev, err := openDir("/dev")
	if err != nil {
		return fmt.Errorf("open /dev: %w", err)
	}
	defer unix.Close(dev)
	if err := unix.Unlinkat(dev, "ptmx", 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove /dev/ptmx: %w", err)
	}
	links := [][2]string{
		{"pts/ptmx", "ptmx"},
		{"/proc/self/fd", "fd"},
		{"/proc/self/fd/0", "stdin"},
		{"/proc/self/fd/1", "stdout"},
		{"/proc/self/fd/2", "stderr"},
	}
	if fd, err := open("/proc/kcore", unix.O_PATH); err == nil {
		unix.Close(fd)
		links = append(links, [2]string{"/proc/kcore", "core"})
	}
	for _, l := range links {
		if err := unix.Symlinkat(l[0], dev, l[1]); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("create symlink /dev/%s: %w", l[1], err)
		}
	}
	return nil
}

func makeNode(d *Device) error {
	path := clean(d.Path)
	if path == ptmx {
		return nil // always that of the container's own devpts
	}
	dir, err := openDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	name := filepath.Base(path)
	err = unix.Mknodat(dir, name, d.Mode, int(unix.Mkdev(d.Major, d.Minor)))
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return err
	}
	return unix.Fchownat(dir, name, int(d.UID), int(d.GID), unix.AT_SYMLINK_NOFOLLOW)
}

// mountNode mounts a node on a file at the device's path.
func mountNode(d *Device, tree int) error {
	defer unix.Close(tree)
	path := clean(d.Path)
	if path == ptmx {
		return nil
	}
	target, err := openFile(path, 0o666)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	return attach(tree, target)
}

// openNull opens the container's /dev/null, after making sure that it is one.
func openNull(flags int) (int, error) {
	fd, err := open("/dev/null", flags)
	if err != nil {
		return -1, err
	}
	if !isNull(fd) {
		unix.Close(fd)
		return -1, errors.New("/dev/null is not the null device")
	}
	return fd, nil
}

func isNull(fd int) bool {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// reopenNull replaces those of the descriptors 0, 1 and 2 that are the guest's
// /dev/null by the container's: nothing from outside shall stay open. One that the agent has opened for one
// direction stays so.
func reopenNull() error {
	for fd := range 3 {
		if !isNull(fd) {
			continue
		}
		mode, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		null, err := openNull(mode & unix.O_ACCMODE)
		if errors.Is(err, unix.ENOENT) {
			return nil // a /dev of the caller's making
		}
		if err != nil {
			return err
		}
		err = unix.Dup3(null, fd, 0)
		unix.Close(null)
		if err != nil {
			return err
		}
	}
	return nil
}

// makeTerminal makes a terminal in the container's devpts the process's
// controlling terminal and its descriptors 0, 1 and 2.
func (p *program) makeTerminal() error {
	// In an exec the container's processes may have put anything there.
	master, err := open("/dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK)
	if err != nil {
		return fmt.Errorf("open /dev/pts/ptmx: %w", err)
	}
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(master, &st), unix.Fstatfs(master, &fs)); err != nil {
		return fmt.Errorf("open /dev/pts/ptmx: %w", err)
	}
	if fs.Type != unix.DEVPTS_SUPER_MAGIC || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(5, 2) {
		return errors.New("open /dev/pts/ptmx: not a terminal multiplexer")
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return fmt.Errorf("unlock terminal: %w", err)
	}
	slave, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return fmt.Errorf("open terminal: %w", errno)
	}
	if p.Width != 0 || p.Height != 0 {
		if err := unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Col: p.Width, Row: p.Height}); err != nil {
			return fmt.Errorf("resize terminal: %w", err)
		}
	}
	if err := unix.IoctlSetInt(int(slave), unix.TIOCSCTTY, 0); err != nil {
		return fmt.Errorf("set controlling terminal: %w", err)
	}
	for fd := range 3 {
		if err := unix.Dup3(int(slave), fd, 0); err != nil {
			return fmt.Errorf("set stdio: %w", err)
		}
	}
	unix.Close(int(slave))
	p.master = master
	return nil
}

// mountConsole makes /dev/console the terminal that is descriptor 0.
func mountConsole() error {
	tree, err := cloneTree(0, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	target, err := openFile("/dev/console", 0o666)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	return attach(tree, target)
}
