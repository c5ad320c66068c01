package bundle

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	maxMappings    = 340     // what a user namespace takes
	maxMappingText = 4096    // bytes: it takes less than a page of text
	maxClockSecs   = 1 << 33 // about what the kernel's clocks can count
	nanosPerSec    = 1_000_000_000
)

// userNamespace checks that there are mappings when there is a user namespace, and that the
// process's ids are in them. A user namespace of others has mappings already; they may be given, too.
func (c *checker) userNamespace(s *specs.Spec, user namespace) error {
	for _, m := range []struct {
		field, ids string
		list       []specs.LinuxIDMapping
		process    uint32
	}{
		{"linux.uidMappings", "process.user.uid", s.Linux.UIDMappings, s.Process.User.UID},
		{"linux.gidMappings", "process.user.gid", s.Linux.GIDMappings, s.Process.User.GID},
	} {
		switch {
		case !user.given && len(m.list) > 0:
			return c.invalid(m.field, "cannot be given without a user namespace")
		case !user.given, user.path && len(m.list) == 0:
			continue
		case len(m.list) == 0:
			return c.invalid(m.field, "must be given with a user namespace")
		}
		if err := c.mappings(m.field, m.list); err != nil {
			return err
		}
		switch {
		case !mapped(m.list, 0):
			return c.invalid(m.field, "must map the container's id 0, which sets it up")
		case !mapped(m.list, m.process):
			return c.invalid(m.ids, "%d is not in %s", m.process, m.field)
		}
	}
	if len(s.Linux.GIDMappings) == 0 {
		return nil
	}
	for i, gid := range s.Process.User.AdditionalGids {
		if !mapped(s.Linux.GIDMappings, gid) {
			return c.invalid(fmt.Sprintf("process.user.additionalGids[%d]", i), "%d is not in linux.gidMappings", gid)
		}
	}
	return nil
}

func mapped(list []specs.LinuxIDMapping, id uint32) bool {
	return slices.ContainsFunc(list, func(m specs.LinuxIDMapping) bool {
		return id >= m.ContainerID && id-m.ContainerID < m.Size
	})
}

// mappings checks a list as the kernel does.
func (c *checker) mappings(field string, list []specs.LinuxIDMapping) error {
	if len(list) > maxMappings {
		return c.invalid(field, "more than %d mappings", maxMappings)
	}
	text := 0
	for i, m := range list {
		at := fmt.Sprintf("%s[%d]", field, i)
		if m.Size == 0 {
			return c.invalid(at+".size", "must not be 0")
		}
		text += len(fmt.Sprintf("%d %d %d\n", m.ContainerID, m.HostID, m.Size))
		for _, side := range []struct {
			name string
			id   func(specs.LinuxIDMapping) uint32
		}{
			{"containerID", func(m specs.LinuxIDMapping) uint32 { return m.ContainerID }},
			{"hostID", func(m specs.LinuxIDMapping) uint32 { return m.HostID }},
		} {
			first, size := side.id(m), m.Size
			if uint64(first)+uint64(size) > math.MaxUint32 {
				return c.invalid(at+".size", "%d ids from %s %d on are more than there are", size, side.name, first)
			}
			for j, other := range list[:i] {
				if o := side.id(other); first < o+other.Size && o < first+size {
					return c.invalid(at+"."+side.name, "overlaps %s[%d]", field, j)
				}
			}
		}
	}
	if text >= maxMappingText {
		return c.invalid(field, "%d bytes of mappings are more than the kernel takes", text)
	}
	return nil
}

func (c *checker) timeOffsets(offsets map[string]specs.LinuxTimeOffset, time namespace) error {
	if len(offsets) > 0 && !time.own() {
		return c.invalid("linux.timeOffsets", "cannot be given without a time namespace of the container's own")
	}
	for _, clock := range slices.Sorted(maps.Keys(offsets)) {
		at := "linux.timeOffsets[" + quote(clock) + "]"
		o := offsets[clock]
		switch {
		case clock != "monotonic" && clock != "boottime":
			return c.invalid(at, "is not a clock: monotonic, boottime")
		case o.Nanosecs >= nanosPerSec:
			return c.invalid(at+".nanosecs", "%d is not less than a second", o.Nanosecs)
		case o.Secs > maxClockSecs || o.Secs < -maxClockSecs:
			return c.invalid(at+".secs", "%d is out of range", o.Secs)
		}
	}
	return nil
}
