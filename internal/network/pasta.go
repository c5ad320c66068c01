package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	pastaTimeout = 10 * time.Second // until it has made its interface
	pastaPoll    = 10 * time.Millisecond
	pastaWords   = 1 << 10 // bytes of its last words
)

// Pasta is a pasta(1), which connects a network namespace to the host's network from user space: what is in the
// namespace speaks as the host does, and nothing has to be set up there. Its interface is mirrored like any other.
type Pasta struct {
	cmd   *exec.Cmd
	words *lastWords
	done  chan struct{} // closed when it has been reaped
}

// StartPasta starts a program for a namespace and returns when its interface is there, within 10 seconds. launch
// starts the command as its own Start does; nil: that is enough. The program dies with this process. After an error
// nothing is left.
func StartPasta(ctx context.Context, program string, ns *Namespace, launch func(*exec.Cmd) error) (*Pasta, error) {
	p, err := startPasta(ctx, program, ns, launch)
	if err != nil {
		return nil, fmt.Errorf("network: %s: %w", program, err)
	}
	return p, nil
}

func startPasta(ctx context.Context, program string, ns *Namespace, launch func(*exec.Cmd) error) (*Pasta, error) {
	p := &Pasta{words: &lastWords{}, done: make(chan struct{})}
	// It stays root, as a user of its own could not enter the namespace, but gives up all rights for files, and has a
	// filter of system calls. It opens the namespace through its own descriptor, since it may not look at other processes.
	p.cmd = exec.Command(program, "--runas", "0:0", "--foreground", "--quiet", "--stderr", "--config-net",
		"--no-map-gw", // or else the gateway's address would be the host's loopback
		"--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none",
		"--netns-only", "--netns", "/proc/self/fd/3")
	p.cmd.Dir = "/"
	p.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	p.cmd.ExtraFiles = []*os.File{ns.file}
	p.cmd.Stderr = p.words
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if launch == nil {
		launch = (*exec.Cmd).Start
	}
	started := make(chan error, 1)
	go func() {
		// The signal comes when the thread that has started it ends, so that stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := launch(p.cmd)
		started <- err
		if err == nil {
			_ = p.cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	if err := p.await(ctx, ns); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// await waits until the namespace has an interface that is up and has an address.
func (p *Pasta) await(ctx context.Context, ns *Namespace) error {
	ctx, cancel := context.WithTimeout(ctx, pastaTimeout)
	defer cancel()
	k, err := dial(ns)
	if err != nil {
		return err
	}
	defer k.close()
	tick := time.NewTicker(pastaPoll)
	defer tick.Stop()
	for {
		if ready, err := connected(k); err != nil || ready {
			return err
		}
		select {
		case <-tick.C:
		case <-p.done:
			return fmt.Errorf("it ended: %s", p.words.text())
		case <-ctx.Done():
			return fmt.Errorf("wait for its interface: %w; it said: %s", context.Cause(ctx), p.words.text())
		}
	}
}

// connected tells whether an interface that is mirrored is up and has an address of IPv4.
func connected(k *kernel) (bool, error) {
	s, err := k.scan()
	if err != nil {
		return false, err
	}
	for _, l := range s.links {
		if ok, _ := s.carries(l); !ok || l.Attrs().RawFlags&unix.IFF_UP == 0 {
			continue
		}
		addrs, err := dump(func() ([]netlink.Addr, error) { return k.AddrList(l, netlink.FAMILY_V4) })
		if err != nil || len(addrs) > 0 {
			return err == nil, err
		}
	}
	return false, nil
}

// Alone tells whether the namespace has no interface that is mirrored.
func (n *Namespace) Alone() (bool, error) {
	k, err := dial(n)
	if err != nil {
		return false, err
	}
	defer k.close()
	s, err := k.scan()
	if err != nil {
		return false, err
	}
	for _, l := range s.links {
		if ok, _ := s.carries(l); ok {
			return false, nil
		}
	}
	return true, nil
}

// Close ends the program and returns when it has gone, and its interface with it. Idempotent.
func (p *Pasta) Close() error {
	err := p.cmd.Process.Kill()
	<-p.done // SIGKILL needs no deadline
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// lastWords keeps the end of what is written.
type lastWords struct {
	mu   sync.Mutex
	tail []byte
}

// Write implements io.Writer.
func (w *lastWords) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tail = append(w.tail, b...)
	if more := len(w.tail) - pastaWords; more > 0 {
		w.tail = append([]byte(nil), w.tail[more:]...)
	}
	return len(b), nil
}

func (w *lastWords) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if words := strings.Join(strings.Fields(string(w.tail)), " "); words != "" {
		return printable(words)
	}
	return "nothing"
}
