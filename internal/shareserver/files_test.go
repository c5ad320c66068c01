package shareserver_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// errno is what a step gave that has no other result.
func errno(err error) string {
	if err == nil {
		return "ok"
	}
	if e, ok := errors.AsType[unix.Errno](err); ok {
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// withFile opens a file for a step.
func withFile(path string, flags int, f func(fd int) string) string {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return errno(err)
	}
	defer unix.Close(fd)
	return f(fd)
}

func statOf(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return errno(err)
	}
	size := st.Size
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		size = 0
	}
	return fmt.Sprintf("%o %d:%d %d %d %d", st.Mode, st.Uid, st.Gid, st.Nlink, size, st.Rdev)
}

const noatime = 0x80 // FS_NOATIME_FL, linux/fs.h

// A step does something in a directory and tells what it gave.
type step struct {
	name string
	do   func(dir string) string
}

// steps make use of every request that the server answers.
func steps() []step {
	at := filepath.Join
	return []step{
		{"create", func(d string) string { return errno(os.WriteFile(at(d, "file"), []byte("some text"), 0o640)) }},
		{"read", func(d string) string { b, err := os.ReadFile(at(d, "file")); return string(b) + errno(err) }},
		{"append", func(d string) string {
			return withFile(at(d, "file"), unix.O_WRONLY|unix.O_APPEND, func(fd int) string {
				_, err := unix.Write(fd, []byte(", and more"))
				return errno(err) + statOf(at(d, "file"))
			})
		}},
		{"large write", func(d string) string {
			text := strings.Repeat("0123456789abcdef", 200_000)
			err := os.WriteFile(at(d, "large"), []byte(text), 0o600)
			b, err2 := os.ReadFile(at(d, "large"))
			return errno(errors.Join(err, err2)) + fmt.Sprint(string(b) == text)
		}},
		{"mkdir", func(d string) string { return errno(unix.Mkdir(at(d, "dir"), 0o2775)) + statOf(at(d, "dir")) }},
		{"mknod", func(d string) string {
			return errno(unix.Mknod(at(d, "fifo"), unix.S_IFIFO|0o600, 0)) +
				errno(unix.Mknod(at(d, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))) + statOf(at(d, "fifo")) + statOf(at(d, "null"))
		}},
		{"symlink", func(d string) string {
			err := unix.Symlink("some/where", at(d, "link"))
			target, err2 := os.Readlink(at(d, "link"))
			return errno(errors.Join(err, err2)) + target + statOf(at(d, "link"))
		}},
		{"link", func(d string) string { return errno(unix.Link(at(d, "file"), at(d, "file2"))) + statOf(at(d, "file2")) }},
		{"rename", func(d string) string {
			return errno(unix.Rename(at(d, "file2"), at(d, "dir/moved"))) + statOf(at(d, "dir/moved"))
		}},
		{"exchange", func(d string) string {
			return errno(unix.Renameat2(unix.AT_FDCWD, at(d, "large"), unix.AT_FDCWD, at(d, "dir/moved"), unix.RENAME_EXCHANGE)) +
				statOf(at(d, "large"))
		}},
		{"no replace", func(d string) string {
			return errno(unix.Renameat2(unix.AT_FDCWD, at(d, "large"), unix.AT_FDCWD, at(d, "dir/moved"), unix.RENAME_NOREPLACE))
		}},
		{"chmod", func(d string) string { return errno(unix.Chmod(at(d, "file"), 0o4711)) + statOf(at(d, "file")) }},
		{"chown", func(d string) string { return errno(unix.Lchown(at(d, "link"), 12, 34)) + statOf(at(d, "link")) }},
		{"truncate", func(d string) string { return errno(unix.Truncate(at(d, "file"), 5)) + statOf(at(d, "file")) }},
		{"times", func(d string) string {
			err := unix.UtimesNanoAt(unix.AT_FDCWD, at(d, "link"), []unix.Timespec{{Sec: 5, Nsec: 6}, {Sec: 7, Nsec: 8}}, unix.AT_SYMLINK_NOFOLLOW)
			var st unix.Stat_t
			_ = unix.Lstat(at(d, "link"), &st)
			return errno(err) + fmt.Sprint(st.Atim, st.Mtim)
		}},
		{"access", func(d string) string { return errno(unix.Access(at(d, "file"), unix.R_OK)) }},
		{"attributes", func(d string) string {
			list := make([]byte, 1000)
			value := make([]byte, 100)
			err := unix.Setxattr(at(d, "file"), "user.one", []byte("value"), 0)
			n, err2 := unix.Getxattr(at(d, "file"), "user.one", value)
			m, err3 := unix.Listxattr(at(d, "file"), list)
			err4 := unix.Removexattr(at(d, "file"), "user.one")
			_, err5 := unix.Getxattr(at(d, "file"), "user.one", nil)
			return fmt.Sprintf("%s %q %s %q %s %s %s", errno(err), value[:max(n, 0)], errno(err2), list[:max(m, 0)], errno(err3), errno(err4), errno(err5))
		}},
		{"attributes of a link", func(d string) string {
			return errno(unix.Lsetxattr(at(d, "link"), "user.one", []byte("value"), 0))
		}},
		{"file capabilities", func(d string) string {
			value := []byte{1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
			return errno(unix.Setxattr(at(d, "file"), "security.capability", value, 0))
		}},
		{"allocate", func(d string) string {
			_ = unix.Chmod(at(d, "file"), 0o640) // allocating takes a set-user-id bit away, whoever does it
			return withFile(at(d, "file"), unix.O_RDWR, func(fd int) string {
				return errno(unix.Fallocate(fd, 0, 0, 10_000)) + errno(unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)) +
					statOf(at(d, "file"))
			})
		}},
		{"holes", func(d string) string {
			return withFile(at(d, "sparse"), unix.O_RDWR|unix.O_CREAT, func(fd int) string {
				_ = unix.Ftruncate(fd, 1<<20)
				_, _ = unix.Pwrite(fd, []byte("x"), 1<<19)
				data, err := unix.Seek(fd, 0, unix.SEEK_DATA)
				hole, err2 := unix.Seek(fd, data, unix.SEEK_HOLE)
				return fmt.Sprint(data, errno(err), hole, errno(err2))
			})
		}},
		{"copy", func(d string) string {
			return withFile(at(d, "file"), unix.O_RDONLY, func(from int) string {
				return withFile(at(d, "copy"), unix.O_WRONLY|unix.O_CREAT, func(to int) string {
					n, err := unix.CopyFileRange(from, nil, to, nil, 1000, 0)
					return fmt.Sprint(n, errno(err))
				})
			})
		}},
		{"sync", func(d string) string {
			return withFile(at(d, "file"), unix.O_RDWR, func(fd int) string {
				return errno(unix.Fsync(fd)) + errno(unix.Fdatasync(fd)) + errno(unix.Syncfs(fd))
			}) + withFile(d, unix.O_RDONLY|unix.O_DIRECTORY, func(fd int) string { return errno(unix.Fsync(fd)) })
		}},
		{"mapping", func(d string) string {
			return withFile(at(d, "mapped"), unix.O_RDWR|unix.O_CREAT, func(fd int) string {
				_ = unix.Ftruncate(fd, 8192)
				mem, err := unix.Mmap(fd, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err != nil {
					return errno(err)
				}
				copy(mem[4090:], "across pages")
				err = errors.Join(unix.Msync(mem, unix.MS_SYNC), unix.Munmap(mem))
				b, err2 := os.ReadFile(at(d, "mapped"))
				return errno(errors.Join(err, err2)) + strings.Trim(string(b), "\x00")
			})
		}},
		{"file without a name", func(d string) string {
			return withFile(d, unix.O_TMPFILE|unix.O_RDWR, func(fd int) string {
				err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, at(d, "named"), unix.AT_SYMLINK_FOLLOW)
				return errno(err) + statOf(at(d, "named"))
			})
		}},
		{"flags", func(d string) string {
			return withFile(at(d, "file"), unix.O_RDONLY, func(fd int) string {
				err := unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, noatime)
				flags, err2 := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
				return fmt.Sprintf("%s %#x %s", errno(err), flags, errno(err2))
			})
		}},
		{"locks", func(d string) string {
			return withFile(at(d, "lock1"), unix.O_RDWR|unix.O_CREAT, func(a int) string {
				return withFile(at(d, "lock1"), unix.O_RDWR|unix.O_CREAT, func(b int) string {
					lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
					first := unix.FcntlFlock(uintptr(a), unix.F_OFD_SETLK, &lock)
					second := unix.FcntlFlock(uintptr(b), unix.F_OFD_SETLK, &lock)
					third := unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB)
					fourth := unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB)
					return fmt.Sprint(errno(first), errno(second), errno(third), errno(fourth))
				})
			})
		}},
		{"wait for a lock", func(d string) string {
			return withFile(at(d, "lock2"), unix.O_RDWR|unix.O_CREAT, func(a int) string {
				return withFile(at(d, "lock2"), unix.O_RDWR|unix.O_CREAT, func(b int) string {
					lock, free := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}, unix.Flock_t{Type: unix.F_UNLCK, Len: 10}
					first := unix.FcntlFlock(uintptr(a), unix.F_OFD_SETLK, &lock)
					done := make(chan error)
					go func() { done <- unix.FcntlFlock(uintptr(b), unix.F_OFD_SETLKW, &lock) }()
					second := unix.FcntlFlock(uintptr(a), unix.F_OFD_SETLK, &free)
					return fmt.Sprint(errno(first), errno(second), errno(<-done))
				})
			})
		}},
		{"lock that ends with its file", func(d string) string {
			lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
			lockBy := func(how int) func(fd int) string {
				return func(fd int) string { return errno(unix.FcntlFlock(uintptr(fd), how, &lock)) }
			}
			first := withFile(at(d, "lock3"), unix.O_RDWR|unix.O_CREAT, lockBy(unix.F_OFD_SETLK))
			return first + withFile(at(d, "dir"), unix.O_RDONLY, func(int) string { // a file that is not the first one's in memory
				return withFile(at(d, "lock3"), unix.O_RDWR, lockBy(unix.F_OFD_SETLKW)) // the end of a file may take a moment
			})
		}},
		{"as somebody else", func(d string) string {
			_ = unix.Mkdir(at(d, "group"), 0)
			_ = unix.Chown(at(d, "group"), 0, 1001)
			_ = unix.Chmod(at(d, "group"), 0o2775)
			cmd := exec.Command("/bin/sh", "-c", "umask 027; cd \"$0\" && : > a && mkdir b && ln -s c d && mkfifo e && cat ../file; stat -c '%n %a %u:%g' *", at(d, "group"))
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1002, Gid: 1003, Groups: []uint32{1001}}}
			out, err := cmd.CombinedOutput()
			return strings.ReplaceAll(string(out), d, "") + errno(err)
		}},
		{"list", func(d string) string {
			entries, err := os.ReadDir(d)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name()+" "+e.Type().String())
			}
			slices.Sort(names)
			return fmt.Sprint(names, errno(err))
		}},
		{"many", func(d string) string {
			_ = unix.Mkdir(at(d, "many"), 0o755)
			for i := range 500 {
				_ = os.WriteFile(at(d, "many", fmt.Sprint(i)), nil, 0o600)
			}
			entries, err := os.ReadDir(at(d, "many"))
			return fmt.Sprint(len(entries), errno(err), errno(os.RemoveAll(at(d, "many"))))
		}},
		{"file system", func(d string) string {
			var st unix.Statfs_t
			err := unix.Statfs(d, &st)
			return fmt.Sprint(errno(err), st.Bsize, st.Blocks, st.Namelen)
		}},
		{"statx", func(d string) string {
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, at(d, "file"), 0, unix.STATX_BASIC_STATS, &st)
			return errno(err) + fmt.Sprint(st.Size, st.Mode)
		}},
		{"remove", func(d string) string {
			return errno(unix.Unlink(at(d, "file"))) + errno(unix.Unlink(at(d, "file"))) + errno(unix.Rmdir(at(d, "dir"))) +
				errno(os.RemoveAll(at(d, "dir"))) + errno(unix.Unlink(at(d, "group")))
		}},
	}
}

