// Package standin owns the host process that stands for a container process
// towards callers who know only pids, and the socket between it and the pod's
// supervisor.
//
// The stand-in is started by runv's command line, so that it is the descendant that
// the caller (a shim, conmon, systemd) expects. It brings the process's stdio as
// file descriptors to the supervisor, forwards every signal it gets and the size
// of its terminal, and exits with the status of the container process. When it is killed,
// the supervisor sees the connection end. It keeps no state that matters.
//
//	command line                    stand-in                      supervisor
//	Start ──────── fork, setup ────► Main
//	                                 Connect ── hello, fds ──────► Listener
//	Process{PID} ◄──── ready ─────── Client
//	Create(token) ─────────────────── gRPC ──────────────────────► Await(token)
//	                                        ◄── ok ──────────────  Peer
//	                                        ── signal, resize ───► Serve
//	                                        ◄── exit ────────────  Exit
//
// A command line that stays in the foreground (exec without -d) is its own stand-in: it
// uses Connect and Client and starts no process.
//
// The socket is standin.sock in the pod's directory, SOCK_SEQPACKET, one message
// a packet, see wire.go. Only root and the supervisor's own user may speak on it.
//
// This package never reads or writes the stdio that it passes on, and knows nothing of
// containers: a token links a connection to a request of the supervisor's API.
package standin
