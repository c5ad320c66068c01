package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	urfave "github.com/urfave/cli/v3"

	"runv/internal/rpcerror"
)

// Exit statuses beside those of a container's process.
const (
	statusError         = 1
	statusNotExecutable = 126
	statusNotFound      = 127
	statusKilled        = 137
	statusExecFailed    = 255
)

// errNotExist and errNotRunning have runc's wording, by which its callers tell
// these cases from others.
var (
	errNotExist   = rpcerror.New(errdefs.ErrNotFound, "container does not exist")
	errNotRunning = rpcerror.New(errdefs.ErrFailedPrecondition, "container not running")
)

// errSupervisorGone tells why a process ended that nobody has killed.
var errSupervisorGone = errors.New("supervisor has gone, and the container's processes with it")

// exitError ends the program with a status. err may be nil: then there is
// nothing to tell, because a container's process ended with that status.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

// usageError is a command line that cannot be understood.
type usageError struct {
	command string // empty: runv itself
	msg     string
}

func (e *usageError) Error() string {
	if e.command == "" {
		return e.msg + ` (see "runv --help")`
	}
	return fmt.Sprintf(`%s: %s (see "runv %s --help")`, e.command, e.msg, e.command)
}

// usageErrorOf gives an error of the parser the shape of our errors.
func usageErrorOf(_ context.Context, cmd *urfave.Command, err error, isSubcommand bool) error {
	e := &usageError{msg: err.Error()}
	if isSubcommand {
		e.command = cmd.Name
	}
	return e
}

// exitStatus is the one place that turns errors into exit statuses.
func exitStatus(err error) int {
	var exit *exitError
	switch {
	case err == nil:
		return 0
	case programError(err) && errdefs.IsNotFound(err):
		return statusNotFound
	case programError(err) && errdefs.IsPermissionDenied(err):
		return statusNotExecutable
	case errors.As(err, &exit):
		return exit.status
	}
	return statusError
}

// programError tells whether err is about the program that a container should
// run, not about a container, a file or a permission of ours: runc's wording is
// part of the API.
func programError(err error) bool {
	return strings.Contains(err.Error(), `exec: "`)
}

// report tells the user and the caller's log about err, in one line each.
func (a *app) report(err error) {
	var exit *exitError
	if errors.As(err, &exit) && exit.err == nil {
		return
	}
	msg := oneLine(err.Error())
	if openErr := a.openLog(); openErr != nil && openErr.Error() != err.Error() {
		fmt.Fprintf(a.prog.Stderr, "runv: %s\n", oneLine(openErr.Error()))
	}
	if a.logFile != nil {
		a.log.Error(msg)
	}
	if !a.logIsStderr() {
		fmt.Fprintf(a.prog.Stderr, "runv: %s\n", msg)
	}
}

// warn tells about something that the user should know though the command
// goes on. With a log it goes there only: the standard error of create may
// already be the container's.
func (a *app) warn(format string, args ...any) {
	msg := oneLine(fmt.Sprintf(format, args...))
	if a.logFile != nil {
		a.log.Warn(msg)
		return
	}
	fmt.Fprintf(a.prog.Stderr, "runv: warning: %s\n", msg)
}

// oneLine joins the lines of s: one error is one line, also when a part of it
// came from another program.
func oneLine(s string) string {
	if !strings.ContainsAny(s, "\n\r") {
		return s
	}
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}
