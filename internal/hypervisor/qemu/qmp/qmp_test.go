package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/hypervisor/qemu/qmp"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// peer is QEMU's end of a connection.
type peer struct {
	t     *testing.T
	conn  *net.UnixConn
	lines *bufio.Reader
}

// pair makes a connection. Both ends are closed with the test.
func pair(t *testing.T) (*net.UnixConn, *peer) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "qmp")
		conn, err := net.FileConn(f)
		f.Close()
		assert.NilError(t, err)
		t.Cleanup(func() { conn.Close() })
		conns[i] = conn.(*net.UnixConn)
	}
	return conns[0], &peer{t, conns[1], bufio.NewReader(conns[1])}
}

// connect negotiates.
func connect(t *testing.T, onEvent func(qmp.Event)) (*qmp.Client, *peer) {
	t.Helper()
	conn, p := pair(t)
	negotiated := make(chan struct{})
	go func() {
		defer close(negotiated)
		p.say(greeting)
		p.answer(`"return": {}`)
	}()
	c, err := qmp.New(t.Context(), conn, onEvent)
	assert.NilError(t, err)
	<-negotiated
	t.Cleanup(func() { c.Close() })
	return c, p
}

func (p *peer) say(line string) {
	if _, err := io.WriteString(p.conn, line+"\r\n"); err != nil {
		p.t.Error(err)
	}
}

type request struct {
	Execute   string
	Arguments map[string]any
	ID        string
}

// hear reads a command.
func (p *peer) hear() (r request) {
	line, err := p.lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		p.t.Error(err)
	}
	return r
}

// answer hears a command and gives it an answer.
func (p *peer) answer(content string) request {
	r := p.hear()
	p.reply(r, content)
	return r
}

func (p *peer) reply(r request, content string) { p.say(fmt.Sprintf(`{"id": %q, %s}`, r.ID, content)) }

