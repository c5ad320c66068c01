package network_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/network"
)

func TestPasta(t *testing.T) {
	host, ns := newNamespace(t), newNamespace(t)
	peer := pair(t, host)
	run(t, host, "ip link set lo up && ip route add default via 10.1.0.1")
	var server net.Listener
	assert.NilError(t, peer.Do(func() (err error) { server, err = net.Listen("tcp", "10.1.0.1:80"); return err }))
	defer server.Close()
	alone, err := ns.Alone()
	assert.NilError(t, err)
	assert.Assert(t, alone)

	// What is the host's network to it is the namespace that it is started in.
	p, err := network.StartPasta(t.Context(), "pasta", ns, func(cmd *exec.Cmd) error {
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer own.Close()
		if err := unix.Setns(int(host.File().Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return errors.Join(cmd.Start(), unix.Setns(int(own.Fd()), unix.CLONE_NEWNET))
	})
	assert.NilError(t, err)
	alone, err = ns.Alone()
	assert.NilError(t, err)
	assert.Assert(t, !alone)
	var conn net.Conn
	assert.NilError(t, ns.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", "10.1.0.1:80", 10*time.Second)
		return err
	}))
	assert.NilError(t, server.(*net.TCPListener).SetDeadline(time.Now().Add(10*time.Second)))
	accepted, err := server.Accept()
	assert.NilError(t, err)
	assert.NilError(t, accepted.Close())
	assert.NilError(t, conn.Close())

	assert.NilError(t, p.Close())
	assert.NilError(t, p.Close())
	alone, err = ns.Alone()
	assert.NilError(t, err)
	assert.Assert(t, alone)
}

func TestPastaFails(t *testing.T) {
	ns := newNamespace(t)
	_, err := network.StartPasta(t.Context(), "/nowhere/pasta", ns, nil)
	assert.ErrorContains(t, err, "network: /nowhere/pasta: ")
	broken := filepath.Join(t.TempDir(), "pasta")
	assert.NilError(t, os.WriteFile(broken, []byte("#!/bin/sh\necho no interface >&2; exit 1\n"), 0o755))
	_, err = network.StartPasta(t.Context(), broken, ns, nil)
	assert.Error(t, err, "network: "+broken+": it ended: no interface")
	assert.NilError(t, os.WriteFile(broken, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = network.StartPasta(ctx, broken, ns, nil)
	assert.ErrorContains(t, err, "wait for its interface: context deadline exceeded; it said: nothing")
}
