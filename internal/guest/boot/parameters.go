package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A kernel derives many limits from the memory that it finds. The guest's has little, and its limits would show in
// containers as some that they do not have under runc. So the host tells its own, and the guest takes them over.
// Which of them, and which values it believes, is told here; the host asks for no others.

const (
	parametersDir = "/proc/sys"
	// laterParameters has those that belong to modules that are not loaded yet: a line "KEY VALUE" for each.
	laterParameters = "/run/runv/parameters.later"
	// maxPID is the most that the kernel takes. The host's own limit may be one for each pid namespace, as since
	// Linux 6.14, and there is the most in a new one.
	maxPID = 4 << 20
)

// A parameter says how the guest takes over a kernel parameter of the host.
type parameter struct {
	how      takeover
	min, max int64 // of each number
	numbers  int   // that it has; 0: it is a text
}

// takeover tells which of two values of a kernel parameter counts.
type takeover int

const (
	// same: the host's.
	same takeover = iota
	// least: the host's if it allows more.
	least
	// leastOrNone: the same, but 0 means that there is no limit.
	leastOrNone
	// heuristic: the host's, but 0 becomes 1. See overcommitKey.
	heuristic
	// text: the host's, unless the kernel would start a program or open a socket for it.
	text
)

// overcommitKey tells what the kernel does when processes ask for more memory than there is. 0 refuses what is more than
// the whole machine has, and the guest has less than the host; 1 refuses nothing; 2 refuses what is above a limit, which the
// host tells in overcommit_kbytes. What containers use is limited by their cgroups in any case.
const overcommitKey = "vm.overcommit_memory"

