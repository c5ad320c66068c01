// Package vhostuser serves a virtio device to a VMM: it is the back end of the vhost-user protocol and
// the device's side of the virtqueues. internal/shareserver calls it, and hands each request on
// to the share's file system.
//
// It knows queues and buffers, and nothing of what they carry. The VMM shares the guest's memory with
// this process, so a request's buffers are slices of that memory: nothing is copied here.
//
// The VMM and the guest are hostile. A message of the VMM that breaks the protocol ends Serve with an
// error that names it. What the guest writes to a queue is read once, checked, and used from the
// copy; a queue with something impossible in it is stopped, while the others go on. Neither can
// make this process read or write outside of the memory that the VMM shared, wait for them in a loop,
// or crash it.
//
// Threads. Workers wait in epoll_wait for the queues' eventfds, edge-triggered, so that a kick of the guest
// wakes one of them and costs it no read. A worker takes one request after the other until the queue
// is empty, and wakes another worker when it leaves requests behind.
package vhostuser
