package storage

import (
	"testing"

	"gotest.tools/v3/assert"
)

// There is no file system with such lists on a machine for tests; what the kernel lists for one is known.
func TestForeignAccessControl(t *testing.T) {
	for names, want := range map[string]string{
		"": "",
		"user.system.nfs4_acl\x00system.posix_acl_access\x00security.selinux\x00": "",
		"security.selinux\x00system.nfs4_acl\x00":                                 "NFSv4",
		"system.cifs_acl\x00": "Windows",
		"system.richacl\x00":  "rich",
	} {
		assert.Equal(t, foreignLists([]byte(names)), want, "%q", names)
	}
}
