package bundle

import (
	"errors"
	"fmt"
	"math"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/bundle/seccomp"
)

const (
	defaultPeriod = 100_000   // µs of a CPU period that is not given
	maxArg        = 128 << 10 // bytes of one argument or variable: what execve takes
	maxHostname   = 64        // bytes: what sethostname takes
	maxGroups     = 65536     // what setgroups takes
)

// checker validates one document and names its fields.
type checker struct {
	doc      string
	warnings []string
	filter   *seccomp.Filter // that linux.seccomp asks for
}

func (c *checker) invalid(field, format string, args ...any) error {
	return &FieldError{Field: field, Reason: fmt.Sprintf(format, args...), doc: c.doc, kind: errdefs.ErrInvalidArgument}
}

func (c *checker) refused(field, format string, args ...any) error {
	return &FieldError{Field: field, Reason: fmt.Sprintf(format, args...), doc: c.doc, kind: errdefs.ErrNotImplemented}
}

func (c *checker) warn(format string, args ...any) {
	c.warnings = append(c.warnings, fmt.Sprintf(format, args...))
}

// text refuses what no C string can hold.
func (c *checker) text(field, s string) error {
	if strings.ContainsRune(s, 0) {
		return c.invalid(field, "%s holds a NUL", quote(s))
	}
	return nil
}

