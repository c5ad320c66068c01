package container

import (
	"strings"

	"golang.org/x/sys/unix"

	"runv/internal/guest/stage"
)

// flagOption is a mount option that sets or clears a mount(2) flag.
type flagOption struct {
	clear bool
	flag  uintptr
}

var flagOptions = map[string]flagOption{
	"acl":           {false, unix.MS_POSIXACL},
	"async":         {true, unix.MS_SYNCHRONOUS},
	"atime":         {true, unix.MS_NOATIME},
	"bind":          {false, unix.MS_BIND},
	"defaults":      {false, 0},
	"dev":           {true, unix.MS_NODEV},
	"diratime":      {true, unix.MS_NODIRATIME},
	"dirsync":       {false, unix.MS_DIRSYNC},
	"exec":          {true, unix.MS_NOEXEC},
	"iversion":      {false, unix.MS_I_VERSION},
	"lazytime":      {false, unix.MS_LAZYTIME},
	"loud":          {true, unix.MS_SILENT},
	"mand":          {false, unix.MS_MANDLOCK},
	"noacl":         {true, unix.MS_POSIXACL},
	"noatime":       {false, unix.MS_NOATIME},
	"nodev":         {false, unix.MS_NODEV},
	"nodiratime":    {false, unix.MS_NODIRATIME},
	"noexec":        {false, unix.MS_NOEXEC},
	"noiversion":    {true, unix.MS_I_VERSION},
	"nolazytime":    {true, unix.MS_LAZYTIME},
	"nomand":        {true, unix.MS_MANDLOCK},
	"norelatime":    {true, unix.MS_RELATIME},
	"nostrictatime": {true, unix.MS_STRICTATIME},
	"nosuid":        {false, unix.MS_NOSUID},
	"nosymfollow":   {false, unix.MS_NOSYMFOLLOW},
	"rbind":         {false, unix.MS_BIND | unix.MS_REC},
	"relatime":      {false, unix.MS_RELATIME},
	"remount":       {false, unix.MS_REMOUNT},
	"ro":            {false, unix.MS_RDONLY},
	"rw":            {true, unix.MS_RDONLY},
	"silent":        {false, unix.MS_SILENT},
	"strictatime":   {false, unix.MS_STRICTATIME},
	"suid":          {true, unix.MS_NOSUID},
	"symfollow":     {true, unix.MS_NOSYMFOLLOW},
	"sync":          {false, unix.MS_SYNCHRONOUS},
}

var propagationOptions = map[string]uintptr{
	"private":     unix.MS_PRIVATE,
	"shared":      unix.MS_SHARED,
	"slave":       unix.MS_SLAVE,
	"unbindable":  unix.MS_UNBINDABLE,
	"rprivate":    unix.MS_PRIVATE | unix.MS_REC,
	"rshared":     unix.MS_SHARED | unix.MS_REC,
	"rslave":      unix.MS_SLAVE | unix.MS_REC,
	"runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// attrOption is a change of mount attributes as mount_setattr(2) takes it.
type attrOption struct{ set, clear uint64 }

// recOptions are changes to a mount and all below it. The access times are one value, which an
// option sets or, with "no", leaves alone; so do mount(2) and runc.
var recOptions = map[string]attrOption{
	"rro":            {set: unix.MOUNT_ATTR_RDONLY},
	"rrw":            {clear: unix.MOUNT_ATTR_RDONLY},
	"rnosuid":        {set: unix.MOUNT_ATTR_NOSUID},
	"rsuid":          {clear: unix.MOUNT_ATTR_NOSUID},
	"rnodev":         {set: unix.MOUNT_ATTR_NODEV},
	"rdev":           {clear: unix.MOUNT_ATTR_NODEV},
	"rnoexec":        {set: unix.MOUNT_ATTR_NOEXEC},
	"rexec":          {clear: unix.MOUNT_ATTR_NOEXEC},
	"rnodiratime":    {set: unix.MOUNT_ATTR_NODIRATIME},
	"rdiratime":      {clear: unix.MOUNT_ATTR_NODIRATIME},
	"rrelatime":      {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME},
	"rnorelatime":    {},
	"rnoatime":       {set: unix.MOUNT_ATTR_NOATIME, clear: unix.MOUNT_ATTR__ATIME},
	"ratime":         {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME},
	"rstrictatime":   {set: unix.MOUNT_ATTR_STRICTATIME, clear: unix.MOUNT_ATTR__ATIME},
	"rnostrictatime": {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME},
	"rnosymfollow":   {set: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"rsymfollow":     {clear: unix.MOUNT_ATTR_NOSYMFOLLOW},
}

// parseOptions reads the options of one mount of a specification into m. What is no
// option of the kernel's mount interface is left to the file system.
func parseOptions(m *stage.Mount, options []string) {
	var data []string
	var cleared uintptr
	for _, o := range options {
		if attr, ok := recOptions[o]; ok {
			apply(&m.RecSet, &m.RecClear, attr)
			continue
		}
		if flag, ok := propagationOptions[o]; ok {
			m.Propagation = append(m.Propagation, flag)
			continue
		}
		if o == "tmpcopyup" {
			m.CopyUp = m.Type == "tmpfs"
			continue
		}
		f, ok := flagOptions[o]
		switch {
		case !ok:
			data = append(data, o)
		case f.clear:
			m.Flags &^= f.flag
			cleared |= f.flag
		default:
			m.Flags |= f.flag
			cleared &^= f.flag
		}
	}
	m.Data = strings.Join(data, ",")
	if m.Type == "bind" {
		bindAttributes(m, cleared)
	}
}

// flagAttributes are the attributes of a mount by their flags of mount(2).
var flagAttributes = map[uintptr]uint64{
	unix.MS_RDONLY:      unix.MOUNT_ATTR_RDONLY,
	unix.MS_NOSUID:      unix.MOUNT_ATTR_NOSUID,
	unix.MS_NODEV:       unix.MOUNT_ATTR_NODEV,
	unix.MS_NOEXEC:      unix.MOUNT_ATTR_NOEXEC,
	unix.MS_NODIRATIME:  unix.MOUNT_ATTR_NODIRATIME,
	unix.MS_NOSYMFOLLOW: unix.MOUNT_ATTR_NOSYMFOLLOW,
}

// bindAttributes sets the changes of attributes that a bind mount's flags stand for. A remount
// clears all that it does not set.
func bindAttributes(m *stage.Mount, cleared uintptr) {
	remount := m.Flags&unix.MS_REMOUNT != 0
	for flag, attr := range flagAttributes {
		switch {
		case m.Flags&flag != 0:
			m.Set |= attr
		case cleared&flag != 0, remount && flag != unix.MS_NODIRATIME:
			m.Clear |= attr
		}
	}
	// The kernel's order of precedence, if several are given.
	switch {
	case m.Flags&unix.MS_STRICTATIME != 0:
		m.Set |= unix.MOUNT_ATTR_STRICTATIME
	case m.Flags&unix.MS_NOATIME != 0:
		m.Set |= unix.MOUNT_ATTR_NOATIME
	case m.Flags&(unix.MS_RELATIME|unix.MS_NODIRATIME) == 0:
		return
	}
	m.Clear |= unix.MOUNT_ATTR__ATIME
}

// apply lets a later option win over an earlier one.
func apply(set, clr *uint64, a attrOption) {
	*set = *set&^a.clear | a.set
	*clr = *clr&^a.set | a.clear
}
