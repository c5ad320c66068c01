package bundle

import (
	"reflect"
	"strconv"
	"strings"
)

// Support is what runv does with a field.
type Support string

// The kinds of support.
const (
	Honoured Support = "honoured"
	// Refused fields make the bundle fail when they are set.
	Refused Support = "refused"
	// Ignored fields have no meaning here: they are of another platform, or of the host
	// where the container is in a guest. A warning tells that one is set.
	Ignored Support = "ignored"
)

// Field is one field of the runtime-spec's configuration.
type Field struct {
	Path    string // as in JSON; "[]" after a list or map with fields below
	Support Support
	Note    string // what an error or a document says beside it
	// zeroIsUnset is for fields that callers send with a zero that means nothing.
	zeroIsUnset bool
	// granted is a value of a refused field that asks for what is the case anyway.
	granted string
}

// OtherPlatform tells whether the field has a meaning on other platforms than Linux only.
func (f Field) OtherPlatform() bool { return f.Note == otherPlatform }

// Fields lists every field that the runtime-spec has for a container's
// configuration. A path stands for all below it that is not listed itself.
func Fields() []Field { return append([]Field(nil), fields...) }

const (
	otherPlatform = "is of another platform"
	notYet        = "is not supported yet"
	noNotify      = "is not supported: no process in the guest can ask an agent on the host"
	noV2          = "does not exist in cgroup v2, which the guest has"
	guestDevice   = "devices are the guest's"
	noAppArmor    = "is not supported: there is no AppArmor in the guest"
	noSELinux     = "is not supported: a SELinux label is given, but there is no SELinux in the guest"
)

