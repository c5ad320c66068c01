package journal_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/journal"
)

// Whatever the file holds, Decode returns, and what it returns can be written again.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"seq":1,"time":"2026-11-23T17:44:51Z","type":"exit","container":"a","status":7}` + "\n"))
	f.Add([]byte("{\"seq\":2}\n{\"seq\":3,\"ty"))
	f.Fuzz(func(t *testing.T, data []byte) {
		events, err := journal.Decode(bytes.NewReader(data), 1, nil)
		if err != nil {
			return
		}
		for _, ev := range events {
			assert.Assert(t, ev.Seq > 1)
			_, err := json.Marshal(ev)
			assert.NilError(t, err)
		}
	})
}
