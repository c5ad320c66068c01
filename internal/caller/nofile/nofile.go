// Package nofile knows the limit of open files that this process was started with. Go's runtime
// raises the soft one for itself before main, and tells nobody what it was; a container's process shall have
// that one.
//
// internal/caller is who asks. The package must import nothing that needs syscall: Go initializes packages in
// the order of their paths once all that they import is ready, and so this one before syscall, which raises
// the limit.
package nofile

// limit is struct rlimit64.
type limit struct{ soft, hard uint64 }

// started is what the kernel said before anybody could change it; ok is false on an architecture for which
// there is no way to ask.
var started, ok = read()

// AtStart returns the soft and the hard limit; ok is false when they are not known.
func AtStart() (soft, hard uint64, known bool) { return started.soft, started.hard, ok }
