package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// version is the program's version: what the build says, else what the Go
// toolchain recorded.
func (a *app) version() string {
	if a.prog.Version != "" {
		return a.prog.Version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return strings.TrimPrefix(info.Main.Version, "v")
	}
	return "unknown"
}

// commit is the revision that the program was built from, or the version, which
// names it, too, when the toolchain did not record it.
func (a *app) commit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return a.version()
	}
	revision, modified := a.version(), ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = "-dirty"
		}
	}
	return revision + modified
}

// versionText has the lines of runc's: callers cut it at "version" and "spec:".
func (a *app) versionText() string {
	return fmt.Sprintf("runv version %s\ncommit: %s\nspec: %s\ngo: %s\n",
		a.version(), a.commit(), specs.Version, runtime.Version())
}
