package cli

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"runv/internal/bundle"
	"runv/internal/rpcerror"
	"runv/internal/standin"
)

// netNS is the network namespace that a stand-in lives in: file's, a new one, or this process's.
type netNS struct {
	file  *os.File
	isNew bool
}

func (n netNS) close() {
	if n.file != nil {
		_ = n.file.Close()
	}
}

// openNetNS opens the network namespace of a bundle's container. The caller closes it.
func openNetNS(b *bundle.Bundle) (n netNS, err error) {
	path, ok := b.NetNS()
	if !ok || path == "" {
		return netNS{isNew: ok}, nil
	}
	if n.file, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil { // a FIFO must not block
		return n, fmt.Errorf("network namespace: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(n.file.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		n.close()
		return n, rpcerror.New(errdefs.ErrInvalidArgument, fmt.Sprintf("network namespace: %s is none", path))
	}
	same, err := isOwnNetNS(n.file)
	if err == nil && same {
		err = rpcerror.New(errdefs.ErrNotImplemented, fmt.Sprintf("network namespace: %s is the host's: "+
			"a virtual machine cannot use the host's network; publish ports, or give the container a network of its own", path))
	}
	if err != nil {
		n.close()
	}
	return n, err
}

func isOwnNetNS(f *os.File) (bool, error) {
	own, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return false, err
	}
	theirs, err := f.Stat()
	return err == nil && os.SameFile(own, theirs), err
}

func newToken() (t standin.Token) {
	_, _ = rand.Read(t[:]) // never fails
	return t
}

// standIn is a stand-in process that this command has started. It outlives the
// command unless kill is called.
type standIn struct {
	id      standin.Token
	process *standin.Process
}

// standInOptions say what a stand-in is for.
type standInOptions struct {
	terminal      bool   // the process has one
	consoleSocket string // gets the master of a new terminal, which the stand-in then has; empty: none
	foreground    bool   // this command stays until the process's end
	net           netNS
	init          bool // of a container: it has a mount namespace of its own
}

// startStandIn starts a stand-in that brings our standard input, output and
// error, or a new terminal. A process
// with a terminal has no standard error. It is a session of its own: what the
// keyboard or the shell sends to this command's group is not for it.
func (a *app) startStandIn(ctx context.Context, podDir string, o standInOptions) (*standIn, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start stand-in: %w", err)
	}
	opts := standin.StartOptions{
		Executable: self, PodDir: podDir, Token: newToken(), Setsid: true, NetNS: o.net.file, NewNetNS: o.net.isNew,
		NewMountNS: o.init, Terminal: o.terminal, ConsoleSocket: o.consoleSocket, Foreground: o.foreground,
	}
	if o.consoleSocket == "" {
		opts.Stdin, opts.Stdout = a.prog.Stdin, a.prog.Stdout
		if !o.terminal {
			opts.Stderr = a.prog.Stderr
		}
	}
	process, err := standin.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	return &standIn{id: opts.Token, process: process}, nil
}

// rootOf is what a container's stand-in has as its file system.
func rootOf(b *bundle.Bundle) standin.Root {
	root := standin.Root{Path: b.Rootfs, ReadOnly: b.Spec.Root.Readonly}
	for _, m := range b.Spec.Mounts {
		root.Mounts = append(root.Mounts, standin.RootMount{Destination: m.Destination})
	}
	for _, bind := range b.Binds() {
		m := &root.Mounts[bind.Index]
		m.Source, m.ReadOnly = bind.Source, bind.ReadOnly
	}
	return root
}

func (s *standIn) token() []byte { return s.id[:] }
func (s *standIn) pid() int      { return s.process.PID }

// kill ends the stand-in, and with it the process it stands for.
func (s *standIn) kill() error {
	if err := s.signal(unix.SIGKILL); err != nil {
		return err
	}
	_, err := s.process.Wait()
	return err
}

// signal sends a signal to the stand-in, which forwards all but SIGKILL and SIGSTOP.
func (s *standIn) signal(sig unix.Signal) error { return s.process.Signal(sig) }

// wait blocks until the stand-in has ended and returns its status, which is that of
// its process.
func (s *standIn) wait() (int, error) {
	status, err := s.process.Wait()
	return int(status), err
}

// standInClient is this process as the stand-in of a foreground exec.
type standInClient struct {
	id     standin.Token
	client *standin.Client
}

// connectStandIn brings our own standard input, output and error to the
// supervisor. A process with a terminal has no standard error.
func (a *app) connectStandIn(ctx context.Context, podDir string, terminal bool) (*standInClient, error) {
	files := standin.Stdio{Stdin: a.prog.Stdin, Stdout: a.prog.Stdout, Terminal: terminal, Foreground: true}
	if !terminal {
		files.Stderr = a.prog.Stderr
	}
	c := &standInClient{id: newToken()}
	var err error
	c.client, err = standin.Connect(ctx, podDir, c.id, files)
	return c, err
}

func (c *standInClient) token() []byte { return c.id[:] }
func (c *standInClient) close()        { _ = c.client.Close() }

func (c *standInClient) signal(sig unix.Signal) error { return c.client.Signal(int(sig)) }

// wait returns the status of the process.
func (c *standInClient) wait(ctx context.Context) (int, error) {
	status, err := c.client.Wait(ctx)
	if errors.Is(err, standin.ErrGone) {
		return 0, &exitError{status: statusKilled, err: errSupervisorGone}
	}
	return int(status), err
}
