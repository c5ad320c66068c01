package resolver

import (
	"context"
	"net"
	"sync"
	"time"
)

const (
	// queryTimeout bounds a query: Docker's name server asks three others for four seconds each.
	queryTimeout = 15 * time.Second
	// maxAsked bounds the queries that the host asks at a time, each with a socket. The others
	// wait in the stream.
	maxAsked = 64
)

// Dial connects to the name server, over "udp" or "tcp".
type Dial func(ctx context.Context, network string) (net.Conn, error)

// Relay asks the name server what comes on the stream, until the stream or ctx ends, and closes the
// stream. It is the host's end. It returns when all that it started has ended.
func Relay(ctx context.Context, stream net.Conn, dial Dial) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = stream.Close() })
	var asked sync.WaitGroup
	defer asked.Wait()
	defer stop()
	defer cancel()
	defer stream.Close()

	var writing sync.Mutex
	places := make(chan struct{}, maxAsked)
	for {
		f, err := readFrame(stream)
		if err != nil {
			return
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return
		}
		asked.Go(func() {
			defer func() { <-places }()
			f.message = ask(ctx, f, dial)
			writing.Lock()
			defer writing.Unlock()
			// A guest that does not read its answers gets no more.
			if stream.SetWriteDeadline(time.Now().Add(queryTimeout)) != nil {
				cancel()
			}
			if _, err := stream.Write(f.encode()); err != nil {
				cancel()
			}
		})
	}
}

// ask returns the answer to a query; nothing when there is none.
func ask(ctx context.Context, f frame, dial Dial) []byte {
	if len(f.message) < idSize {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	network, query := "udp", f.message
	if f.protocol == overTCP {
		network, query = "tcp", tcpMessage(f.message)
	}
	conn, err := dial(ctx, network)
	if err != nil {
		return nil
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(query); err != nil {
		return nil
	}
	buf := make([]byte, maxFrame)
	for {
		var answer []byte
		if f.protocol == overTCP {
			answer, err = readMessage(conn)
		} else {
			var n int
			n, err = conn.Read(buf)
			answer = buf[:min(n, maxFrame-headerSize)]
		}
		if err != nil {
			return nil
		}
		if sameID(answer, f.message) {
			return answer
		}
	}
}