// doSteps is a process of its own that does all steps in a directory: one that serves the directory itself would wait for
// itself when it touches a mapped file.
func doSteps(dir string) int {
	var results []string
	for _, step := range steps() {
		results = append(results, step.do(dir))
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		return 1
	}
	return 0
}

// TestFilesUnderFilter shows that the confined server does what the host's file system does: no system call that it needs
// is missing, and no right.
func TestFilesUnderFilter(t *testing.T) {
	s := start(t)
	volume := filepath.Join(s.dir, "volume-1")
	assert.NilError(t, os.Mkdir(volume, 0o755))
	plain := filepath.Join(t.TempDir(), "plain")
	assert.NilError(t, os.Mkdir(plain, 0o755))
	for _, dir := range []string{s.dir, plain} { // others are to reach them
		assert.NilError(t, os.Chmod(filepath.Dir(dir), 0o755))
	}
	var results [2][]string
	for i, dir := range []string{plain, filepath.Join(s.connect(t).mount(t), "volume-1")} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "steps", dir)
		cmd.Stderr = os.Stderr
		cmd.WaitDelay = time.Second
		out, err := cmd.Output()
		assert.NilError(t, err)
		assert.NilError(t, json.Unmarshal(out, &results[i]))
	}
	for i, step := range steps() {
		t.Run(step.name, func(t *testing.T) { assert.Equal(t, results[1][i], results[0][i]) })
	}
	select {
	case <-s.ended:
		t.Fatal("the server has ended")
	default:
	}
}
