package shareserver

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"runv/internal/sharefs"
	"runv/internal/vhostuser"
)

const (
	// queues are one for what must not wait (forgotten inodes), and one for requests: the VMM's default.
	queues = 2
	// minWorkers is how many requests can be with the host's file systems at the same time, at least.
	minWorkers = 8
)

type options struct {
	dir               string
	listener, control int
}

// Main is the server. It returns the exit status of the process, which nothing of the program may go on in, and writes
// what there is to say to stderr.
func Main(args []string) int {
	// The signal that comes when the parent dies is lost to a thread that takes on another file-system uid. This
	// one never does.
	runtime.LockOSThread()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	err := run(args, log)
	if err != nil {
		log.Error("share server ended", "error", err)
		return 1
	}
	return 0
}

func parse(args []string) (opts options, err error) {
	fs := flag.NewFlagSet(Face, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&opts.dir, "dir", "", "directory to serve")
	fs.IntVar(&opts.listener, "listener", -1, "descriptor of a listening socket")
	fs.IntVar(&opts.control, "control", -1, "descriptor of the control socket")
	if err := fs.Parse(args); err != nil {
		return opts, fmt.Errorf("%s: %w", Face, err)
	}
	if opts.dir == "" || opts.listener < 0 || opts.control < 0 || fs.NArg() > 0 {
		return opts, fmt.Errorf("%s: --dir, --listener and --control are needed, and nothing else", Face)
	}
	return opts, nil
}

func run(args []string, log *slog.Logger) error {
	opts, err := parse(args)
	if err != nil {
		return err
	}
	listener, err := inheritListener(opts.listener)
	if err != nil {
		return err
	}
	control, err := inheritConn(opts.control)
	if err != nil {
		return err
	}
	files, err := raiseFiles()
	if err != nil {
		return err
	}
	root, err := enterSandbox(opts.dir)
	if err != nil {
		return err
	}
	fs, err := sharefs.New(sharefs.Config{Root: root, Limits: sharefs.LimitsFor(files)})
	if err != nil {
		return fmt.Errorf("serve %s: %w", opts.dir, err)
	}
	if err := setFilter(); err != nil {
		return err
	}
	log.Info("share server is ready", "files", files)
	messages := newMessages(control)
	if err := messages.send(message{Ready: true}); err != nil {
		return fmt.Errorf("tell that it is ready: %w", err)
	}

	// Nothing is waited for when one of the two has ended: the process ends, and the kernel clears away.
	ended := make(chan error, 2)
	go func() { ended <- obey(messages, fs) }()
	go func() { ended <- serve(listener, fs, log) }()
	return <-ended
}

// serve waits for the VMM and serves it until it hangs up.
func serve(listener *net.UnixListener, fs *sharefs.FS, log *slog.Logger) error {
	conn, err := listener.AcceptUnix()
	if err != nil {
		return fmt.Errorf("wait for the VMM: %w", err)
	}
	if err := listener.Close(); err != nil {
		return fmt.Errorf("close listener: %w", err)
	}
	//nolint:forbidigo // a process's main work, and nothing but its end ends it
	return vhostuser.Serve(context.Background(), conn, vhostuser.Config{
		Queues:  queues,
		Workers: max(minWorkers, 2*runtime.GOMAXPROCS(0)),
		Handle:  newHandler(fs).handle,
		Log:     log,
	})
}

// inheritListener takes a listening socket.
func inheritListener(fd int) (*net.UnixListener, error) {
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close() // the listener has a duplicate
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take listener %d: %w", fd, err)
	}
	listener, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("take listener %d: not a unix socket", fd), l.Close())
	}
	listener.SetUnlinkOnClose(false) // the path is its owner's, and leads to nothing in the sandbox
	return listener, nil
}

// inheritConn takes a connection.
func inheritConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "control")
	defer f.Close() // the connection has a duplicate
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("take control socket %d: %w", fd, err)
	}
	return c, nil
}

// wantedFiles is how many descriptors a server may need, at most.
const wantedFiles = 1_000_000

// raiseFiles raises the limit of open files and returns it.
func raiseFiles() (uint64, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read limit of open files: %w", err)
	}
	wanted := unix.Rlimit{Cur: wantedFiles, Max: max(wantedFiles, limit.Max)}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &wanted); err == nil {
		return wanted.Cur, nil
	}
	// Without CAP_SYS_RESOURCE the hard limit bounds it.
	wanted = unix.Rlimit{Cur: min(wantedFiles, limit.Max), Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &wanted); err != nil {
		return 0, fmt.Errorf("set limit of open files: %w", err)
	}
	return wanted.Cur, nil
}
