package vhostuser

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// quit is the token of the event that ends the workers; other tokens are numbers of queues.
const quit = -1

// A pool is the workers and what they wait for.
type pool struct {
	epoll int
	end   int   // eventfd; level-triggered, so that it wakes all
	bells []int // an eventfd for each queue, never read, for wake
	idle  atomic.Int32

	queues []*queue
	wg     sync.WaitGroup
}

func newPool(queues int) (_ *pool, err error) {
	p := &pool{epoll: -1, end: -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if p.end, err = eventfd(); err != nil {
		return nil, err
	}
	if err := p.add(p.end, unix.EPOLLIN, quit); err != nil {
		return nil, err
	}
	for i := range queues {
		bell, err := eventfd()
		if err != nil {
			return nil, err
		}
		p.bells = append(p.bells, bell)
		if err := p.watch(i, bell); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func eventfd() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("create eventfd: %w", err)
	}
	return fd, nil
}

// signal adds to an eventfd that does not block. One whose counter is full has been signalled enough.
func signal(fd int) {
	_, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// watch makes each signal of an eventfd wake a worker for a queue.
func (p *pool) watch(index, fd int) error {
	return p.add(fd, unix.EPOLLIN|unix.EPOLLET, int32(index))
}

func (p *pool) add(fd int, events uint32, token int32) error {
	err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: token})
	if err != nil {
		return fmt.Errorf("watch descriptor: %w", err)
	}
	return nil
}

func (p *pool) unwatch(fd int) {
	_ = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil) // it is there
}

// wake wakes a worker for a queue.
func (p *pool) wake(index int) { signal(p.bells[index]) }

// start starts the workers.
func (p *pool) start(cfg Config) {
	p.idle.Add(int32(cfg.Workers)) //nolint:gosec // a handful
	for range cfg.Workers {
		p.wg.Go(func() { p.work(cfg) })
	}
}

// work is a worker. It is locked to its thread, so that the kernel's wake of the thread is all that a request waits for.
func (p *pool) work(cfg Config) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	debug.SetPanicOnFault(true) // see mapRegion
	events := make([]unix.EpollEvent, 1)
	for {
		n, err := unix.EpollWait(p.epoll, events, -1)
		if n == 0 || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil { // it cannot: the descriptor is an epoll's until all workers have ended
			return
		}
		p.idle.Add(-1)
		if events[0].Fd == quit {
			return
		}
		for q := p.queues[events[0].Fd]; ; {
			r, ok := p.take(q)
			if r == nil {
				if !ok {
					p.idle.Add(1)
				}
				break
			}
			p.handle(cfg, q, r)
		}
	}
}

// take is the queue's, which panics if the kernel has no memory for the guest's. ok is false then.
func (p *pool) take(q *queue) (r *Request, ok bool) {
	defer func() {
		if !ok {
			q.crash(recover())
		}
	}()
	return q.take(), true
}

// handle runs the handler. What it may panic for concerns one guest's request, and must not
// be a way to end the device for the others that use it.
func (p *pool) handle(cfg Config, q *queue, r *Request) {
	defer func() {
		if v := recover(); v != nil {
			q.crash(v)
			r.drop()
		}
	}()
	cfg.Handle(r)
}

// crash stops a queue after a panic.
func (q *queue) crash(v any) {
	stack := debug.Stack()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.fail(fmt.Errorf("panic: %v\n%s", v, stack))
}

// stop ends the workers, and returns when all have ended: when what they handle is done.
func (p *pool) stop() {
	signal(p.end)
	p.wg.Wait()
}

func (p *pool) close() {
	for _, fd := range append([]int{p.end, p.epoll}, p.bells...) {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
