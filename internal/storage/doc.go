// Package storage makes directories and files of the host available to a VM.
//
// There is one mode so far: a Share, which is a directory served to the VM by a
// server of its own (internal/shareserver), as one virtiofs with the tag Tag. What a container
// needs is bind-mounted below that directory:
//
//	DIR/<container>/rootfs       its root file system
//	DIR/<container>/mounts/<n>   the source of its n-th mount
//
// The guest is hostile: it reaches what is mounted there and nothing else. DIR itself and
// the mount points are read-only for it, a single file is mounted alone and
// never with its directory, and sources are looked up once, so that renaming
// them meanwhile leads nowhere.
//
// The mounts belong to the calling process's mount namespace. A supervisor has
// one of its own (internal/mountns), so they vanish with it. This package knows
// nothing of the specification of containers; it mounts what it is told to, and
// writes nothing into it but mount points that a read-only root lacks.
package storage
