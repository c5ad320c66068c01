package supervisor

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"runv/internal/hypervisor"
)

func TestParse(t *testing.T) {
	opts, err := parse([]string{"--root", "/r", "--pod", "p", "--debug", "--config", "/c", "--guest-dir", "/g"})
	assert.NilError(t, err)
	assert.Equal(t, opts.Root+opts.Pod+opts.Config.File+opts.Config.GuestDir, "/rp/c/g")
	assert.Assert(t, opts.Debug)
	for _, args := range [][]string{nil, {"--root", "/r"}, {"--pod", "p"}, {"--colour", "red"}} {
		_, err := parse(args)
		assert.ErrorContains(t, err, "supervisor: ", "%v", args)
	}
}

func TestParseToken(t *testing.T) {
	token, err := parseToken([]byte(strings.Repeat("x", 16)))
	assert.NilError(t, err)
	assert.Equal(t, string(token[:]), strings.Repeat("x", 16))
	for _, n := range []int{0, 15, 17, 1 << 20} {
		_, err := parseToken(make([]byte, n))
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%d: %v", n, err)
	}
}

// Each pod's VMM is a user that nobody else is, and always the same one.
func TestUserOfTheVMM(t *testing.T) {
	seen := map[uint32]bool{}
	for _, id := range []string{"", "a", "b", "8f14e45fceea167a5a36"} {
		user, err := vmUser(id, hypervisor.TCG)
		assert.NilError(t, err)
		assert.Assert(t, user.UID >= vmUserBase && user.UID < vmUserBase+vmUserCount, "%#x", user.UID)
		assert.Equal(t, user.GID, user.UID)
		assert.Equal(t, len(user.Groups), 0)
		assert.Assert(t, !seen[user.UID])
		seen[user.UID] = true
		again, err := vmUser(id, hypervisor.TCG)
		assert.NilError(t, err)
		assert.DeepEqual(t, again, user)
	}
}
