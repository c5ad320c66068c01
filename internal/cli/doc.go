// Package cli is runv's command line. It turns arguments into calls of the
// supervisor's API and of the state directory, and answers into the output and
// the exit statuses that runc's callers expect.
//
// It is called by cmd/runv only. Each subcommand has a file of its own. The
// package owns no container: what must outlive a command lives in the
// supervisor process and in the state directory. What create acquires before the
// supervisor has taken over, it releases when it fails.
//
// Arguments are parsed by urfave/cli v3, which accepts `-root` as well as
// `--root`, finds flags after the container's name, and stops at the
// container's command where StopOnNthArg says so. Three things of it are
// deliberately off: the splitting of repeated flags at commas (an environment
// variable may contain one), its shell completion (it would swallow an
// argument of a container's command), and the "help" subcommand below each
// command (a container may be named help).
package cli
