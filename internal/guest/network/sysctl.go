package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"runv/internal/guest/fault"
)

const sysctlDir = "/proc/sys"

// sysctlPath is the file of a kernel parameter of network namespaces. As with sysctl(8), a dot in
// the name of an interface is written as a slash: net.ipv4.conf.eth0/100.forwarding.
func sysctlPath(key string) (string, error) {
	if len(key) > maxKey {
		return "", fmt.Errorf("%q: longer than %d bytes", clip(key), maxKey)
	}
	path := strings.Map(func(c rune) rune {
		switch c {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return c
	}, key)
	parts := strings.Split(path, "/")
	if parts[0] != "net" || len(parts) < 2 {
		return "", fmt.Errorf("%q: not below net", clip(key))
	}
	for _, p := range parts {
		if p == "" || p == "." || p == ".." || strings.ContainsFunc(p, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
			return "", fmt.Errorf("%q: not the name of a parameter", clip(key))
		}
	}
	return filepath.Join(sysctlDir, path), nil
}

// mirrored is what an interface has whose IPv6 addresses and routes come from the host. The host's kernel made of
// router advertisements what it made; a second opinion in the guest would give addresses of its own, which nobody
// outside expects. The link-local address is the host's, too.
func mirrored(name string) map[string]string {
	dir := "net.ipv6.conf." + strings.ReplaceAll(name, ".", "/") + "."
	return map[string]string{dir + "accept_ra": "0", dir + "addr_gen_mode": "1"} // that of none
}

// sortKeys puts what is for all interfaces before what is for one: writing the former changes
// the latter.
func sortKeys(values map[string]string) []string {
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	general := func(key string) int {
		switch {
		case !strings.Contains(key, ".conf.") && !strings.Contains(key, ".neigh."):
			return 0
		case strings.Contains(key, ".all."):
			return 1
		case strings.Contains(key, ".default."):
			return 2
		}
		return 3
	}
	slices.SortFunc(keys, func(a, b string) int {
		if d := general(a) - general(b); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	return keys
}

// writeSysctl sets a parameter of the calling thread's network namespace and returns what it was; known tells
// whether it can be read at all. When it has the value already nothing is written: some writes have effects
// of their own.
func writeSysctl(key, value string) (old string, known bool, err error) {
	path, err := sysctlPath(key)
	if err != nil {
		return "", false, err
	}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return "", false, fault.Cause(err)
	}
	old, known = strings.TrimRight(string(data), "\n"), err == nil
	if known && strings.Join(strings.Fields(old), " ") == strings.Join(strings.Fields(value), " ") {
		return old, true, nil
	}
	return old, known, fault.Cause(os.WriteFile(path, []byte(value), 0))
}

// memoryLimits are parameters that the kernel derives from the memory of the machine for each new network namespace. The agent has
// set those of its own namespace, the first one, to what the host has.
var memoryLimits = []string{"net.ipv4.tcp_max_syn_backlog", "net.ipv4.tcp_max_tw_buckets"}

// firstLimits reads memoryLimits of the calling thread's network namespace. What the kernel does not have is left out.
func firstLimits() map[string]string {
	limits := make(map[string]string)
	for _, key := range memoryLimits {
		path, err := sysctlPath(key)
		if err != nil {
			continue
		}
		if data, err := os.ReadFile(path); err == nil {
			limits[key] = strings.TrimSpace(string(data))
		}
	}
	return limits
}

// setLimits gives the calling thread's network namespace what firstLimits has returned.
func setLimits(limits map[string]string) error {
	for key, value := range limits {
		if _, _, err := writeSysctl(key, value); err != nil {
			return fmt.Errorf("set %s to %s: %w", key, value, err)
		}
	}
	return nil
}
