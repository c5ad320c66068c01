// Testguest is PID 1 of a real VM in tests of drivers. Its initramfs is appended to
// that of the guest image, whose modules it loads.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"runv/internal/hypervisor/hvtest/testguest/protocol"
)

// port is the agent channel's name, as in package transport.
const port = "runv.agent"

func main() {
	err := run()
	fmt.Println("test guest:", err)
	_ = guest{}.PowerOff()
}

func run() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := loadModules("/etc/runv/modules.early", ""); err != nil {
		return err
	}
	channel, err := openPort()
	if err != nil {
		return err
	}
	return protocol.Serve(channel, guest{})
}

// loadModules loads the modules that a list names, those with a word in their name.
func loadModules(list, word string) error {
	names, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(names)) {
		if !strings.Contains(name, word) {
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	return nil
}

// openPort waits for the agent channel: it comes a moment after its driver.
func openPort() (*os.File, error) {
	for range 1000 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err == nil && strings.TrimSpace(string(text)) == port {
				return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), os.O_RDWR, 0)
			}
		}
		<-time.After(5 * time.Millisecond)
	}
	return nil, errors.New("no port named " + port)
}

// guest is the machine this program runs on.
type guest struct{}

func (guest) Console(text string) error {
	_, err := fmt.Println(text)
	return err
}

func (guest) dir(tag string) string { return "/shares/" + tag }

func (g guest) Read(tag, file string) (string, error) {
	if err := loadModules("/etc/runv/modules.late", "/fuse/"); err != nil {
		return "", err
	}
	if err := os.MkdirAll(g.dir(tag), 0o755); err != nil {
		return "", err
	}
	// The device may still be on its way: a hot-plug is over for the host when the
	// guest was told.
	mount := func() error { return unix.Mount(tag, g.dir(tag), "virtiofs", 0, "") }
	err := mount()
	for i := 0; i < 1000 && errors.Is(err, unix.EINVAL); i++ {
		<-time.After(5 * time.Millisecond)
		err = mount()
	}
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return "", fmt.Errorf("mount share %s: %w", tag, err)
	}
	text, err := os.ReadFile(filepath.Join(g.dir(tag), file))
	return string(text), err
}

// Size counts processors and blocks of memory that are online.
func (guest) Size() (cpus int, mebibytes int64, err error) {
	const devices = "/sys/devices/system/"
	for _, pattern := range []string{"cpu/cpu[0-9]*/online", "memory/memory*/online"} {
		files, err := filepath.Glob(devices + pattern)
		if err != nil {
			return 0, 0, err
		}
		for _, file := range files {
			if text, _ := os.ReadFile(file); strings.TrimSpace(string(text)) == "0" {
				if err := os.WriteFile(file, []byte("1"), 0); err != nil {
					return 0, 0, err
				}
			}
		}
	}
	online, err := os.ReadFile(devices + "cpu/online")
	if err != nil {
		return 0, 0, err
	}
	for part := range strings.SplitSeq(strings.TrimSpace(string(online)), ",") {
		var first, last int
		if n, _ := fmt.Sscanf(part, "%d-%d", &first, &last); n == 2 {
			cpus += last - first
		}
		cpus++
	}
	unit, err := os.ReadFile(devices + "memory/block_size_bytes")
	if err != nil {
		return 0, 0, err
	}
	bytes, err := strconv.ParseInt(strings.TrimSpace(string(unit)), 16, 64)
	if err != nil {
		return 0, 0, err
	}
	blocks, err := filepath.Glob(devices + "memory/memory[0-9]*")
	return cpus, int64(len(blocks)) * (bytes >> 20), err
}

func (g guest) Release(tag string) error { return unix.Unmount(g.dir(tag), 0) }

// NIC waits for the device: as with shares, a hot-plug is over for the host when the guest was told.
func (guest) NIC(mac, address string) (mtu, queues int, err error) {
	if err := loadModules("/etc/runv/modules.late", "failover"); err != nil {
		return 0, 0, err
	}
	if err := loadModules("/etc/runv/modules.late", "/virtio_net."); err != nil {
		return 0, 0, err
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return 0, 0, err
	}
	for range 2000 {
		links, err := netlink.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return 0, 0, err
		}
		for _, l := range links {
			if a := l.Attrs(); a.PermHWAddr.String() == mac {
				err := errors.Join(netlink.AddrReplace(l, addr), netlink.LinkSetUp(l))
				return a.MTU, a.NumRxQueues, err
			}
		}
		<-time.After(5 * time.Millisecond)
	}
	return 0, 0, fmt.Errorf("no network device %s", mac)
}

func (guest) NICs() (int, error) {
	links, err := netlink.LinkList()
	return len(links) - 1, err
}

func (guest) Busy(d time.Duration) error {
	for range runtime.NumCPU() {
		go func() {
			for end := time.Now().Add(d); time.Now().Before(end); {
				_, _ = os.ReadFile("/proc/self/stat") // in the kernel, too
			}
		}()
	}
	return nil
}

func (guest) PowerOff() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) }

func (guest) Panic() error { return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) }
