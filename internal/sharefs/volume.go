package sharefs

import (
	"strings"
	"time"
)

// CoherentSuffix ends the name of a directory at the top of the share below which nothing is cached by the guest
// without asking. Whoever mounts below the share gives it such a name.
const CoherentSuffix = "~coherent"

// BindPrefix begins the name of a directory at the top of the share for a bind mount. The others are those of containers, with their
// root file systems.
const BindPrefix = "@"

// cacheTime is how long the guest may use what it knows of a file in a volume that is not coherent.
const cacheTime = time.Second

// A volume is a directory at the top of the share: a container's, with its root file system, or that of a bind.
type volume struct {
	name     string
	bind     bool
	coherent bool
	gone     bool // under FS.mu: Forget was called for it
}

func newVolume(name string) *volume {
	return &volume{name: name, bind: strings.HasPrefix(name, BindPrefix), coherent: strings.HasSuffix(name, CoherentSuffix)}
}

// cacheTimes tell how long the guest may keep a name that leads to the node, and the node's attributes. What lies above
// the volumes' own mounts comes and goes with containers, so the guest always asks.
func (n *node) cacheTimes() (entry, attributes time.Duration) {
	switch {
	case n.mount.own, n.volume.coherent:
		return 0, 0
	case n.mount.top && n.crosses:
		return 0, cacheTime
	}
	return cacheTime, cacheTime
}

// keepsAbsence tells whether the guest may remember for a while that a directory does not have a name.
func (n *node) keepsAbsence() bool { return !n.mount.own && !n.volume.coherent }
