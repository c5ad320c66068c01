package guest

import (
	"encoding/binary"
	"os"
)

// channel is the agent's port. It joins what the multiplexer writes as a header and a body
// into one write, because each write to the port is an exit from the virtual
// machine.
type channel struct {
	*os.File
	buf []byte // a header whose body is still to come
}

// A data frame of yamux: version, type, flags (2), stream (4), length (4).
const (
	headerSize = 12
	typeData   = 0
)

// Write implements io.Writer. Only one goroutine writes, as the multiplexer has one for that.
func (c *channel) Write(p []byte) (int, error) {
	if len(c.buf) == 0 {
		if len(p) == headerSize && p[1] == typeData && binary.BigEndian.Uint32(p[8:]) > 0 {
			c.buf = append(c.buf, p...)
			return len(p), nil
		}
		return c.File.Write(p)
	}
	c.buf = append(c.buf, p...)
	_, err := c.File.Write(c.buf)
	c.buf = c.buf[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
