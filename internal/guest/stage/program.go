package stage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"runv/internal/guest/fault"
)

// defaultNofile is what a process may open when its specification says nothing: the
// common default of init systems.
var defaultNofile = Rlimit{Resource: unix.RLIMIT_NOFILE, Soft: 1024, Hard: 524288}

// Limits are the limits of the process with the one that each has.
func (p *Process) Limits() []Rlimit {
	for _, l := range p.Rlimits {
		if l.Resource == unix.RLIMIT_NOFILE {
			return p.Rlimits
		}
	}
	return append(slices.Clip(p.Rlimits), defaultNofile)
}

// program is the user's program on its way to execve.
type program struct {
	Process
	master int    // of the terminal; 0: none, as 0 is never a master
	path   string // of the executable, after prepare
}

// ptmx is the terminal's master to hand over, or -1.
func (p *program) ptmx() int {
	if p.master == 0 {
		return -1
	}
	return p.master
}

// SetProcFiles sets what of a process is set through its directory in /proc. It works only while /proc is the agent's.
func (p *Process) SetProcFiles(dir string) error {
	if p.OOMScoreAdj != nil {
		if err := os.WriteFile(filepath.Join(dir, "oom_score_adj"), fmt.Appendf(nil, "%d", *p.OOMScoreAdj), 0); err != nil {
			return fmt.Errorf("set oom_score_adj to %d: %w", *p.OOMScoreAdj, fault.Cause(err))
		}
	}
	if p.CoredumpFilter != nil {
		// A kernel without core dumps has no such file.
		err := os.WriteFile(filepath.Join(dir, "coredump_filter"), fmt.Appendf(nil, "%#x", *p.CoredumpFilter), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set coredump_filter to %#x: %w", *p.CoredumpFilter, fault.Cause(err))
		}
	}
	return nil
}

// join enters the namespaces of a container for an exec.
func join(namespaces int, p *program) error {
	// The root and working directory are shared by the threads of a process; one
	// that joins a mount namespace must have its own.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare file system attributes: %w", err)
	}
	if err := unix.Setns(targetFD, namespaces); err != nil {
		return fmt.Errorf("join namespaces: %w", err)
	}
	unix.Close(targetFD)
	if p.Terminal {
		return p.makeTerminal()
	}
	return reopenNull()
}

// prepare gives the process the limits, user and privileges of the program, and
// finds the program as that user.
func (p *program) prepare() error {
	p.setEnv()
	if err := p.setRlimits(); err != nil {
		return err
	}
	umask := 0o022
	if p.Umask != nil {
		umask = int(*p.Umask)
	}
	unix.Umask(umask)
	if p.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
	}
	if err := p.setScheduling(); err != nil {
		return err
	}
	if err := p.Capabilities.dropBounding(); err != nil {
		return err
	}
	// As root first, since a working directory need not be open to the user; as
	// the user second, since it need not be open to root (a network file system).
	cwdErr := unix.Chdir(p.Cwd)
	if err := p.setUser(); err != nil {
		return err
	}
	if errors.Is(cwdErr, unix.EACCES) || errors.Is(cwdErr, unix.EPERM) {
		cwdErr = unix.Chdir(p.Cwd)
	}
	if cwdErr != nil {
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", p.Cwd, cwdErr)
	}
	if err := verifyCwd(); err != nil {
		return err
	}
	if err := p.Capabilities.apply(p.spareCapabilities()); err != nil {
		return err
	}
	path, err := lookPath(p.Args[0], p.Env)
	if err != nil {
		return err
	}
	p.path = path
	return nil
}

// exec becomes the program. It returns only errors.
func (p *program) exec() error {
	err := unix.Exec(p.path, p.Args, p.Env)
	var kind error = errdefs.ErrInternal
	switch {
	case errors.Is(err, unix.ENOENT):
		kind = errdefs.ErrNotFound
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOEXEC):
		kind = errdefs.ErrPermissionDenied
	}
	return fault.New(kind, "exec %s: %w", p.path, err)
}

func (p *program) setRlimits() error {
	for _, l := range p.Limits() {
		if err := unix.Setrlimit(l.Resource, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}); err != nil {
			return fmt.Errorf("set rlimit %d: %w", l.Resource, err)
		}
	}
	return nil
}

