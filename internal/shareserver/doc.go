// Package shareserver is the process that serves a share to a VM: a face of the program, which internal/storage starts for
// each share (Command) and which runs Main.
//
// It connects internal/vhostuser, which has the guest's requests, with internal/sharefs, which does what they ask for.
// Whoever takes this process over by a fault in one of them has what the guest can reach anyway, the served
// directory as root, and is to have nothing else of the host:
//   - namespaces of its own: no network, no other process, and the served directory as the root of all that is
//     mounted (sandbox.go);
//   - the capabilities that a file server needs, and no way to get others;
//   - no system calls but those that it needs (filter.go).
//
// It ends when the VMM hangs up, and when whoever started it does, closes the control socket or dies.
package shareserver