var parameters = map[string]parameter{
	overcommitKey:          {heuristic, 0, 2, 1},
	"vm.overcommit_ratio":  {same, 0, math.MaxInt32, 1},
	"vm.overcommit_kbytes": {same, 0, math.MaxInt64, 1},
	"vm.max_map_count":     {least, 0, math.MaxInt32, 1},
	"vm.mmap_min_addr":     {same, 0, 1 << 20, 1},

	"vm.unprivileged_userfaultfd": {same, 0, 1, 1},

	"kernel.threads-max":         {least, 20, 1<<30 - 1, 1},
	"kernel.keys.maxkeys":        {least, 0, math.MaxInt32, 1},
	"kernel.keys.maxbytes":       {least, 0, math.MaxInt32, 1},
	"kernel.keys.root_maxkeys":   {least, 0, math.MaxInt32, 1},
	"kernel.keys.root_maxbytes":  {least, 0, math.MaxInt32, 1},
	"kernel.pty.max":             {least, 0, math.MaxInt32, 1},
	"kernel.perf_event_paranoid": {same, -1, 4, 1},
	"kernel.perf_event_mlock_kb": {least, 0, math.MaxInt32, 1},
	"kernel.yama.ptrace_scope":   {same, 0, 3, 1},
	"kernel.dmesg_restrict":      {same, 0, 1, 1},
	"kernel.kptr_restrict":       {same, 0, 2, 1},
	"kernel.core_uses_pid":       {same, 0, 1, 1},
	"kernel.core_pattern":        {text, 0, 0, 0},

	"kernel.unprivileged_bpf_disabled": {same, 0, 2, 1},

	"fs.file-max":                           {least, 0, math.MaxInt64, 1},
	"fs.nr_open":                            {least, 8, math.MaxInt32 &^ 63, 1},
	"fs.aio-max-nr":                         {least, 0, math.MaxInt64, 1},
	"fs.mount-max":                          {least, 1, math.MaxInt32, 1},
	"fs.pipe-max-size":                      {least, 4096, 1 << 31, 1},
	"fs.pipe-user-pages-soft":               {leastOrNone, 0, math.MaxInt64, 1},
	"fs.pipe-user-pages-hard":               {leastOrNone, 0, math.MaxInt64, 1},
	"fs.epoll.max_user_watches":             {least, 0, math.MaxInt64, 1},
	"fs.inotify.max_queued_events":          {least, 0, math.MaxInt32, 1},
	"fs.inotify.max_user_instances":         {least, 0, math.MaxInt32, 1},
	"fs.inotify.max_user_watches":           {least, 0, math.MaxInt32, 1},
	"fs.fanotify.max_queued_events":         {least, 0, math.MaxInt32, 1},
	"fs.fanotify.max_user_groups":           {least, 0, math.MaxInt32, 1},
	"fs.fanotify.max_user_marks":            {least, 0, math.MaxInt32, 1},
	"fs.protected_symlinks":                 {same, 0, 1, 1},
	"fs.protected_hardlinks":                {same, 0, 1, 1},
	"fs.protected_fifos":                    {same, 0, 2, 1},
	"fs.protected_regular":                  {same, 0, 2, 1},
	"fs.suid_dumpable":                      {same, 0, 2, 1},
	"user.max_cgroup_namespaces":            {least, 0, math.MaxInt32, 1},
	"user.max_ipc_namespaces":               {least, 0, math.MaxInt32, 1},
	"user.max_mnt_namespaces":               {least, 0, math.MaxInt32, 1},
	"user.max_net_namespaces":               {least, 0, math.MaxInt32, 1},
	"user.max_pid_namespaces":               {least, 0, math.MaxInt32, 1},
	"user.max_time_namespaces":              {least, 0, math.MaxInt32, 1},
	"user.max_user_namespaces":              {least, 0, math.MaxInt32, 1},
	"user.max_uts_namespaces":               {least, 0, math.MaxInt32, 1},
	"net.core.rmem_max":                     {least, 0, math.MaxInt32, 1},
	"net.core.wmem_max":                     {least, 0, math.MaxInt32, 1},
	"net.core.rmem_default":                 {least, 0, math.MaxInt32, 1},
	"net.core.wmem_default":                 {least, 0, math.MaxInt32, 1},
	"net.core.optmem_max":                   {least, 0, math.MaxInt32, 1},
	"net.ipv4.tcp_mem":                      {least, 0, math.MaxInt64, 3},
	"net.ipv4.udp_mem":                      {least, 0, math.MaxInt64, 3},
	"net.ipv4.tcp_rmem":                     {least, 0, math.MaxInt32, 3}, // new network namespaces have what the first one has
	"net.ipv4.tcp_wmem":                     {least, 0, math.MaxInt32, 3},
	"net.ipv4.tcp_max_syn_backlog":          {least, 0, math.MaxInt32, 1}, // package network carries these two into new network namespaces
	"net.ipv4.tcp_max_tw_buckets":           {least, 0, math.MaxInt32, 1},
	"net.ipv4.tcp_max_orphans":              {least, 0, math.MaxInt32, 1},
	"net.ipv4.neigh.default.gc_thresh1":     {least, 0, math.MaxInt32, 1},
	"net.ipv4.neigh.default.gc_thresh2":     {least, 0, math.MaxInt32, 1},
	"net.ipv4.neigh.default.gc_thresh3":     {least, 0, math.MaxInt32, 1},
	"net.ipv6.neigh.default.gc_thresh1":     {least, 0, math.MaxInt32, 1},
	"net.ipv6.neigh.default.gc_thresh2":     {least, 0, math.MaxInt32, 1},
	"net.ipv6.neigh.default.gc_thresh3":     {least, 0, math.MaxInt32, 1},
	"net.ipv4.tcp_congestion_control":       {text, 0, 0, 0},
	"net.netfilter.nf_conntrack_max":        {least, 0, math.MaxInt32, 1},
	"net.netfilter.nf_conntrack_expect_max": {least, 0, math.MaxInt32, 1},
}

// maxText bounds a parameter that is a text: the kernel cuts off what is longer.
const maxText = 127

// check tells why a value of the host's is not believed.
func (p parameter) check(value string) error {
	if p.how == text {
		if value == "" || len(value) > maxText || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
			return errors.New("it is no word")
		}
		if strings.ContainsAny(value[:1], "|@") {
			return errors.New("the guest has nobody to pass it on to")
		}
		return nil
	}
	_, err := p.parse(value)
	return err
}