// semver is the grammar of semantic versioning 2.0.0, loosely after the numbers.
var semver = regexp.MustCompile(`^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)

func (c *checker) spec(s *specs.Spec) error {
	if s.Version == "" {
		return c.invalid("ociVersion", "must not be empty")
	}
	version := semver.FindStringSubmatch(s.Version)
	if version == nil {
		return c.invalid("ociVersion", "%s is not a semantic version", quote(s.Version))
	}
	if version[1] != "1" {
		return c.refused("ociVersion", "%s is not of major version 1", quote(s.Version))
	}
	if err := c.apply(reflect.ValueOf(s), "", ""); err != nil {
		return err
	}
	switch {
	case s.Process == nil:
		return c.invalid("process", "must be given")
	case s.Root == nil:
		return c.invalid("root", "must be given")
	case s.Root.Path == "":
		return c.invalid("root.path", "must not be empty")
	case s.Linux == nil:
		return c.invalid("linux", "must be given")
	}
	if err := c.text("root.path", s.Root.Path); err != nil {
		return err
	}
	if _, ok := s.Annotations[""]; ok {
		return c.invalid("annotations", "a key must not be empty")
	}
	if err := c.process(s.Process, "process."); err != nil {
		return err
	}
	if err := c.hooks(s.Hooks); err != nil {
		return err
	}
	if err := c.mounts(s); err != nil {
		return err
	}
	for _, destination := range exclusive(s) {
		if !slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return isBind(&m) && m.Destination == destination }) {
			return c.invalid("annotations["+ExclusiveAnnotation+"]", "%s is the destination of no bind mount", quote(destination))
		}
	}
	namespaces, err := c.namespaces(s.Linux.Namespaces)
	if err != nil {
		return err
	}
	if err := c.nodeName("hostname", s.Hostname, namespaces[specs.UTSNamespace].given); err != nil {
		return err
	}
	if err := c.nodeName("domainname", s.Domainname, namespaces[specs.UTSNamespace].given); err != nil {
		return err
	}
	if err := c.userNamespace(s, namespaces[specs.UserNamespace]); err != nil {
		return err
	}
	return c.linux(s.Linux, namespaces)
}

func (c *checker) nodeName(field, name string, uts bool) error {
	switch {
	case name == "":
		return nil
	case !uts:
		return c.invalid(field, "cannot be set without a uts namespace")
	case len(name) > maxHostname:
		return c.invalid(field, "is longer than %d bytes", maxHostname)
	}
	return c.text(field, name)
}

// processAlone validates a process that is not part of a specification.
func (c *checker) processAlone(p *specs.Process) error {
	// Messages are relative to the process, the table is not.
	if err := c.apply(reflect.ValueOf(p), "process", ""); err != nil {
		return err
	}
	return c.process(p, "")
}

func (c *checker) process(p *specs.Process, at string) error {
	switch {
	case len(p.Args) == 0:
		return c.invalid(at+"args", "must not be empty")
	case p.Cwd == "":
		return c.invalid(at+"cwd", "must not be empty")
	case !path.IsAbs(p.Cwd):
		return c.invalid(at+"cwd", "%s is not an absolute path", quote(p.Cwd))
	case p.OOMScoreAdj != nil && (*p.OOMScoreAdj < -1000 || *p.OOMScoreAdj > 1000):
		return c.invalid(at+"oomScoreAdj", "%d is not between -1000 and 1000", *p.OOMScoreAdj)
	case p.User.Umask != nil && *p.User.Umask > 0o777:
		return c.invalid(at+"user.umask", "%#o is more than 0777", *p.User.Umask)
	case len(p.User.AdditionalGids) > maxGroups:
		return c.invalid(at+"user.additionalGids", "more than %d groups", maxGroups)
	case p.Terminal && p.ConsoleSize != nil && (p.ConsoleSize.Width > math.MaxUint16 || p.ConsoleSize.Height > math.MaxUint16):
		return c.invalid(at+"consoleSize", "a side is more than %d", math.MaxUint16)
	}
	if err := c.text(at+"cwd", p.Cwd); err != nil {
		return err
	}
	for i, arg := range p.Args {
		if err := c.argument(fmt.Sprintf("%sargs[%d]", at, i), arg); err != nil {
			return err
		}
	}
	for i, env := range p.Env {
		field := fmt.Sprintf("%senv[%d]", at, i)
		if strings.IndexByte(env, '=') <= 0 {
			return c.invalid(field, "%s is not NAME=VALUE", quote(env))
		}
		if err := c.argument(field, env); err != nil {
			return err
		}
	}
	if err := c.rlimits(p.Rlimits, at+"rlimits"); err != nil {
		return err
	}
	if err := c.scheduler(at+"scheduler", p.Scheduler); err != nil {
		return err
	}
	if err := c.ioPriority(at+"ioPriority", p.IOPriority); err != nil {
		return err
	}
	if err := c.affinity(at+"execCPUAffinity", p.ExecCPUAffinity); err != nil {
		return err
	}
	c.capabilities(p.Capabilities)
	return nil
}

func (c *checker) hooks(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	for _, phase := range []struct {
		name  string
		hooks []specs.Hook
	}{
		{"prestart", h.Prestart}, //nolint:staticcheck // deprecated, and used
		{"createRuntime", h.CreateRuntime},
		{"createContainer", h.CreateContainer},
		{"startContainer", h.StartContainer},
		{"poststart", h.Poststart},
		{"poststop", h.Poststop},
	} {
		for i, hook := range phase.hooks {
			if err := c.hook(fmt.Sprintf("hooks.%s[%d].", phase.name, i), hook); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) hook(at string, h specs.Hook) error {
	switch {
	case !path.IsAbs(h.Path):
		return c.invalid(at+"path", "%s is not an absolute path", quote(h.Path))
	case h.Timeout != nil && *h.Timeout <= 0:
		return c.invalid(at+"timeout", "%d is not more than 0 seconds", *h.Timeout)
	}
	if err := c.text(at+"path", h.Path); err != nil {
		return err
	}
	for i, arg := range h.Args {
		if err := c.argument(fmt.Sprintf("%sargs[%d]", at, i), arg); err != nil {
			return err
		}
	}
	for i, env := range h.Env {
		if err := c.argument(fmt.Sprintf("%senv[%d]", at, i), env); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) argument(field, s string) error {
	if len(s) >= maxArg {
		return c.invalid(field, "is longer than %d bytes", maxArg-1)
	}
	return c.text(field, s)
}

// rlimitTypes are those of Linux.
var rlimitTypes = strings.Fields(`RLIMIT_AS RLIMIT_CORE RLIMIT_CPU RLIMIT_DATA RLIMIT_FSIZE
	RLIMIT_LOCKS RLIMIT_MEMLOCK RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_NOFILE RLIMIT_NPROC
	RLIMIT_RSS RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_STACK`)

func (c *checker) rlimits(limits []specs.POSIXRlimit, at string) error {
	seen := map[string]bool{}
	for i, l := range limits {
		field := fmt.Sprintf("%s[%d]", at, i)
		switch {
		case !slices.Contains(rlimitTypes, l.Type):
			return c.invalid(field+".type", "%s is not known", quote(l.Type))
		case seen[l.Type]:
			return c.invalid(field+".type", "%s is given twice", l.Type)
		case l.Soft > l.Hard:
			return c.invalid(field+".soft", "%d is more than the hard limit %d", l.Soft, l.Hard)
		}
		seen[l.Type] = true
	}
	return nil
}

// capabilities warns, as runc does, of unknown names, which are left out, and of ambient capabilities that the kernel lets
// nobody have.
func (c *checker) capabilities(caps *specs.LinuxCapabilities) {
	if caps == nil {
		return
	}
	var names []string
	for _, set := range [][]string{caps.Bounding, caps.Effective, caps.Inheritable, caps.Permitted, caps.Ambient} {
		for _, name := range set {
			if !knownCap(name) && !slices.Contains(names, quote(name)) {
				names = append(names, quote(name))
			}
		}
	}
	slices.Sort(names)
	if more := len(names) - maxUnknown; more > 0 {
		names = append(names[:maxUnknown], fmt.Sprintf("and %d more", more))
	}
	if len(names) > 0 {
		c.warn("process.capabilities: unknown: ignored: %s", strings.Join(names, ", "))
	}
	var told []string
	for _, name := range caps.Ambient {
		raisable := slices.Contains(caps.Inheritable, name) && slices.Contains(caps.Permitted, name)
		if knownCap(name) && !raisable && !slices.Contains(told, name) {
			told = append(told, name)
			c.warn("can't raise ambient capability %s: operation not permitted", name) // runc's text
		}
	}
}

// Capabilities lists the names that process.capabilities may hold.
func Capabilities() []string {
	var names []string
	for _, known := range capability.ListKnown() {
		names = append(names, "CAP_"+strings.ToUpper(known.String()))
	}
	return names
}

func knownCap(name string) bool { return knownCaps[name] }

var knownCaps = func() map[string]bool {
	m := map[string]bool{}
	for _, name := range Capabilities() {
		m[name] = true
	}
	return m
}()

// Namespaces lists the types that linux.namespaces may hold.
func Namespaces() []specs.LinuxNamespaceType {
	return []specs.LinuxNamespaceType{
		specs.CgroupNamespace, specs.IPCNamespace, specs.MountNamespace, specs.NetworkNamespace,
		specs.PIDNamespace, specs.TimeNamespace, specs.UserNamespace, specs.UTSNamespace,
	}
}

// noNetwork is what a container without a network namespace is told, which asks for the host's.
const noNetwork = "there is no network namespace, which means the host's: a virtual machine cannot use the host's network; " +
	"publish ports, or give the container a network of its own"

// namespace is one that the container has: its own, or one of others.
type namespace struct{ given, path bool }

// own tells whether it is the container's own.
func (n namespace) own() bool { return n.given && !n.path }

func (c *checker) namespaces(list []specs.LinuxNamespace) (map[specs.LinuxNamespaceType]namespace, error) {
	has := map[specs.LinuxNamespaceType]namespace{}
	for i, ns := range list {
		at := fmt.Sprintf("linux.namespaces[%d]", i)
		switch {
		case !slices.Contains(Namespaces(), ns.Type):
			return nil, c.invalid(at+".type", "%s is not known", quote(string(ns.Type)))
		case has[ns.Type].given:
			return nil, c.invalid(at+".type", "%s is given twice", ns.Type)
		case ns.Path != "" && ns.Type == specs.MountNamespace:
			return nil, c.refused(at+".path", "a mount namespace cannot be joined")
		case ns.Path != "" && !path.IsAbs(ns.Path):
			return nil, c.invalid(at+".path", "%s is not an absolute path", quote(ns.Path))
		}
		if err := c.text(at+".path", ns.Path); err != nil {
			return nil, err
		}
		has[ns.Type] = namespace{given: true, path: ns.Path != ""}
	}
	if !has[specs.MountNamespace].given {
		return nil, c.refused("linux.namespaces", "a container without a mount namespace is not supported")
	}
	if !has[specs.NetworkNamespace].given {
		return nil, c.refused("linux.namespaces", noNetwork)
	}
	return has, nil
}

func (c *checker) linux(l *specs.Linux, namespaces map[specs.LinuxNamespaceType]namespace) error {
	if err := c.text("linux.cgroupsPath", l.CgroupsPath); err != nil {
		return err
	}
	if err := c.timeOffsets(l.TimeOffsets, namespaces[specs.TimeNamespace]); err != nil {
		return err
	}
	switch l.RootfsPropagation {
	case "", "private", "rprivate", "slave", "rslave", "unbindable", "runbindable":
	case "shared", "rshared":
		c.warn("linux.rootfsPropagation: %s ends at the VM: mounts that are made in it do not reach the host", l.RootfsPropagation)
	default:
		return c.invalid("linux.rootfsPropagation", "%s is not known", quote(l.RootfsPropagation))
	}
	if err := c.paths("linux.maskedPaths", l.MaskedPaths); err != nil {
		return err
	}
	if err := c.paths("linux.readonlyPaths", l.ReadonlyPaths); err != nil {
		return err
	}
	if err := c.sysctls(l.Sysctl, namespaces); err != nil {
		return err
	}
	if err := c.devices(l.Devices); err != nil {
		return err
	}
	if err := c.seccomp(l.Seccomp); err != nil {
		return err
	}
	if err := c.personality("linux.personality", l.Personality); err != nil {
		return err
	}
	if err := c.memoryPolicy("linux.memoryPolicy", l.MemoryPolicy); err != nil {
		return err
	}
	if l.Resources == nil {
		return nil
	}
	if m := l.Resources.Memory; m != nil && positive(m.Swap) && (m.Limit == nil || *m.Limit == 0) {
		return c.invalid("linux.resources.memory.swap", "cannot be set without a memory limit")
	}
	return c.resources(l.Resources, "linux.resources.")
}

// seccomp compiles the profile, which finds all that is wrong with it.
func (c *checker) seccomp(profile *specs.LinuxSeccomp) (err error) {
	if profile == nil {
		return nil
	}
	c.filter, err = seccomp.Compile(profile)
	var wrong *seccomp.Error
	switch {
	case !errors.As(err, &wrong):
		return err
	case wrong.Unsupported:
		return c.refused("linux.seccomp."+wrong.Field, "%s", wrong.Reason)
	}
	return c.invalid("linux.seccomp."+wrong.Field, "%s", wrong.Reason)
}

func (c *checker) paths(field string, paths []string) error {
	for i, p := range paths {
		at := fmt.Sprintf("%s[%d]", field, i)
		if p == "" { // a relative one starts at the root
			return c.invalid(at, "must not be empty")
		}
		if err := c.text(at, p); err != nil {
			return err
		}
	}
	return nil
}

// ipcSysctls belong to an ipc namespace; fs.mqueue.* do, too.
var ipcSysctls = strings.Fields(`kernel.msgmax kernel.msgmnb kernel.msgmni kernel.sem kernel.shmall
	kernel.shmmax kernel.shmmni kernel.shm_rmid_forced`)

var sysctlName = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_:@-]+)+$`)

