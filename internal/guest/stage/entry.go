package stage

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// EntrySymbol is where a program that links this package must start, by the linker's flag -E, to
// be able to enter user and time namespaces: the kernel lets only a process with a single
// thread do so, and Go's runtime starts more before anything of Go's runs. Entry enters those that
// argv[1] names, of the target, and goes on where the program would have started.
const EntrySymbol = "runv/internal/guest/stage.entry"

func entry()

// entered is what setns in entry has returned.
var entered = notEntered

const notEntered = 1

var _ = entry // only the linker refers to it

// EntryArgument is argv[1] of a stage that is to enter namespaces of these CLONE_NEW* first.
func EntryArgument(namespaces int) string { return strconv.Itoa(namespaces) }

// checkEntry tells whether entry has done what it was to.
func checkEntry() error {
	switch {
	case len(os.Args) < 2 || entered == 0:
		return nil
	case entered == notEntered:
		return errors.New("enter namespaces: the program was not linked to start in " + EntrySymbol)
	}
	return fmt.Errorf("enter namespaces: %w", syscall.Errno(-entered))
}
