// Package fault makes the agent's errors: a text for the user and a kind for
// programs. All of internal/guest uses it; internal/guest/server turns the kinds
// into status codes. It knows nothing of RPC.
package fault

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"
)

// New returns an error of this kind, an errdefs sentinel, whose text is the
// formatted one alone.
func New(kind error, format string, args ...any) error {
	return &fault{kind: kind, err: fmt.Errorf(format, args...)}
}

type fault struct {
	kind error
	err  error
}

// Error is the text without the kind's own words.
func (f *fault) Error() string { return f.err.Error() }

// Unwrap lets errors.Is find the kind and what the text was made of.
func (f *fault) Unwrap() []error { return []error{f.kind, f.err} }

// kinds names the kinds for the way from the stage to the agent.
var kinds = map[string]error{
	"invalid argument":    errdefs.ErrInvalidArgument,
	"not found":           errdefs.ErrNotFound,
	"permission denied":   errdefs.ErrPermissionDenied,
	"failed precondition": errdefs.ErrFailedPrecondition,
	"not implemented":     errdefs.ErrNotImplemented,
}

// Kind names the kind of err; "" when it has none.
func Kind(err error) string {
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			return name
		}
	}
	return ""
}

// OfKind returns an error with the text and the kind that Kind has named; a kind
// without name becomes errdefs.ErrInternal.
func OfKind(name, text string) error {
	kind, ok := kinds[name]
	if !ok {
		kind = errdefs.ErrInternal
	}
	return &fault{kind: kind, err: errors.New(text)}
}

// Cause is err without the operation and path that the standard library puts
// before it, for texts that name both themselves.
func Cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
