package sharefs

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Capabilities are those that serving takes: all that a file system of the host asks of a process that makes,
// changes and opens files for others.
//
//nolint:gochecknoglobals // a constant list
var Capabilities = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_FSETID,
	unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_MKNOD, unix.CAP_SETFCAP,
}

// Securebits must be set in the process that serves: with them a thread keeps its capabilities when it takes on
// the file-system uid of somebody else (capabilities(7), SECBIT_NO_SETUID_FIXUP).
const Securebits = secbitNoSetuidFixup

const secbitNoSetuidFixup = 1 << 2 // SECBIT_NO_SETUID_FIXUP of linux/securebits.h

// checkCredentials tells whether this process can serve.
func checkCredentials() error {
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("read securebits: %w", err)
	}
	if bits&Securebits == 0 {
		return errors.New("securebits: SECBIT_NO_SETUID_FIXUP is not set")
	}
	return nil
}

// as runs f with the caller's uid and gid as the thread's file-system ids, so that what f makes is the caller's. f
// must not start goroutines.
func (fs *FS) as(c *fuse.Caller, f func() error) error {
	if c.Uid == 0 && c.Gid == 0 {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Neither call reports an error; both succeed with CAP_SETUID and CAP_SETGID. The undo comes in the other order, and
	// happens even when f panics.
	_ = unix.Setfsgid(int(c.Gid))
	_ = unix.Setfsuid(int(c.Uid))
	defer func() {
		_ = unix.Setfsuid(0)
		_ = unix.Setfsgid(0)
	}()
	return f()
}

// killPrivileges takes the set-user-id bit from an open file, and the set-group-id bit if the group may execute it. The
// guest's kernel asks for that with a change by a process without CAP_FSETID (FUSE_HANDLE_KILLPRIV_V2). The host's kernel
// would do it for a thread without that capability, but would ask for the thread's groups, which are not the caller's.
func killPrivileges(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	mode := st.Mode &^ unix.S_ISUID
	if st.Mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	if mode == st.Mode || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	return unix.Fchmod(fd, mode&0o7777)
}

// newMode is the mode to make a file with. A umask counts unless the directory has a default ACL
// (acl(5), "OBJECT CREATION AND DEFAULT ACLs"); the process's own umask is 0.
func (fs *FS) newMode(dir int, mode, umask uint32) uint32 {
	if umask == 0 {
		return mode
	}
	if _, err := unix.Getxattr(fs.path(dir), "system.posix_acl_default", nil); err == nil {
		return mode
	}
	return mode &^ (umask & 0o777)
}
