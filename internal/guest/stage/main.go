package stage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"runv/internal/hook"
)

// Main is the stage. It does not return: it becomes the user's program, or
// reports an error and exits with status 1.
func Main() {
	// Namespaces, credentials and the like belong to a thread, and execve makes
	// the calling one the process.
	runtime.LockOSThread()
	// Processes of the container must not be able to look into this one, which
	// still holds descriptors of the world outside.
	err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	if err == nil {
		err = unix.CloseRange(controlFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	}
	if err == nil {
		err = run()
	}
	send(err, -1)
	os.Exit(1)
}

// run returns only errors.
func run() error {
	if err := checkEntry(); err != nil {
		return err
	}
	cfg, err := readConfig()
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	p := &program{Process: cfg.Process}
	if err := setAffinity("initial", p.Affinity.Initial); err != nil {
		return err
	}
	if cfg.UserNS {
		err = enterUserNS()
	} else {
		err = p.SetProcFiles("/proc/self")
	}
	if err != nil {
		return err
	}
	if cfg.Container != nil {
		if cfg.UserNS {
			cfg.Container.Sysctl = slices.DeleteFunc(cfg.Container.Sysctl, func(v Sysctl) bool { return !v.OfUserNS() })
		}
		err = setupContainer(cfg.Container, p)
	} else {
		err = join(cfg.Join, p)
	}
	if err != nil {
		return err
	}
	if err := joinKeyring(cfg); err != nil {
		return err
	}
	if err := p.prepare(); err != nil {
		return err
	}
	if cfg.Container != nil {
		hooks := cfg.Container.Hooks
		if err := p.runHooks(hook.CreateContainer, hooks.Create, hooks.CreateState, nil); err != nil {
			return err
		}
	}
	if cfg.Container != nil || p.Terminal {
		send(nil, p.ptmx())
	}
	if cfg.Container != nil {
		if err := waitForAgent(); err != nil {
			return err
		}
		hooks := cfg.Container.Hooks
		if len(hooks.Start) > 0 {
			// The filter comes before these hooks, since they have no more rights than the program.
			if err := p.runHooks(hook.StartContainer, hooks.Start, hooks.StartState, p.filter); err != nil {
				return err
			}
			return p.exec()
		}
	}
	if err := p.filter(); err != nil {
		return err
	}
	return p.exec()
}

// enterUserNS makes a process that has just come into a user namespace its root, once the agent has
// done its part.
func enterUserNS() error {
	if err := waitForAgent(); err != nil {
		return err
	}
	if err := unix.Setresgid(0, 0, 0); err != nil {
		return fmt.Errorf("become gid 0 of the user namespace: %w", err)
	}
	if err := unix.Setresuid(0, 0, 0); err != nil {
		return fmt.Errorf("become uid 0 of the user namespace: %w", err)
	}
	return nil
}

// runHooks runs hooks as what the process is now: the program's user, with its limits and
// privileges, in its working directory, and with its environment unless they have one of their own. A
// program of the container gets no more rights by being a hook. confine may be nil.
func (p *program) runHooks(phase hook.Phase, hooks []specs.Hook, state [2]string, confine func() error) error {
	if len(hooks) == 0 {
		return nil
	}
	text := state[0] + strconv.Itoa(os.Getpid()) + state[1]
	return hook.Run(context.Background(), phase, hooks, hook.Surroundings{
		Dir: p.Cwd, State: []byte(text), Env: p.Env, Confine: confine,
	})
}

func readConfig() (*Config, error) {
	f := os.NewFile(configFD, "config")
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, 0, math.MaxInt64))
	if err != nil {
		return nil, err
	}
	return Decode(data)
}

// send tells the agent. If that fails the agent has gone and nobody listens.
func send(err error, fd int) {
	if fd < 0 {
		// A seccomp filter that is loaded already rather allows write than sendmsg.
		_, _ = unix.Write(controlFD, encodeReply(err))
		return
	}
	_ = unix.Sendmsg(controlFD, encodeReply(err), unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
}

// waitForAgent returns when the agent says so.
func waitForAgent() error {
	buf := make([]byte, 16)
	for {
		n, err := unix.Read(controlFD, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for the agent: %w", err)
		case n == 0:
			os.Exit(1) // the container is deleted
		default:
			return nil
		}
	}
}
