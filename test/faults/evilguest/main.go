// Command evilguest is PID 1 of a guest that has turned against its host. The tests
// put it into an initramfs in place of the agent, with a file /evil that says what it does.
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/transport"
)

func main() {
	mode, err := os.ReadFile("/evil")
	if err != nil {
		die(err)
	}
	fmt.Fprintf(os.Stderr, "evilguest: I am %s\n", mode)
	switch string(mode) {
	case "panicking":
		os.Exit(1) // the kernel does not survive its init
	case "silent":
		forever()
	case "off":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	port, err := openPort()
	if err != nil {
		die(err)
	}
	switch string(mode) {
	case "garbage-first":
		garbage := bytes.Repeat([]byte("not a hello "), 1<<16)
		for {
			if _, err := port.Write(garbage); err != nil {
				die(err)
			}
		}
	case "garbage-after-hello":
		session, err := transport.Guest(port)
		if err != nil {
			die(err)
		}
		_ = session
		_, _ = port.Write(bytes.Repeat([]byte{0xff}, 1<<20))
		forever()
	case "huge-message":
		session, err := transport.Guest(port)
		if err != nil {
			die(err)
		}
		// A ttrpc header that announces an answer of 1 GiB to the first call.
		header := binary.BigEndian.AppendUint32(nil, 1<<30)
		header = binary.BigEndian.AppendUint32(header, 1)
		header = append(header, 2, 0)
		_, _ = session.Control().Write(header)
		junk := make([]byte, 1<<16)
		for {
			if _, err := session.Control().Write(junk); err != nil {
				forever()
			}
		}
	}
	die(fmt.Errorf("unknown mode %q", mode))
}

func die(err error) {
	fmt.Fprintln(os.Stderr, "evilguest:", err)
	forever()
}

// forever outlasts every deadline of the host.
func forever() { time.Sleep(time.Hour) }

// openPort does the least of a boot that makes the agent channel appear.
func openPort() (*os.File, error) {
	for _, m := range []struct{ kind, dir string }{{"devtmpfs", "/dev"}, {"sysfs", "/sys"}} {
		_ = os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && err != unix.EBUSY {
			return nil, fmt.Errorf("mount %s: %w", m.kind, err)
		}
	}
	list, _ := os.ReadFile("/etc/runv/modules.early")
	for path := range strings.FieldsSeq(string(list)) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			return nil, fmt.Errorf("load %s: %w", path, err)
		}
		_ = f.Close()
	}
	for range 1000 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			data, _ := os.ReadFile(name)
			if strings.TrimSpace(string(data)) == transport.PortName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(name)), os.O_RDWR, 0)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("no port %s", transport.PortName)
}
