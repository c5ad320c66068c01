package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"runv/internal/hypervisor"
)

const (
	defaultBinary  = "qemu-system-x86_64"
	firmwareName   = "qboot.rom"
	versionTimeout = 10 * time.Second
)

// firmwareDirs is where distributions put what comes with QEMU.
var firmwareDirs = []string{"/usr/share/qemu", "/usr/local/share/qemu", "/usr/share/qboot", "/usr/share/qemu-kvm"}

// FileError tells that a file the VM needs cannot be used. It is
// errdefs.ErrNotFound or errdefs.ErrPermissionDenied where that is the reason.
type FileError struct {
	What   string // "guest kernel"
	Path   string // or the name that was looked for
	Remedy string // what to do about it
	Err    error
}

// Error implements error.
func (e *FileError) Error() string {
	err := e.Err
	if cause, ok := errors.AsType[*fs.PathError](err); ok {
		err = cause.Err
	}
	return fmt.Sprintf("open %s %s: %v (%s)", e.What, e.Path, err, e.Remedy)
}

// Unwrap gives the cause and its kind.
func (e *FileError) Unwrap() []error {
	switch {
	case errors.Is(e.Err, fs.ErrNotExist), errors.Is(e.Err, exec.ErrNotFound):
		return []error{e.Err, errdefs.ErrNotFound}
	case errors.Is(e.Err, fs.ErrPermission):
		return []error{e.Err, errdefs.ErrPermissionDenied}
	}
	return []error{e.Err, errdefs.ErrInvalidArgument}
}

// Find looks QEMU up and asks its version, such as "7.2.22 (Debian 1:7.2+dfsg-7)". An
// empty name means the default, qemu-system-x86_64 in $PATH. Errors: *FileError.
func Find(ctx context.Context, binary string) (path, version string, err error) {
	path, err = findBinary(binary)
	if err != nil {
		return "", "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return path, "", &FileError{"QEMU", path, "does it run on this machine?", err}
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	_, version, ok := strings.Cut(string(line), " version ")
	if !ok {
		return path, "", &FileError{
			"QEMU", path, "set the qemu key to a QEMU system emulator",
			fmt.Errorf("not QEMU: it says %.80q", line),
		}
	}
	return path, strings.TrimSpace(version), nil
}

func findBinary(binary string) (string, error) {
	if binary == "" {
		binary = defaultBinary
	}
	path, err := exec.LookPath(binary)
	if err != nil {
		if cause, ok := errors.AsType[*exec.Error](err); ok {
			err = cause.Err
		}
		return "", &FileError{"QEMU", binary, "install qemu-system-x86 or set the qemu key", err}
	}
	return filepath.Abs(path)
}

// FindFirmware looks up qboot.rom, the firmware that starts a kernel without
// a BIOS, beside the given QEMU program and where distributions put it. Errors: *FileError.
func FindFirmware(binary string) (string, error) {
	dirs := firmwareDirs
	if real, err := filepath.EvalSymlinks(binary); err == nil {
		dirs = append([]string{filepath.Join(filepath.Dir(real), "../share/qemu")}, dirs...)
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, firmwareName)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", &FileError{"firmware", firmwareName, "install qemu-system-data or qboot; looked in " + strings.Join(dirs, ", "), fs.ErrNotExist}
}

// openInput opens a file that the VMM reads through the descriptor. As the VMM
// opens it once more, as user, that user must be allowed to read it.
func openInput(what, path string, user *hypervisor.User) (*os.File, error) {
	const remedy = "build the guest's files or set guest_dir"
	f, err := os.Open(path)
	if err != nil {
		return nil, &FileError{what, path, remedy, err}
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil && user != nil && info.Mode().Perm()&0o004 == 0 {
		f.Close()
		return nil, &FileError{what, path, "make it readable for all: the VMM runs as a user of its own", fs.ErrPermission}
	}
	if err != nil {
		f.Close()
		return nil, &FileError{what, path, remedy, err}
	}
	return f, nil
}
