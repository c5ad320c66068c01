package agentclient

import "time"

// maxInline is how long a part of a request may be that travels in it: RPC's messages are bounded to 4 MiB.
const maxInline = 1 << 20

// Document is a part of a request that may be longer than a message.
type Document struct {
	Inline []byte // nil if it goes over the stream
	Stream uint32 // the stream's number; 0: none

	end func()
}

// Send sends a document over a stream of its own if it is long. The caller names the result in a request and calls
// Close after the answer.
func (c *Client) Send(data []byte) (*Document, error) {
	if len(data) <= maxInline {
		return &Document{Inline: data, end: func() {}}, nil
	}
	st, err := c.OpenStream()
	if err != nil {
		return nil, err
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = st.Write(data) // an agent that did not get all of it says so
		_ = st.Close()
	}()
	return &Document{Stream: st.StreamID(), end: func() {
		_ = st.SetDeadline(time.Unix(1, 0))
		_ = st.Close()
		<-sent
	}}, nil
}

// Close ends the sending, whether the agent has taken everything or not.
func (d *Document) Close() { d.end() }
