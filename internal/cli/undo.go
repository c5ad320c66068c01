package cli

import (
	"errors"
	"slices"
)

// undo is a list of what to take back when an operation fails.
type undo struct {
	steps []func() error
}

// push adds a step; the last one runs first.
func (u *undo) push(step func() error) { u.steps = append(u.steps, step) }

// release forgets all steps: the operation has succeeded.
func (u *undo) release() { u.steps = nil }

// run takes everything back and tells what could not be.
func (u *undo) run() error {
	var errs []error
	for _, step := range slices.Backward(u.steps) {
		errs = append(errs, step())
	}
	u.steps = nil
	return errors.Join(errs...)
}
