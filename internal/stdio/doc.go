// Package stdio moves bytes between files that a caller of runv handed over
// (pipes, terminals, sockets, regular files, devices) and the streams of a
// process in the guest.
//
// A caller's file comes with an open file description that the caller goes on
// using, its shell perhaps. So this package never changes the flags of one:
// O_NONBLOCK set here would break the caller's next read. All the same no
// Read and no Write of it can get stuck: Close ends them at any time, and a
// Source that was closed while it waited has not taken the input that comes next.
//
// Source and Sink are the two ends at the file. Output and Input are the
// pumps between them and a stream. The supervisor calls it; it knows nothing of
// containers, of the agent or of what makes a stream.
package stdio
