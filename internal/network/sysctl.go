package network

import (
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"runv/internal/mountns"
)

// parameters are the kernel parameters of a namespace that are mirrored: what is set from outside for a
// container's sake. A container's own (linux.sysctl) are written in the guest.
func parameters() []string {
	all := []string{
		"net.core.somaxconn",
		"net.ipv4.ip_forward", portRange, reservedPorts, "net.ipv4.ip_nonlocal_bind",
		"net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.ipv4.fib_multipath_hash_policy",
		"net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
		"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_tw_reuse",
		"net.ipv6.bindv6only", "net.ipv6.ip_nonlocal_bind", "net.ipv6.conf.all.forwarding",
	}
	for _, group := range []string{"all", "default"} {
		for _, p := range perInterface {
			if !strings.HasSuffix(p, "forwarding") {
				all = append(all, "net."+strings.Replace(p, "IF", group, 1))
			}
		}
	}
	return all
}

// perInterface are those that each interface has.
var perInterface = []string{
	"ipv4.conf.IF.accept_local", "ipv4.conf.IF.accept_redirects", "ipv4.conf.IF.accept_source_route",
	"ipv4.conf.IF.arp_accept", "ipv4.conf.IF.arp_announce", "ipv4.conf.IF.arp_filter", "ipv4.conf.IF.arp_ignore",
	"ipv4.conf.IF.arp_notify", "ipv4.conf.IF.proxy_arp", "ipv4.conf.IF.route_localnet", "ipv4.conf.IF.rp_filter",
	"ipv4.conf.IF.secure_redirects", "ipv4.conf.IF.send_redirects", "ipv4.conf.IF.src_valid_mark",
	"ipv6.conf.IF.accept_redirects", "ipv6.conf.IF.disable_ipv6", "ipv6.conf.IF.proxy_ndp",
	"ipv6.conf.IF.accept_source_route",
}

// sysctls knows what each parameter is when nobody has set it.
type sysctls struct {
	defaults map[string]string
	told     map[string]bool // those that the guest was told once: it must hear of their way back, too
}

// newSysctls looks at a namespace that is new.
func newSysctls() (*sysctls, error) {
	s := &sysctls{told: make(map[string]bool)}
	err := mountns.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		s.defaults = readSysctls(parameters())
		return nil
	})
	return s, err
}

// read returns those parameters of the calling thread's namespace that were set. interfaces are names.
func (s *sysctls) read(interfaces []string) map[string]string {
	keys := parameters()
	for _, name := range interfaces {
		name = strings.ReplaceAll(name, ".", "/")
		for _, p := range perInterface {
			keys = append(keys, "net."+strings.Replace(p, "IF", name, 1))
		}
	}
	found := readSysctls(keys)
	maps.DeleteFunc(found, func(key, value string) bool {
		return value == s.unset(key) && !s.told[key]
	})
	return found
}

func (s *sysctls) unset(key string) string {
	parts := strings.SplitN(key, ".", 5)
	if len(parts) == 5 && parts[2] == "conf" && parts[3] != "all" {
		parts[3] = "default"
	}
	return s.defaults[strings.Join(parts, ".")]
}

// tell remembers what the guest is told.
func (s *sysctls) tell(values map[string]string) {
	for key := range values {
		s.told[key] = true
	}
}

// forget drops what belongs to interfaces that are gone.
func (s *sysctls) forget(interfaces []string) {
	maps.DeleteFunc(s.told, func(key string, _ bool) bool {
		parts := strings.SplitN(key, ".", 5)
		if len(parts) < 5 || parts[2] != "conf" || parts[3] == "all" || parts[3] == "default" {
			return false
		}
		return !slices.Contains(interfaces, strings.ReplaceAll(parts[3], "/", "."))
	})
}

// readSysctls reads parameters of the calling thread's namespace. What the kernel does not have is left out.
func readSysctls(keys []string) map[string]string {
	values := make(map[string]string)
	swap := strings.NewReplacer(".", "/", "/", ".")
	for _, key := range keys {
		// The files are of the reading thread's namespace, whichever that is.
		if data, err := os.ReadFile("/proc/sys/" + swap.Replace(key)); err == nil {
			values[key] = strings.Join(strings.Fields(string(data)), " ")
		}
	}
	return values
}
