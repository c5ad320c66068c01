package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/bundle"
)

// processEdit is what the flags of exec change in a process.
type processEdit struct {
	args       []string
	tty        bool
	cwd        string
	env        []string // NAME=VALUE
	user       string   // UID[:GID]
	gids       []int64
	caps       []string
	noNewPrivs *bool
}

// apply changes the container's own process into the one to execute.
func (e processEdit) apply(p *specs.Process) error {
	if len(e.args) == 0 {
		return errors.New("no command given")
	}
	p.Args = e.args
	p.Terminal = e.tty
	p.CommandLine = ""
	p.ConsoleSize = nil
	if e.cwd != "" {
		p.Cwd = e.cwd
	}
	for _, entry := range e.env {
		name, _, ok := strings.Cut(entry, "=")
		if !ok || name == "" {
			return fmt.Errorf("--env=%s: must be NAME=VALUE", entry)
		}
		p.Env = slices.DeleteFunc(p.Env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		p.Env = append(p.Env, entry)
	}
	if e.user != "" {
		if err := setUser(&p.User, e.user); err != nil {
			return err
		}
	}
	for _, gid := range e.gids {
		if gid < 0 || gid > maxID {
			return fmt.Errorf("--additional-gids=%d: not a group id", gid)
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids, uint32(gid))
	}
	addCapabilities(p, e.caps)
	if e.noNewPrivs != nil {
		p.NoNewPrivileges = *e.noNewPrivs
	}
	return nil
}

// maxID is the largest user and group id; the one above means "none".
const maxID = 1<<32 - 2

func setUser(u *specs.User, s string) error {
	uid, gid, both := strings.Cut(s, ":")
	id, err := parseID(uid)
	if err != nil {
		return fmt.Errorf("--user=%s: %w", s, err)
	}
	u.UID = id
	u.Username = ""
	if both {
		if u.GID, err = parseID(gid); err != nil {
			return fmt.Errorf("--user=%s: %w", s, err)
		}
	}
	return nil
}

func parseID(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	if err != nil || id > maxID {
		return 0, errors.New("must be UID or UID:GID, in numbers")
	}
	return uint32(id), nil
}

// addCapabilities adds to all sets but the inheritable one, which would give the
// capabilities to programs that the process executes as another user, which nobody asked
// for. Where the container has inheritable ones, the new ones are ambient, as under runc.
func addCapabilities(p *specs.Process, caps []string) {
	if len(caps) == 0 {
		return
	}
	if p.Capabilities == nil {
		p.Capabilities = &specs.LinuxCapabilities{}
	}
	for _, name := range caps {
		name = strings.ToUpper(name)
		if !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		sets := []*[]string{&p.Capabilities.Bounding, &p.Capabilities.Effective, &p.Capabilities.Permitted}
		if p.Capabilities.Inheritable != nil {
			sets = append(sets, &p.Capabilities.Ambient)
		}
		for _, set := range sets {
			if !slices.Contains(*set, name) {
				*set = append(*set, name)
			}
		}
	}
}

// checkProcess validates a process as the supervisor will, before anything is started.
func (a *app) checkProcess(p *specs.Process) error {
	warnings, err := bundle.CheckProcess(p)
	for _, w := range warnings {
		a.warn("%s", w)
	}
	return err
}

// containerProcess reads the process of a container's bundle. It was validated
// when the container was created and is again, by the supervisor, before it runs.
func containerProcess(bundleDir string) (*specs.Process, error) {
	data, err := readConfig(filepath.Join(bundleDir, "config.json"))
	if err != nil {
		return nil, err
	}
	var config struct {
		Process *specs.Process `json:"process"`
	}
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("read config.json: %w", err)
	}
	if config.Process == nil {
		return &specs.Process{Cwd: "/"}, nil
	}
	return config.Process, nil
}

// processFile reads the file of --process. What the process does not say it has from the
// container's own process, as under runc.
func processFile(path string, own *specs.Process) (*specs.Process, error) {
	data, err := readConfig(path)
	if err != nil {
		return nil, fmt.Errorf("--process: %w", err)
	}
	p, err := bundle.ParseProcess(data)
	if err != nil {
		return nil, fmt.Errorf("--process=%s: %w", path, err)
	}
	inherit(&p.Capabilities, own.Capabilities)
	inherit(&p.OOMScoreAdj, own.OOMScoreAdj)
	inherit(&p.User.Umask, own.User.Umask)
	inherit(&p.Scheduler, own.Scheduler)
	inherit(&p.IOPriority, own.IOPriority)
	inherit(&p.ExecCPUAffinity, own.ExecCPUAffinity)
	if len(p.Rlimits) == 0 {
		p.Rlimits = own.Rlimits
	}
	return p, nil
}

func inherit[T any](p **T, own *T) {
	if *p == nil {
		*p = own
	}
}

func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, bundle.MaxConfig+1))
	if err == nil && len(data) > bundle.MaxConfig {
		err = fmt.Errorf("read %s: larger than %d bytes", path, bundle.MaxConfig)
	}
	return data, err
}
