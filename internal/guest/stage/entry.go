package stage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// EntrySymbol is where a program that links this package must start, by the linker's flag -E, to
// be able to enter user and time namespaces: the kernel lets only a process with a single
// thread do so, and Go's runtime starts more before anything of Go's runs. Entry does what the
// arguments say, one after the other, and goes on where the program would have started.
const EntrySymbol = "runv/internal/guest/stage.entry"

func entry()

// entered is what the last system call in entry has returned.
var entered = notEntered

const notEntered = 1

var _ = entry // only the linker refers to it

// EnterArgument is an argument of a stage that is to enter namespaces of these CLONE_NEW* first, of
// what it has as descriptor fd.
func EnterArgument(fd, namespaces int) string {
	return strconv.FormatUint(uint64(fd)<<32|uint64(uint32(namespaces)), 10)
}

// MakeArgument is an argument of a stage that is to make namespaces of these CLONE_NEW* then, as
// whom it has become by entering a user namespace. It tells when it has; see DecodeMade. In a new pid
// namespace the stage can only be born: it forks, the child goes on as a child of the agent, and the
// first process ends.
func MakeArgument(namespaces int) string { return EnterArgument(0, namespaces) }

// DecodeMade tells whether data is the message that namespaces have been made, which comes before all
// others, and which process goes on, by its pid in the pid namespace of the first; 0: the same.
func DecodeMade(data []byte) (pid int, ok bool) {
	if len(data) != 8 {
		return 0, false
	}
	n := binary.LittleEndian.Uint64(data)
	return int(n), n < 1<<31 // a reply is text
}

func tell()

var _ = tell // it is entry's

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