// sysctls lets through those that belong to a namespace of the container, as runc does.
func (c *checker) sysctls(sysctls map[string]string, namespaces map[specs.LinuxNamespaceType]namespace) error {
	names := make([]string, 0, len(sysctls))
	for name := range sysctls {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		field := "linux.sysctl[" + quote(name) + "]"
		if !sysctlName.MatchString(name) {
			return c.invalid(field, "is not the name of a sysctl")
		}
		if err := c.text(field, sysctls[name]); err != nil {
			return err
		}
		dotted := name
		if i := strings.IndexAny(name, "./"); name[i] == '/' {
			dotted = strings.NewReplacer("/", ".", ".", "/").Replace(name)
		}
		var needs specs.LinuxNamespaceType
		switch {
		case slices.Contains(ipcSysctls, dotted) || strings.HasPrefix(dotted, "fs.mqueue."):
			needs = specs.IPCNamespace
		case strings.HasPrefix(dotted, "net."):
			needs = specs.NetworkNamespace
		case dotted == "kernel.domainname":
			needs = specs.UTSNamespace
		case strings.HasPrefix(dotted, "user."):
			needs = specs.UserNamespace
		case dotted == "kernel.hostname":
			return c.invalid(field, "is set by hostname")
		default:
			return c.invalid(field, "does not belong to a namespace of the container")
		}
		if !namespaces[needs].given {
			return c.invalid(field, "cannot be set without a namespace of type %s", needs)
		}
	}
	return nil
}

func (c *checker) devices(devices []specs.LinuxDevice) error {
	for i, d := range devices {
		at := fmt.Sprintf("linux.devices[%d]", i)
		switch {
		case d.Path == "": // a relative one starts at the root
			return c.invalid(at+".path", "must not be empty")
		case !slices.Contains([]string{"b", "c", "u", "p"}, d.Type):
			return c.invalid(at+".type", "%s is not one of b, c, u, p", quote(d.Type))
		case d.Type != "p" && (d.Major < 0 || d.Major >= 1<<12):
			return c.invalid(at+".major", "%d is not a major number", d.Major)
		case d.Type != "p" && (d.Minor < 0 || d.Minor >= 1<<20):
			return c.invalid(at+".minor", "%d is not a minor number", d.Minor)
		}
		if err := c.text(at+".path", d.Path); err != nil {
			return err
		}
		if d.Type == "b" {
			c.warn("%s: block device %d:%d is the guest's, not the host's", at, d.Major, d.Minor)
		}
	}
	return nil
}
