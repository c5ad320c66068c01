package standin_test

import (
	"crypto/rand"
	"os"
	"testing"

	"go.uber.org/goleak"

	"runv/internal/standin"
)

// TestMain also is the stand-in: Start runs the test's own program.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "standin" {
		os.Exit(standin.Main(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}

func newToken() (token standin.Token) {
	_, _ = rand.Read(token[:])
	return token
}