func TestNew(t *testing.T) {
	c, _ := connect(t, nil)
	assert.Equal(t, c.Version(), "7.2.22 (Debian)")
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []struct{ name, say, want string }{
		{"nothing", "", "closed"},
		{"half a line", `{"QMP": `, "closed"},
		{"not JSON", "hello\n", "parse"},
		{"an event first", `{"event": "RESET"}` + "\n", "something else"},
		{"a line without end", strings.Repeat("x", 2<<20), "longer than"},
		{"no answer to negotiation", greeting + "\n", "closed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, p := pair(t)
			go func() {
				_, _ = io.WriteString(p.conn, c.say) // cut off when the client has read enough
				_ = p.conn.CloseWrite()
			}()
			_, err := qmp.New(t.Context(), conn, nil)
			assert.ErrorContains(t, err, c.want)
			_, err = conn.Write([]byte("x"))
			assert.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

func TestNegotiationRefused(t *testing.T) {
	conn, p := pair(t)
	go func() {
		p.say(greeting)
		p.answer(`"error": {"class": "CommandNotFound", "desc": "not today"}`)
	}()
	_, err := qmp.New(t.Context(), conn, nil)
	assert.Error(t, err, "qmp qmp_capabilities: not today")
}

func TestNewCancelled(t *testing.T) {
	for _, greet := range []bool{false, true} {
		conn, p := pair(t)
		if greet {
			go p.say(greeting)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		_, err := qmp.New(ctx, conn, nil)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}
}

func TestExecute(t *testing.T) {
	c, p := connect(t, nil)
	heard := make(chan request, 1)
	go func() { heard <- p.answer(`"return": {"status": "running"}`) }()
	var result struct{ Status string }
	assert.NilError(t, c.Execute(t.Context(), "query-status", map[string]int{"n": 1}, &result))
	assert.Equal(t, result.Status, "running")
	r := <-heard
	assert.Equal(t, r.Execute, "query-status")
	assert.DeepEqual(t, r.Arguments, map[string]any{"n": 1.0})
}

func TestExecuteRefused(t *testing.T) {
	c, p := connect(t, nil)
	go p.answer(`"error": {"class": "DeviceNotFound", "desc": "Device\n'x'\u001b[31m not found"}`)
	err := c.Execute(t.Context(), "device_del", nil, nil)
	var refused *qmp.Error
	assert.Assert(t, errors.As(err, &refused))
	assert.Equal(t, refused.Class, "DeviceNotFound")
	assert.Error(t, err, "qmp device_del: Device 'x'[31m not found")
}

func TestExecuteWrongResult(t *testing.T) {
	c, p := connect(t, nil)
	go p.answer(`"return": []`)
	var result struct{}
	assert.ErrorContains(t, c.Execute(t.Context(), "stop", nil, &result), "parse result")
}

// Answers come in another order than the calls, with events between them.
func TestConcurrentCalls(t *testing.T) {
	events := make(chan string, 10)
	c, p := connect(t, func(e qmp.Event) { events <- e.Name })
	const n = 8
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			var got int
			if err := c.Execute(t.Context(), "double", map[string]int{"n": i}, &got); err != nil || got != 2*i {
				t.Errorf("double %d: %d, %v", i, got, err)
			}
		})
	}
	var requests []request
	for range n {
		requests = append(requests, p.hear())
	}
	for i := n - 1; i >= 0; i-- {
		p.say(`{"timestamp": {"seconds": 1}, "event": "RTC_CHANGE", "data": {}}`)
		p.reply(requests[i], fmt.Sprintf(`"return": %v`, 2*requests[i].Arguments["n"].(float64)))
	}
	all.Wait()
	assert.Equal(t, len(events), n)
}

func TestEventsInOrder(t *testing.T) {
	var seen []string
	c, p := connect(t, func(e qmp.Event) { seen = append(seen, e.Name+string(e.Data)) })
	p.say(`{"event": "STOP"}`)
	p.say(`{"event": "SHUTDOWN", "data": {"reason":"guest-reset"}}`)
	go p.answer(`"return": {}`)
	assert.NilError(t, c.Execute(t.Context(), "cont", nil, nil)) // so both were read before
	assert.DeepEqual(t, seen, []string{"STOP", `SHUTDOWN{"reason":"guest-reset"}`})
}

// A call that was given up does not spoil the ones after it.
func TestCallGivenUp(t *testing.T) {
	c, p := connect(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan request)
	go func() {
		r := p.hear()
		cancel()
		gone <- r
	}()
	assert.ErrorIs(t, c.Execute(ctx, "slow", nil, nil), context.Canceled)
	p.reply(<-gone, `"return": 1`)
	go p.answer(`"return": 2`)
	var got int
	assert.NilError(t, c.Execute(t.Context(), "fast", nil, &got))
	assert.Equal(t, got, 2)
}

// A peer that reads nothing does not hold a caller beyond its context.
func TestPeerReadsNothing(t *testing.T) {
	c, _ := connect(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := c.Execute(ctx, "long", map[string]string{"x": strings.Repeat("x", 2<<20)}, nil)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	// Half a message went out: nothing can be said any more.
	assert.ErrorIs(t, c.Execute(t.Context(), "next", nil, nil), qmp.ErrClosed)
}

func TestConnectionEnds(t *testing.T) {
	for _, c := range []struct{ name, last string }{
		{"end of file", ""},
		{"garbage", "garbage\n"},
		{"long line", strings.Repeat(" ", 2<<20)},
		{"both answer and event", `{"event": "x", "return": {}}` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, p := connect(t, nil)
			go func() {
				p.hear()
				_, _ = io.WriteString(p.conn, c.last)
				p.conn.Close()
			}()
			assert.ErrorIs(t, client.Execute(t.Context(), "stop", nil, nil), qmp.ErrClosed)
			<-client.Done()
			assert.ErrorIs(t, client.Execute(t.Context(), "cont", nil, nil), qmp.ErrClosed)
		})
	}
}

// The answer to quit may be the last thing QEMU says.
func TestLastAnswerCounts(t *testing.T) {
	for range 50 {
		c, p := connect(t, nil)
		go func() {
			p.answer(`"return": {}`)
			p.conn.Close()
		}()
		assert.NilError(t, c.Execute(t.Context(), "quit", nil, nil))
	}
}

func TestClose(t *testing.T) {
	c, p := connect(t, nil)
	called := make(chan error, 1)
	go func() { called <- c.Execute(t.Context(), "stop", nil, nil) }()
	p.hear()
	assert.NilError(t, c.Close())
	assert.NilError(t, c.Close())
	assert.ErrorIs(t, <-called, qmp.ErrClosed)
	<-c.Done()
}

func TestSendFile(t *testing.T) {
	c, p := connect(t, nil)
	r, w, err := os.Pipe()
	assert.NilError(t, err)
	defer r.Close()
	defer w.Close()
	type result struct {
		file    *os.File
		request request
	}
	got := make(chan result, 1)
	go func() {
		line, rights := make([]byte, 4096), make([]byte, 128)
		n, nr, _, _, err := p.conn.ReadMsgUnix(line, rights)
		if err != nil {
			t.Error(err)
		}
		var res result
		if err := json.Unmarshal(line[:n], &res.request); err != nil {
			t.Error(err)
		}
		messages, err := unix.ParseSocketControlMessage(rights[:nr])
		if err != nil || len(messages) != 1 {
			t.Error("no control message:", err)
		} else if fds, err := unix.ParseUnixRights(&messages[0]); err != nil || len(fds) != 1 {
			t.Error("no descriptor:", err)
		} else {
			res.file = os.NewFile(uintptr(fds[0]), "got")
		}
		p.reply(res.request, `"return": {}`)
		got <- res
	}()
	assert.NilError(t, c.SendFile(t.Context(), "name", w))
	res := <-got
	defer res.file.Close()
	assert.Equal(t, res.request.Execute, "getfd")
	assert.DeepEqual(t, res.request.Arguments, map[string]any{"fdname": "name"})
	_, err = res.file.WriteString("through the other copy")
	assert.NilError(t, err)
	text := make([]byte, 22)
	_, err = io.ReadFull(r, text)
	assert.NilError(t, err)
	assert.Equal(t, string(text), "through the other copy")
}

func TestSendClosedFile(t *testing.T) {
	c, _ := connect(t, nil)
	f, err := os.Open(os.DevNull)
	assert.NilError(t, err)
	f.Close()
	assert.ErrorContains(t, c.SendFile(t.Context(), "name", f), "closed file")
}