var fields = []Field{
	{Path: "ociVersion", Support: Honoured, Note: "major version 1"},

	{Path: "process.terminal", Support: Honoured},
	{Path: "process.consoleSize", Support: Honoured},
	{Path: "process.user.uid", Support: Honoured},
	{Path: "process.user.gid", Support: Honoured},
	{Path: "process.user.umask", Support: Honoured},
	{Path: "process.user.additionalGids", Support: Honoured},
	{Path: "process.user.username", Support: Ignored, Note: otherPlatform},
	{Path: "process.args", Support: Honoured},
	{Path: "process.commandLine", Support: Refused, Note: otherPlatform},
	{Path: "process.env", Support: Honoured},
	{Path: "process.cwd", Support: Honoured},
	{Path: "process.capabilities", Support: Honoured, Note: "all five sets"},
	{Path: "process.rlimits", Support: Honoured},
	{Path: "process.noNewPrivileges", Support: Honoured},
	{Path: "process.apparmorProfile", Support: Refused, Note: noAppArmor, granted: "unconfined"},
	{Path: "process.oomScoreAdj", Support: Honoured},
	{Path: "process.scheduler", Support: Honoured},
	{Path: "process.selinuxLabel", Support: Refused, Note: noSELinux},
	{Path: "process.ioPriority", Support: Honoured},
	{Path: "process.execCPUAffinity", Support: Honoured, Note: "the CPUs are the guest's"},

	{Path: "root.path", Support: Honoured},
	{Path: "root.readonly", Support: Honoured},
	{Path: "hostname", Support: Honoured},
	{Path: "domainname", Support: Honoured},

	{Path: "mounts[].destination", Support: Honoured},
	{Path: "mounts[].type", Support: Honoured, Note: "proc, sysfs, tmpfs, devpts, mqueue, cgroup, cgroup2, bind"},
	{Path: "mounts[].source", Support: Honoured},
	{Path: "mounts[].options", Support: Honoured},
	{Path: "mounts[].uidMappings", Support: Honoured, Note: "where the host's kernel can map the source's file system"},
	{Path: "mounts[].gidMappings", Support: Honoured, Note: "as mounts[].uidMappings"},

	{Path: "hooks.prestart", Support: Honoured},
	{Path: "hooks.createRuntime", Support: Honoured},
	{Path: "hooks.createContainer", Support: Honoured, Note: "run in the guest as the process's user; the path is one of the container"},
	{Path: "hooks.startContainer", Support: Honoured},
	{Path: "hooks.poststart", Support: Honoured},
	{Path: "hooks.poststop", Support: Honoured},
	{Path: "annotations", Support: Honoured},

	{Path: "linux.uidMappings", Support: Honoured, Note: "the ids outside are those of the host's files"},
	{Path: "linux.gidMappings", Support: Honoured, Note: "as linux.uidMappings"},
	{Path: "linux.sysctl", Support: Honoured, Note: "those of the container's namespaces"},
	{Path: "linux.resources.devices", Support: Honoured},
	{Path: "linux.resources.memory.limit", Support: Honoured},
	{Path: "linux.resources.memory.reservation", Support: Honoured},
	{Path: "linux.resources.memory.swap", Support: Honoured},
	{Path: "linux.resources.memory.kernel", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.memory.kernelTCP", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.memory.swappiness", Support: Ignored, Note: noV2},
	{Path: "linux.resources.memory.disableOOMKiller", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.memory.useHierarchy", Support: Ignored, Note: "is always so with the guest's cgroup v2", zeroIsUnset: true},
	{Path: "linux.resources.memory.checkBeforeUpdate", Support: Honoured},
	{Path: "linux.resources.cpu.shares", Support: Honoured},
	{Path: "linux.resources.cpu.quota", Support: Honoured},
	{Path: "linux.resources.cpu.period", Support: Honoured},
	{Path: "linux.resources.cpu.burst", Support: Honoured},
	{Path: "linux.resources.cpu.realtimeRuntime", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.cpu.realtimePeriod", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.cpu.cpus", Support: Honoured, Note: "processors of the VM"},
	{Path: "linux.resources.cpu.mems", Support: Honoured, Note: "memory nodes of the VM"},
	{Path: "linux.resources.cpu.idle", Support: Honoured},
	{Path: "linux.resources.pids.limit", Support: Honoured},
	{Path: "linux.resources.blockIO.weight", Support: Honoured},
	{Path: "linux.resources.blockIO.leafWeight", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.blockIO.weightDevice[].major", Support: Honoured, Note: guestDevice},
	{Path: "linux.resources.blockIO.weightDevice[].minor", Support: Honoured},
	{Path: "linux.resources.blockIO.weightDevice[].weight", Support: Honoured},
	{Path: "linux.resources.blockIO.weightDevice[].leafWeight", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.blockIO.throttleReadBpsDevice", Support: Honoured, Note: guestDevice},
	{Path: "linux.resources.blockIO.throttleWriteBpsDevice", Support: Honoured, Note: guestDevice},
	{Path: "linux.resources.blockIO.throttleReadIOPSDevice", Support: Honoured, Note: guestDevice},
	{Path: "linux.resources.blockIO.throttleWriteIOPSDevice", Support: Honoured, Note: guestDevice},
	{Path: "linux.resources.hugepageLimits", Support: Honoured},
	{Path: "linux.resources.network", Support: Ignored, Note: noV2, zeroIsUnset: true},
	{Path: "linux.resources.rdma", Support: Honoured, Note: guestDevice},
	{Path: "linux.resources.unified", Support: Honoured, Note: "files of controllers, cgroup.max.depth, cgroup.max.descendants"},
	{Path: "linux.cgroupsPath", Support: Honoured, Note: "the VM's on the host; the container's is the guest's"},
	{Path: "linux.namespaces[].type", Support: Honoured, Note: "pid, ipc, uts, mount, cgroup, user, time, network"},
	{Path: "linux.namespaces[].path", Support: Honoured, Note: "of a container of runv, whose VM is then shared"},
	{Path: "linux.devices", Support: Honoured, Note: "device numbers are the guest's"},
	{Path: "linux.netDevices", Support: Refused, Note: "is not supported: a device of the host cannot be moved into the VM"},
	{Path: "linux.seccomp.defaultAction", Support: Honoured, Note: "all but SCMP_ACT_NOTIFY"},
	{Path: "linux.seccomp.defaultErrnoRet", Support: Honoured},
	{Path: "linux.seccomp.architectures", Support: Honoured, Note: "x86_64, x86, x32; others have no effect"},
	{Path: "linux.seccomp.flags", Support: Honoured, Note: "not SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"},
	{Path: "linux.seccomp.listenerPath", Support: Refused, Note: noNotify},
	{Path: "linux.seccomp.listenerMetadata", Support: Refused, Note: noNotify},
	{Path: "linux.seccomp.syscalls", Support: Honoured, Note: "all but SCMP_ACT_NOTIFY"},
	{Path: "linux.rootfsPropagation", Support: Honoured, Note: "within the VM"},
	{Path: "linux.maskedPaths", Support: Honoured},
	{Path: "linux.readonlyPaths", Support: Honoured},
	{Path: "linux.mountLabel", Support: Refused, Note: noSELinux},
	{Path: "linux.intelRdt", Support: Refused, Note: "is not supported: the guest cannot partition the host's caches and memory bandwidth"},
	{Path: "linux.memoryPolicy", Support: Honoured, Note: "the nodes are the guest's"},
	{Path: "linux.personality.domain", Support: Honoured},
	{Path: "linux.personality.flags", Support: Ignored, Note: "has no meaning: no flag is defined"},
	{Path: "linux.timeOffsets", Support: Honoured, Note: "the clocks count from the VM's boot"},

	{Path: "solaris", Support: Refused, Note: otherPlatform},
	{Path: "windows", Support: Refused, Note: otherPlatform},
	{Path: "vm", Support: Refused, Note: "is not supported: the VM is configured on the host"},
	{Path: "zos", Support: Refused, Note: otherPlatform},
	{Path: "freebsd", Support: Refused, Note: otherPlatform},
}

// byPath finds a field by its path.
var byPath = func() map[string]*Field {
	m := make(map[string]*Field, len(fields))
	for i := range fields {
		m[fields[i].Path] = &fields[i]
	}
	return m
}()

// apply walks v along the table: it returns an error for the first refused
// field that is set, and collects warnings for ignored ones. pattern is the
// path of v in the table, path the one for messages; both are empty at the root.
func (c *checker) apply(v reflect.Value, pattern, path string) error {
	if f := byPath[pattern]; f != nil {
		switch set := isSet(v, f.zeroIsUnset); {
		case set && f.Support == Refused && f.granted != "" && v.String() == f.granted:
		case set && f.Support == Refused:
			return c.refused(path, "%s", f.Note)
		case set && f.Support == Ignored:
			c.warn("%s: ignored: it %s", path, f.Note)
		}
		return nil
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return c.apply(v.Elem(), pattern, path)
	case reflect.Struct:
		for f, value := range v.Fields() {
			name := jsonName(f)
			if f.Anonymous && name == "" { // its fields are those of the struct around it
				if err := c.apply(value, pattern, path); err != nil {
					return err
				}
				continue
			}
			if err := c.apply(value, join(pattern, name), join(path, name)); err != nil {
				return err
			}
		}
		return nil
	case reflect.Slice:
		for i := range v.Len() {
			if err := c.apply(v.Index(i), pattern+"[]", path+"["+strconv.Itoa(i)+"]"); err != nil {
				return err
			}
		}
		return nil
	}
	// A field that the table does not know, of a newer runtime-spec than it was
	// made for. A test keeps the table complete.
	if isSet(v, true) {
		return c.refused(path, "%s", notYet)
	}
	return nil
}

// isSet tells whether the document gave the field.
func isSet(v reflect.Value, zeroIsUnset bool) bool {
	switch v.Kind() {
	case reflect.Slice, reflect.Map:
		return v.Len() > 0
	case reflect.Pointer:
		return !v.IsNil() && (!zeroIsUnset || isSet(v.Elem(), true))
	case reflect.Struct:
		for _, f := range v.Fields() {
			if isSet(f, zeroIsUnset) {
				return true
			}
		}
		return false
	}
	return !v.IsZero()
}

func jsonName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