// setUser changes to the program's user, and keeps the capabilities for apply.
func (p *program) setUser() error {
	// The program shall be able to open its /dev/stdout.
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("stat stdio: %w", err)
		}
		if st.Uid == p.UID || isNull(fd) {
			continue
		}
		// EPERM: its owner is nobody in the user namespace.
		err := unix.Fchown(fd, int(p.UID), -1)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("chown stdio: %w", err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	groups := make([]int, len(p.Groups))
	for i, g := range p.Groups {
		groups[i] = int(g)
	}
	if err := unix.Setgroups(groups); err != nil {
		return fmt.Errorf("set additional groups: %w", unmapped(err))
	}
	if err := unix.Setresgid(int(p.GID), int(p.GID), int(p.GID)); err != nil {
		return fmt.Errorf("set gid %d: %w", p.GID, unmapped(err))
	}
	if err := unix.Setresuid(int(p.UID), int(p.UID), int(p.UID)); err != nil {
		return fmt.Errorf("set uid %d: %w", p.UID, unmapped(err))
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("clear keep capabilities: %w", err)
	}
	return nil
}

// unmapped says what EINVAL means when an id is set.
func unmapped(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("not mapped in the user namespace: %w", err)
	}
	return err
}

// verifyCwd makes sure that the working directory is inside the container.
func verifyCwd() error {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil || n < 1 || buf[0] != '/' {
		return errors.New("current working directory is outside of the container")
	}
	return nil
}

// setEnv keeps the last value of each variable and adds HOME.
func (p *program) setEnv() {
	at := make(map[string]int, len(p.Env))
	env := make([]string, 0, len(p.Env)+1)
	for _, e := range p.Env {
		name, _, _ := strings.Cut(e, "=")
		if i, ok := at[name]; ok {
			env[i] = e
			continue
		}
		at[name] = len(env)
		env = append(env, e)
	}
	if i, ok := at["HOME"]; !ok || env[i] == "HOME=" {
		home := "HOME=" + homeOf(p.UID)
		if ok {
			env[i] = home
		} else {
			env = append(env, home)
		}
	}
	p.Env = env
}

// maxPasswd bounds how much of the container's /etc/passwd is read.
const maxPasswd = 4 << 20

// homeOf is the user's home as the container's /etc/passwd has it, or "/".
func homeOf(uid uint32) string {
	fd, err := open("/etc/passwd", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return "/"
	}
	f := os.NewFile(uintptr(fd), "passwd")
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "/"
	}
	users, err := user.ParsePasswdFilter(io.LimitReader(f, maxPasswd), func(u user.User) bool { return u.Uid == int(uid) })
	if err != nil || len(users) == 0 || users[0].Home == "" {
		return "/"
	}
	return users[0].Home
}

// lookPath finds the executable as a shell does, with the container's PATH. Its
// errors have the words of other runtimes, on which callers rely.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if err := executable(name); err != nil {
			return "", notExecutable(name, err)
		}
		return name, nil
	}
	denied := false
	for _, dir := range filepath.SplitList(getenv(env, "PATH")) {
		if dir == "" {
			dir = "."
		}
		path := filepath.Join(dir, name)
		if !filepath.IsAbs(path) {
			path = "./" + path
		}
		err := executable(path)
		if err == nil {
			return path, nil
		}
		denied = denied || errors.Is(err, unix.EACCES)
	}
	if denied {
		return "", notExecutable(name, unix.EACCES)
	}
	return "", fault.New(errdefs.ErrNotFound, "exec: %q: executable file not found in $PATH", name)
}

func notExecutable(name string, err error) error {
	var kind error = errdefs.ErrPermissionDenied
	if missing(err) {
		kind = errdefs.ErrNotFound
		err = fmt.Errorf("stat %s: %w", name, err)
	}
	if errors.Is(err, unix.EISDIR) {
		err = fmt.Errorf("%w: %w", err, unix.EACCES) // as the kernel would say: engines know only that one
	}
	return fault.New(kind, "exec: %q: %w", name, err)
}

func executable(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	err := unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS)
	if err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return err
	}
	if st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}

func getenv(env []string, name string) string {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}
