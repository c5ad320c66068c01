package mountns_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/mountns"
)

// TestMain also is the program that enters a namespace: "enter DIR" mounts a tmpfs on DIR/own,
// says so, and then tells at each line of input whether DIR/later is a
// mount point here and for the host.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "enter" {
		if err := enter(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "chroot" {
		if err := inChroot(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func enter(dir string) error {
	host, err := mountns.Enter(3)
	if err != nil {
		return err
	}
	defer host.Close()
	if flags, err := unix.FcntlInt(3, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		return fmt.Errorf("kept descriptor: flags %#x: %v", flags, err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(dir, "own"), "tmpfs", 0, "size=64k"); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "own", "file"), nil, 0o600); err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, "pid", os.Getpid(), "marker", os.Getenv("RUNV_HOST_MOUNTS"))
	if _, err := fmt.Scanln(); err != nil && err.Error() != "unexpected newline" {
		return err
	}
	for _, ns := range []*mountns.Host{nil, host} {
		if err := mountns.Do(ns, func() error {
			_, own := os.Stat(filepath.Join(dir, "own", "file"))
			_, later := os.Stat(filepath.Join(dir, "later", "file"))
			fmt.Fprintln(os.Stdout, "own", own == nil, "later", later == nil)
			return nil
		}); err != nil {
			return err
		}
	}
	// The process itself has not moved.
	_, err = os.Stat(filepath.Join(dir, "own", "file"))
	return err
}

func TestEnter(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	for _, name := range []string{"own", "later"} {
		assert.NilError(t, os.Mkdir(filepath.Join(dir, name), 0o700))
	}
	null, err := os.Open(os.DevNull)
	assert.NilError(t, err)
	defer null.Close()
	cmd := exec.Command(os.Args[0], "enter", dir)
	cmd.ExtraFiles = []*os.File{null}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	assert.NilError(t, err)
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	line := func() string {
		var b strings.Builder
		for c := make([]byte, 1); ; {
			_, err := out.Read(c)
			assert.NilError(t, err)
			if c[0] == '\n' {
				return b.String()
			}
			b.Write(c)
		}
	}
	assert.Equal(t, line(), fmt.Sprintf("pid %d marker ", cmd.Process.Pid))
	_, err = os.Stat(filepath.Join(dir, "own", "file"))
	assert.ErrorIs(t, err, os.ErrNotExist)

	// A mount of the host, made after the process has left.
	later := filepath.Join(dir, "later")
	assert.NilError(t, unix.Mount("tmpfs", later, "tmpfs", 0, "size=64k"))
	defer func() { assert.NilError(t, unix.Unmount(later, 0)) }()
	assert.NilError(t, os.WriteFile(filepath.Join(later, "file"), nil, 0o600))
	_, err = in.Write([]byte("\n"))
	assert.NilError(t, err)
	assert.Assert(t, strings.HasPrefix(line(), "own true later ")) // depends on the host's propagation
	assert.Equal(t, line(), "own false later true")
	assert.NilError(t, cmd.Wait())
}

// inChroot tells where the program believes to be, and whether it finds a file at /file, in
// its own namespace and in the host's.
func inChroot() error {
	host, err := mountns.Enter()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, self)
	for _, ns := range []*mountns.Host{nil, host} {
		if err := mountns.Do(ns, func() error {
			_, err := os.Stat("/file")
			return err
		}); err != nil {
			return err
		}
	}
	return host.Close()
}

// TestChroot: in a chroot paths mean the same in both namespaces, and the program knows its own.
func TestChroot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	assert.NilError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"))
	defer func() { assert.NilError(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "proc"), 0o755))
	assert.NilError(t, unix.Mount("proc", filepath.Join(dir, "proc"), "proc", 0, ""))
	self, err := os.ReadFile("/proc/self/exe")
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "program"), self, 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o644))

	cmd := exec.CommandContext(t.Context(), "/program", "chroot")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, string(out))
	assert.Equal(t, string(out), "/program\n")
}

func TestBadMarker(t *testing.T) {
	for _, value := range []string{"", "x", "-1,-1", "0,0", "99999,99998", "0"} {
		t.Setenv("RUNV_HOST_MOUNTS", value)
		_, err := mountns.Enter()
		assert.ErrorContains(t, err, "RUNV_HOST_MOUNTS")
	}
}
