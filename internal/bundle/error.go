package bundle

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// FieldError tells what is wrong with one field. It is an
// errdefs.ErrInvalidArgument for a value that nobody could honour and an
// errdefs.ErrNotImplemented for one that runv cannot.
type FieldError struct {
	Field  string // such as "mounts[3].source"; relative to the document
	Reason string
	doc    string
	kind   error
}

// Error is one line: the document, the field, the reason.
func (e *FieldError) Error() string { return e.doc + ": " + e.Field + ": " + e.Reason }

// Unwrap returns the kind.
func (e *FieldError) Unwrap() error { return e.kind }

// maxText bounds what an error message quotes.
const maxText = 128

// quote makes a value of the document fit for an error message of one line.
func quote(s string) string {
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "..."
	}
	return fmt.Sprintf("%q", s)
}

// ValidateID tells whether id can name a container: 1 to 255 bytes of letters,
// digits and "_+-.", and neither "." nor "..", since it also names a directory.
// The error is errdefs.ErrInvalidArgument and quotes the id.
func ValidateID(id string) error {
	bad := func(reason string) error {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("container id %s: %s", quote(id), reason))
	}
	switch {
	case id == "":
		return bad("must not be empty")
	case len(id) > maxID:
		return bad(fmt.Sprintf("is longer than %d bytes", maxID))
	case id == "." || id == "..":
		return bad("would not name a directory of its own")
	}
	for _, r := range id {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
		case strings.ContainsRune("_+-.", r):
		default:
			return bad(fmt.Sprintf("may hold letters, digits and _+-. but not %q", r))
		}
	}
	return nil
}

// maxID is what Linux takes as a file name.
const maxID = 255
