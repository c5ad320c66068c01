package shareserver_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/shareserver"
)

// call makes a system call under the filter, and returns the error number.
func call(args []string) int {
	numbers := make([]uintptr, 7)
	for i, arg := range args {
		n, err := strconv.ParseUint(arg, 10, 64)
		if err != nil {
			panic(err)
		}
		numbers[i] = uintptr(n)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	if err := shareserver.SetFilter(); err != nil {
		panic(err)
	}
	_, _, errno := unix.Syscall6(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6])
	return int(errno)
}

// ended tells how a process ended that makes a call.
func ended(t *testing.T, numbers ...uint64) string {
	t.Helper()
	args := []string{"call"}
	for _, n := range numbers {
		args = append(args, strconv.FormatUint(n, 10))
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
			return ws.Signal().String()
		}
		return fmt.Sprint(syscall.Errno(exit.ExitCode()))
	}
	assert.NilError(t, err)
	return "done"
}

func TestFilter(t *testing.T) {
	pure(t)
	const killed = "bad system call"
	for name, test := range map[string]struct {
		call []uint64
		want string
	}{
		"execve":             {[]uint64{unix.SYS_EXECVE}, killed},
		"fork":               {[]uint64{unix.SYS_FORK}, killed},
		"clone of a process": {[]uint64{unix.SYS_CLONE, unix.CLONE_VM}, killed},
		"clone3":             {[]uint64{unix.SYS_CLONE3}, "function not implemented"},
		"socket":             {[]uint64{unix.SYS_SOCKET}, killed},
		"mount":              {[]uint64{unix.SYS_MOUNT}, killed},
		"ptrace":             {[]uint64{unix.SYS_PTRACE}, killed},
		"bpf":                {[]uint64{unix.SYS_BPF}, killed},
		"io_uring":           {[]uint64{unix.SYS_IO_URING_SETUP}, killed},
		"unshare":            {[]uint64{unix.SYS_UNSHARE}, killed},
		"memory to execute":  {[]uint64{unix.SYS_MMAP, 0, 4096, unix.PROT_READ | unix.PROT_EXEC, unix.MAP_PRIVATE | unix.MAP_ANON}, killed},
		"memory":             {[]uint64{unix.SYS_MMAP, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE | unix.MAP_ANON}, "done"},
		"to make executable": {[]uint64{unix.SYS_MPROTECT, 0, 0, unix.PROT_EXEC}, killed},
		"terminal ioctl":     {[]uint64{unix.SYS_IOCTL, 0, unix.TIOCSTI}, "function not implemented"},
		"file ioctl":         {[]uint64{unix.SYS_IOCTL, 1 << 20, unix.FS_IOC_GETFLAGS}, "bad file descriptor"},
		"wait4":              {[]uint64{unix.SYS_WAIT4}, "function not implemented"},
		"statx":              {[]uint64{unix.SYS_STATX}, "bad address"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, ended(t, test.call...), test.want)
		})
	}
}
