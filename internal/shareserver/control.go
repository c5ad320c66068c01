package shareserver

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"runv/internal/sharefs"
)

const (
	// maxMessage bounds a line on the control socket.
	maxMessage = 64 << 10
	// A thread that waits for a lock is told of after waitPatience, and then every waitInterval as long as it waits.
	waitPatience = 50 * time.Millisecond
	waitInterval = 100 * time.Millisecond
	// controlTimeout bounds how long the other end may take to read a message.
	controlTimeout = 10 * time.Second
)

// A message is a line of JSON on the control socket, between the supervisor and the server.
type message struct {
	// From the server.
	Ready   bool   `json:"ready,omitempty"`   // it is in its sandbox
	Waiting []int  `json:"waiting,omitempty"` // threads of the guest that wait for a lock
	Done    uint64 `json:"done,omitempty"`    // the number of a request that has been carried out

	// From the supervisor.
	Number    uint64 `json:"number,omitempty"`    // of the request
	Forget    string `json:"forget,omitempty"`    // close all that is open in this volume
	Interrupt []int  `json:"interrupt,omitempty"` // threads whose waits end
}

// messages sends and receives messages.
type messages struct {
	conn  net.Conn
	lines *bufio.Scanner

	mu sync.Mutex // held while one is sent
}

func newMessages(conn net.Conn) *messages {
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxMessage)
	return &messages{conn: conn, lines: lines}
}

func (m *messages) send(msg message) error {
	line, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.conn.SetWriteDeadline(time.Now().Add(controlTimeout)); err != nil {
		return err
	}
	_, err = m.conn.Write(append(line, '\n'))
	return err
}

// receive returns io.EOF when the other end has closed the socket.
func (m *messages) receive() (msg message, err error) {
	if !m.lines.Scan() {
		if err := m.lines.Err(); err != nil {
			return msg, err
		}
		return msg, io.EOF
	}
	if err := json.Unmarshal(m.lines.Bytes(), &msg); err != nil {
		return msg, fmt.Errorf("read message: %w", err)
	}
	return msg, nil
}

// obey carries out what the supervisor asks for, until the other end of the control socket is closed.
func obey(m *messages, fs *sharefs.FS) error {
	done := make(chan struct{})
	defer close(done)
	go tellWaits(m, fs, done)
	for {
		msg, err := m.receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if msg.Forget != "" {
			fs.ForgetVolume(msg.Forget)
		}
		fs.Interrupt(msg.Interrupt)
		if msg.Number != 0 {
			if err := m.send(message{Done: msg.Number}); err != nil {
				return err
			}
		}
	}
}

// tellWaits lists the threads that wait for locks as long as there are any.
func tellWaits(m *messages, fs *sharefs.FS, done <-chan struct{}) {
	tick := time.NewTicker(waitInterval)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-fs.LockWaits():
		}
		for fs.Usage().Waits > 0 {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			if threads := fs.Waiting(waitPatience); len(threads) > 0 {
				if m.send(message{Waiting: threads}) != nil {
					return // obey sees the end of the connection
				}
			}
		}
	}
}

// A Client is the supervisor's end of a server's control socket. Its methods may be called concurrently.
type Client struct {
	messages *messages
	ready    chan struct{}
	waiting  chan []int
	ended    chan struct{}

	mu      sync.Mutex
	last    uint64
	pending map[uint64]chan struct{}
}

// NewClient takes over a connection whose other end a server has. Close closes it.
func NewClient(conn net.Conn) *Client {
	c := &Client{
		messages: newMessages(conn), ready: make(chan struct{}), waiting: make(chan []int, 1), ended: make(chan struct{}),
		pending: make(map[uint64]chan struct{}),
	}
	go c.receive()
	return c
}

// Close ends the connection, and with it the server.
func (c *Client) Close() error {
	err := c.messages.conn.Close()
	<-c.ended
	return err
}

// Ready is closed when the server is in its sandbox and serves.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// Waiting tells, again and again, which threads of the guest (by their numbers in the agent's pid namespace) wait for a
// lock. What is not taken is replaced by what is told next. The guest can have said anything: the numbers are not checked.
func (c *Client) Waiting() <-chan []int { return c.waiting }

func (c *Client) receive() {
	defer close(c.ended)
	ready := false
	for {
		msg, err := c.messages.receive()
		if err != nil {
			return
		}
		if msg.Ready && !ready {
			ready = true
			close(c.ready)
		}
		if len(msg.Waiting) > 0 {
			select {
			case <-c.waiting: // what nobody has taken is out of date
			default:
			}
			c.waiting <- msg.Waiting
		}
		c.mu.Lock()
		if done := c.pending[msg.Done]; done != nil {
			close(done)
			delete(c.pending, msg.Done)
		}
		c.mu.Unlock()
	}
}

// Interrupt ends the waits of threads for locks.
func (c *Client) Interrupt(threads []int) error {
	if len(threads) == 0 {
		return nil
	}
	if err := c.messages.send(message{Interrupt: threads}); err != nil {
		return fmt.Errorf("interrupt waits for locks: %w", err)
	}
	return nil
}

// Forget makes the server close all that it has open in a volume, whose mount is about to go, and waits until it has, or
// has ended.
func (c *Client) Forget(ctx context.Context, volume string) error {
	done := make(chan struct{})
	c.mu.Lock()
	c.last++
	number := c.last
	c.pending[number] = done
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, number)
		c.mu.Unlock()
	}()
	select {
	case <-c.ended:
		return nil // nothing is open in a server that has ended
	default:
	}
	if err := c.messages.send(message{Number: number, Forget: volume}); err != nil {
		return fmt.Errorf("forget %s: %w", volume, err)
	}
	select {
	case <-done:
		return nil
	case <-c.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("forget %s: %w", volume, context.Cause(ctx))
	}
}
