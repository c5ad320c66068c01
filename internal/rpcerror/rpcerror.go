// Package rpcerror is the one place where errors become gRPC status codes and
// codes become errors again. An error crosses a process boundary as its whole text and a
// kind, and the kinds are containerd's errdefs.
package rpcerror

import (
	"context"
	"errors"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxText bounds the text that a peer can put into an error.
const maxText = 16 << 10

// kinds pairs each kind with its code.
var kinds = []struct {
	kind error
	code codes.Code
}{
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
	{errdefs.ErrInternal, codes.Internal},
}

// New returns an error with this text and kind, an errdefs sentinel. The text
// stands alone: the kind's own words are not appended.
func New(kind error, text string) error { return &kindError{text: text, kind: kind} }

// ToStatus returns err as a gRPC status error: its text, and the code of its
// kind; Unknown for an error without one. nil stays nil.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	for _, k := range kinds {
		if errors.Is(err, k.kind) {
			return status.Error(k.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// FromStatus is the inverse of ToStatus, for errors that a peer sent. The peer may be
// a guest, so their text is bounded and holds nothing that drives a terminal or
// reorders what it shows. An error that is no status is returned as is.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	text := strings.Map(visible, strings.ToValidUTF8(st.Message(), "?"))
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "..."
	}
	for _, k := range kinds {
		if k.code == st.Code() {
			return &kindError{text: text, kind: k.kind}
		}
	}
	return &kindError{text: text, kind: errdefs.ErrUnknown}
}

// visible replaces what is neither text nor space between text.
func visible(r rune) rune {
	if r == '\n' || r == '\t' || unicode.IsPrint(r) {
		return r
	}
	return '?'
}

// kindError is a text of its own and a kind that errors.Is finds.
type kindError struct {
	text string
	kind error
}

// Error is the text alone.
func (e *kindError) Error() string { return e.text }

// Unwrap is the kind.
func (e *kindError) Unwrap() error { return e.kind }
