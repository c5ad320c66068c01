// Package integration tests the command line with real VMs, as its users see it.
package integration

import (
	"testing"

	"runv/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
