// Package sharefs is the file system that a VM sees as its share: a directory of the host, with all that is
// mounted below it, served as FUSE requests (include/uapi/linux/fuse.h).
//
// It is the host's end only of the protocol: requests come in through go-fuse's fuse.ProtocolServer, from a
// virtqueue in production and from /dev/fuse in tests. The guest is hostile: it can send any request at any
// time, and whatever it sends may fail but reaches nothing outside of the served directory, whose process has
// that directory as its root.
//
// Who may do what is decided in the guest, by its kernel, which has all that the decision takes: the caller's
// groups and capabilities, and the modes and POSIX ACLs of the files, which this package passes on. Here on the
// host a new file only has to get the right owner, so a file is made with the caller's uid and gid as the
// file-system ids of the thread, while the thread keeps its capabilities (see credentials.go). A second check by
// the host would know less than the guest's, and refuse what is allowed.
//
// The served directory holds one directory for each container and each volume; their names tell how the guest
// may cache what is below (see volume.go). A volume that others may change at the same time is coherent: the
// guest asks for attributes before each use of them, and coherence.go sees to it that it then notices every
// change of content, however quickly two changes follow each other. Locks are the host's own, so that they hold
// between VMs and against processes of the host (see lock.go).
//
// A guest can know of millions of files, so none of them costs a descriptor for good: an inode is found again
// by its file handle, or by its path where the file system has no handles (see descriptor.go).
package sharefs
