package hypervisor

import "fmt"

// Errorf is fmt.Errorf for an error that also is of the given kind, one of the
// errdefs sentinels, without the sentinel's words in its text. The drivers use
// it.
func Errorf(kind error, format string, args ...any) error {
	return &kindError{kind: kind, err: fmt.Errorf(format, args...)}
}

type kindError struct {
	kind, err error
}

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }
