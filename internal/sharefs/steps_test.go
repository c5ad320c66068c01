package sharefs_test

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// run does a step with raw system calls, so that nothing but the kernel decides.
func (s step) run(dir string) (string, error) {
	at := func(path string) string { return dir + "/" + path }
	switch s.Do {
	case "create", "open", "append", "write", "truncate-open":
		flags := map[string]int{
			"create": unix.O_CREAT | unix.O_EXCL | unix.O_RDWR, "open": s.A, "append": unix.O_WRONLY | unix.O_APPEND,
			"write": unix.O_WRONLY, "truncate-open": unix.O_WRONLY | unix.O_TRUNC,
		}[s.Do]
		fd, err := unix.Open(at(s.Path), flags, s.Mode)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		if len(s.Text) > 0 {
			_, err = unix.Write(fd, s.Text)
		}
		return "", err
	case "read":
		fd, err := unix.Open(at(s.Path), unix.O_RDONLY, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		return string(buf[:max(n, 0)]), err
	case "tmpfile":
		fd, err := unix.Open(at(s.Path), unix.O_TMPFILE|unix.O_RDWR, s.Mode)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		return "", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, at(s.Path2), unix.AT_SYMLINK_FOLLOW)
	case "mkdir":
		return "", unix.Mkdir(at(s.Path), s.Mode)
	case "mknod":
		return "", unix.Mknod(at(s.Path), s.Mode, s.A)
	case "symlink":
		return "", unix.Symlink(s.Path2, at(s.Path))
	case "readlink":
		buf := make([]byte, 4096)
		n, err := unix.Readlink(at(s.Path), buf)
		return string(buf[:max(n, 0)]), err
	case "link":
		return "", unix.Link(at(s.Path), at(s.Path2))
	case "unlink":
		return "", unix.Unlink(at(s.Path))
	case "rmdir":
		return "", unix.Rmdir(at(s.Path))
	case "rename":
		return "", unix.Renameat2(unix.AT_FDCWD, at(s.Path), unix.AT_FDCWD, at(s.Path2), uint(s.A))
	case "chmod":
		return "", unix.Chmod(at(s.Path), s.Mode)
	case "chown":
		return "", unix.Lchown(at(s.Path), s.A, s.B)
	case "truncate":
		return "", unix.Truncate(at(s.Path), int64(s.A))
	case "utimes":
		return "", unix.UtimesNanoAt(unix.AT_FDCWD, at(s.Path), []unix.Timespec{{Sec: int64(s.A), Nsec: 5}, {Sec: int64(s.B), Nsec: 6}}, unix.AT_SYMLINK_NOFOLLOW)
	case "touch":
		return "", unix.UtimesNanoAt(unix.AT_FDCWD, at(s.Path), []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}, 0)
	case "access":
		return "", unix.Faccessat2(unix.AT_FDCWD, at(s.Path), s.Mode, unix.AT_EACCESS)
	case "setxattr":
		return "", unix.Lsetxattr(at(s.Path), s.Path2, s.Text, 0)
	case "getxattr":
		buf := make([]byte, 4096)
		n, err := unix.Lgetxattr(at(s.Path), s.Path2, buf)
		return fmt.Sprintf("%q", buf[:max(n, 0)]), err
	case "removexattr":
		return "", unix.Lremovexattr(at(s.Path), s.Path2)
	case "listxattr":
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(at(s.Path), buf)
		return fmt.Sprintf("%q", buf[:max(n, 0)]), err
	case "fallocate":
		fd, err := unix.Open(at(s.Path), unix.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		return "", unix.Fallocate(fd, s.Mode, int64(s.A), int64(s.B))
	case "holes":
		fd, err := unix.Open(at(s.Path), unix.O_RDONLY, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		data, err := unix.Seek(fd, 0, unix.SEEK_DATA)
		if err != nil {
			return "", err
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		return fmt.Sprint(data, hole), err
	case "copy":
		return copyRange(at(s.Path), at(s.Path2))
	case "flags":
		fd, err := unix.Open(at(s.Path), unix.O_RDONLY, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		if err != nil || s.A == 0 {
			return fmt.Sprintf("%#x", flags), err
		}
		if err := unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|s.A); err != nil {
			return "", err
		}
		flags, err = unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		return fmt.Sprintf("%#x", flags), err
	case "list":
		fd, err := unix.Open(at(s.Path), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		var names []string
		buf := make([]byte, 8192)
		for {
			n, err := unix.ReadDirent(fd, buf)
			if err != nil || n == 0 {
				return strings.Join(names, " "), err
			}
			_, _, names = unix.ParseDirent(buf[:n], -1, names)
		}
	case "stat":
		var st unix.Stat_t
		if err := unix.Lstat(at(s.Path), &st); err != nil {
			return "", err
		}
		return fmt.Sprintf("%o %d:%d %d links %d rdev %d", st.Mode, st.Uid, st.Gid, st.Size*b2i(st.Mode&unix.S_IFMT != unix.S_IFDIR), st.Nlink, st.Rdev), nil
	case "times":
		var st unix.Stat_t
		err := unix.Lstat(at(s.Path), &st)
		return fmt.Sprint(st.Atim, st.Mtim), err
	}
	return "", errors.New("no such step: " + s.Do)
}

func b2i(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func copyRange(from, to string) (string, error) {
	in, err := unix.Open(from, unix.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(in)
	out, err := unix.Open(to, unix.O_WRONLY|unix.O_CREAT, 0o644)
	if err != nil {
		return "", err
	}
	defer unix.Close(out)
	n, err := unix.CopyFileRange(in, nil, out, nil, 100, 0)
	return fmt.Sprint(n), err
}
