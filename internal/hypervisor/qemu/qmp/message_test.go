package qmp

import (
	"bufio"
	"bytes"
	"io"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

func FuzzDecode(f *testing.F) {
	for _, line := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"}, "capabilities": ["oob"]}}`,
		`{"return": {}, "id": "1"}`,
		`{"return": [{"name": "x"}], "id": "12"}`,
		`{"error": {"class": "GenericError", "desc": "Parameter 'id' is missing"}, "id": "2"}`,
		`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`,
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`,
		`{"event": "x", "return": {}}`,
		`{"return": null}`, `{"id": 1}`, `{}`, `[]`, `null`, ``,
		`{"error": {"desc": "` + strings.Repeat("\\u001b", 3000) + `"}}`,
		strings.Repeat(`[`, 20000),
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := decode(line)
		kinds := 0
		if m.greeting != nil {
			kinds++
			assert.Assert(t, len(m.greeting.String()) < 3*20+maxName+10)
		}
		if m.event != nil {
			kinds++
			assert.Assert(t, len(m.event.Name) <= maxName && len(m.event.Data) <= len(line))
		}
		if r := m.reply; r != nil {
			kinds++
			assert.Assert(t, len(r.id) <= maxName && len(r.result) <= len(line))
			if r.err != nil {
				assert.Assert(t, len(r.err.Desc) <= maxDesc && !strings.ContainsAny(r.err.Error(), "\n\r\x1b"))
			}
		}
		if err != nil {
			assert.Equal(t, kinds, 0)
			return
		}
		assert.Equal(t, kinds, 1)
	})
}

func FuzzReadLine(f *testing.F) {
	f.Add([]byte("{}\r\n{}\n\n"))
	f.Add([]byte("no end"))
	f.Add(bytes.Repeat([]byte("x"), 5000))
	f.Fuzz(func(t *testing.T, data []byte) {
		lines := bufio.NewReaderSize(bytes.NewReader(data), 16)
		var got [][]byte
		for {
			line, err := readLine(lines)
			if err != nil {
				break
			}
			got = append(got, bytes.Clone(line))
		}
		var want [][]byte
		for line := range bytes.Lines(data) {
			if bytes.HasSuffix(line, []byte("\n")) {
				want = append(want, bytes.TrimRight(line, "\r\n"))
			}
		}
		assert.DeepEqual(t, got, want)
	})
}

func TestReadLineBound(t *testing.T) {
	fits := strings.Repeat("x", maxLine-1) + "\n"
	line, err := readLine(bufio.NewReader(strings.NewReader(fits)))
	assert.NilError(t, err)
	assert.Equal(t, len(line), maxLine-1)
	_, err = readLine(bufio.NewReader(strings.NewReader("x" + fits)))
	assert.ErrorContains(t, err, "longer than")
	_, err = readLine(bufio.NewReader(strings.NewReader("cut")))
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
}