// parse reads the numbers of a value and checks them.
func (p parameter) parse(value string) ([]int64, error) {
	words := strings.Fields(value)
	if len(words) != p.numbers {
		return nil, fmt.Errorf("%d numbers, not %d", len(words), p.numbers)
	}
	numbers := make([]int64, len(words))
	for i, w := range words {
		n, err := strconv.ParseInt(w, 10, 64)
		switch {
		case err != nil:
			return nil, err
		case n < p.min || n > p.max:
			return nil, fmt.Errorf("%d is not between %d and %d", n, p.min, p.max)
		}
		numbers[i] = n
	}
	return numbers, nil
}

// merge is what a parameter becomes that is own in the guest and host on the host; own need not be one that would be believed.
func (p parameter) merge(own, host string) (string, error) {
	if p.how == text {
		return host, nil
	}
	theirs, err := p.parse(host)
	if err != nil {
		return "", err
	}
	ours := strings.Fields(own)
	words := make([]string, len(theirs))
	for i, n := range theirs {
		switch p.how {
		case heuristic:
			if n == 0 {
				n = 1
			}
		case least, leastOrNone:
			if i >= len(ours) {
				break
			}
			mine, err := strconv.ParseInt(ours[i], 10, 64)
			if err != nil { // more than 63 bits are more than any
				mine = math.MaxInt64
			}
			if p.how == leastOrNone && (n == 0 || mine == 0) {
				n = 0
			} else {
				n = max(n, mine)
			}
		}
		words[i] = strconv.FormatInt(n, 10)
	}
	return strings.Join(words, " "), nil
}

// SetParameters takes over kernel parameters of the host, by names such as "fs.file-max". All are checked before one is
// written: the error then names the one that is unknown or out of bounds. Those that the kernel does not have are kept
// for the module that has them, if there is one. What the kernel refuses is in failed, and does not keep the others from being
// set.
func SetParameters(values map[string]string) (failed, err error) {
	return setParameters(parametersDir, laterParameters, values)
}

func setParameters(dir, later string, values map[string]string) (failed, err error) {
	keys := slices.Sorted(maps.Keys(values))
	for _, key := range keys {
		p, ok := parameters[key]
		if !ok {
			return nil, fmt.Errorf("kernel parameter %.64q: the host's is not taken over", key)
		}
		if err := p.check(values[key]); err != nil {
			return nil, fmt.Errorf("kernel parameter %s: %.64q: %w", key, values[key], err)
		}
	}
	var missing strings.Builder
	var errs []error
	for _, key := range keys {
		err := setParameter(dir, key, values[key])
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintln(&missing, key, values[key])
			continue
		}
		errs = append(errs, err)
	}
	if missing.Len() > 0 {
		errs = append(errs, os.WriteFile(later, []byte(missing.String()), 0o600))
	}
	return errors.Join(errs...), nil
}

// setParameter sets one that the kernel may not have: fs.ErrNotExist then.
func setParameter(dir, key, value string) error {
	path := filepath.Join(dir, strings.ReplaceAll(key, ".", "/"))
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("kernel parameter %s: %w", key, err)
	}
	own := strings.Join(strings.Fields(string(data)), " ")
	value, err = parameters[key].merge(own, value)
	if err != nil || value == own {
		return err
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("kernel parameter %s: set to %s: %w", key, value, err)
	}
	return nil
}

// setLaterParameters sets the parameters that the kernel did not have when SetParameters was called, as far as it
// has them now.
func setLaterParameters(dir, later string) error {
	data, err := os.ReadFile(later)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if err := setParameter(dir, key, value); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// RaiseProcessLimits gives the agent, and who inherits from it, the limits of processes and of pending signals that the
// kernel would have given its first process for the threads that it allows now.
func RaiseProcessLimits() error {
	data, err := os.ReadFile(filepath.Join(parametersDir, "kernel/threads-max"))
	if err != nil {
		return fmt.Errorf("raise limit of processes: %w", err)
	}
	threads, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return fmt.Errorf("raise limit of processes: %w", err)
	}
	for _, resource := range []int{unix.RLIMIT_NPROC, unix.RLIMIT_SIGPENDING} {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: threads / 2, Max: threads / 2}); err != nil {
			return fmt.Errorf("raise limit of processes: %w", err)
		}
	}
	return nil
}
