package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/docker/go-units"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	urfave "github.com/urfave/cli/v3"

	supervisorv1 "runv/api/supervisor/v1"
)

// updateFlags are what the flags of update hold. Numbers are text, as an empty one and 0 differ.
type updateFlags struct {
	resources string
	json      bool

	blkioWeight                                              int
	cpuPeriod, cpuQuota, cpuBurst, cpuShare, cpuIdle         string
	cpuRealtimePeriod, cpuRealtimeRuntime, cpus, mems        string
	memory, memoryReservation, memorySwap, kernel, kernelTCP string
	pidsLimit                                                int
	l3CacheSchema, memBwSchema                               string
}

func (a *app) updateCommand() *urfave.Command {
	var f updateFlags
	text := func(name, usage string, to *string, aliases ...string) urfave.Flag {
		return &urfave.StringFlag{Name: name, Aliases: aliases, Usage: usage, Destination: to}
	}
	hidden := func(name string, to *string) urfave.Flag {
		return &urfave.StringFlag{Name: name, Hidden: true, Usage: "obsolete", Destination: to}
	}
	return &urfave.Command{
		Name:      "update",
		Usage:     "change the limits of a container that has not stopped",
		ArgsUsage: "<container-id>",
		Category:  groupLife,
		Description: `What is not given stays as it is. Either all is changed or nothing, and the error
tells which value could not be set. Flags are ignored when resources come from a
file: those of config.json's linux.resources, all optional.

Limits beyond the VM's size let it grow, up to the host's processors and memory; a
warning tells what it could not get. It never shrinks.

Examples:
   runv update --memory 256m --memory-swap 256m web
   runv update --cpu-quota 50000 --pids-limit 100 --json web
   echo '{"blockIO": {"weight": 500}, "unified": {"memory.high": "64M"}}' | runv update -r - web`,
		Flags: []urfave.Flag{
			&urfave.StringFlag{
				Name: "resources", Aliases: []string{"r"}, Destination: &f.resources, TakesFile: true,
				Usage: "`FILE` with resources as JSON, or - for standard input",
			},
			&urfave.IntFlag{Name: "blkio-weight", Destination: &f.blkioWeight, Usage: "`WEIGHT` of block I/O, 10 to 1000"},
			text("cpu-period", "`TIME` in µs in which the quota may be used", &f.cpuPeriod),
			text("cpu-quota", "CPU `TIME` in µs in each period, -1 for no limit", &f.cpuQuota),
			text("cpu-burst", "unused CPU `TIME` in µs that may be saved up", &f.cpuBurst),
			text("cpu-shares", "`SHARES` of CPU time against other containers, 2 to 262144", &f.cpuShare, "cpu-share"),
			text("cpu-rt-period", "refused: `TIME` of real-time scheduling", &f.cpuRealtimePeriod),
			text("cpu-rt-runtime", "refused: `TIME` of real-time scheduling", &f.cpuRealtimeRuntime),
			text("cpuset-cpus", "`LIST` of processors of the VM, such as 0-2,5", &f.cpus),
			text("cpuset-mems", "`LIST` of memory nodes of the VM", &f.mems),
			text("cpu-idle", "1 to run only when others are idle, 0 for not", &f.cpuIdle),
			hidden("kernel-memory", &f.kernel),
			hidden("kernel-memory-tcp", &f.kernelTCP),
			text("memory", "`SIZE` of memory such as 64m, -1 for no limit", &f.memory),
			text("memory-reservation", "`SIZE` of memory that is taken away last, -1 for all", &f.memoryReservation),
			text("memory-swap", "`SIZE` of memory and swap together, -1 for no limit", &f.memorySwap),
			&urfave.IntFlag{Name: "pids-limit", Destination: &f.pidsLimit, Usage: "`NUMBER` of processes and threads, -1 for no limit"},
			text("l3-cache-schema", "refused: `SCHEMA` of Intel RDT", &f.l3CacheSchema),
			text("mem-bw-schema", "refused: `SCHEMA` of Intel RDT", &f.memBwSchema),
			&urfave.BoolFlag{Name: "json", Destination: &f.json, Usage: "print the limits that are in effect then, and the VM's size"},
		},
		Action: forContainer(func(ctx context.Context, _ *urfave.Command, id string) error {
			if err := f.refuse(); err != nil {
				return err
			}
			var resp *supervisorv1.UpdateResponse
			err := a.askLive(ctx, id, errNotRunning, func(ctx context.Context, sup *supervisor) error {
				data, err := a.updateResources(&f)
				if err != nil {
					return err
				}
				resp, err = sup.containers.Update(ctx, &supervisorv1.UpdateRequest{Id: id, Resources: data})
				return err
			})
			if err != nil {
				return err
			}
			for _, w := range resp.GetWarnings() {
				a.warn("update %s: %s", id, w)
			}
			if f.json {
				return a.printUpdated(resp)
			}
			return nil
		}),
	}
}

// refuse names flags of runc's that the guest has nothing for.
func (f *updateFlags) refuse() error {
	switch {
	case f.l3CacheSchema != "":
		return errors.New("--l3-cache-schema: Intel RDT/CAT: l3 cache schema is not enabled: a VM has no Intel RDT")
	case f.memBwSchema != "":
		return errors.New("--mem-bw-schema: Intel RDT/MBA: memory bandwidth schema is not enabled: a VM has no Intel RDT")
	case f.cpuRealtimePeriod != "":
		return errors.New("--cpu-rt-period: not supported: cgroup v2, which the guest has, knows no real-time limits")
	case f.cpuRealtimeRuntime != "":
		return errors.New("--cpu-rt-runtime: not supported: cgroup v2, which the guest has, knows no real-time limits")
	}
	return nil
}

// maxResources bounds a file of resources, in bytes: what the supervisor takes.
const maxResources = 3 << 20

// updateResources is what to change, as JSON.
func (a *app) updateResources(f *updateFlags) ([]byte, error) {
	if f.resources == "" {
		r, err := f.parse()
		if err != nil {
			return nil, err
		}
		return json.Marshal(r)
	}
	in := a.prog.Stdin
	if f.resources != "-" {
		file, err := os.Open(f.resources)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		in = file
	}
	data, err := io.ReadAll(io.LimitReader(in, maxResources+1))
	if err != nil {
		return nil, fmt.Errorf("read resources: %w", err)
	}
	if len(data) > maxResources {
		return nil, fmt.Errorf("read resources: more than %d bytes", maxResources)
	}
	return data, nil
}

// parse reads the flags as runc does, with its words for errors.
func (f *updateFlags) parse() (*specs.LinuxResources, error) {
	memory, cpu := &specs.LinuxMemory{}, &specs.LinuxCPU{Cpus: f.cpus, Mems: f.mems}
	r := &specs.LinuxResources{Memory: memory, CPU: cpu}
	if f.blkioWeight != 0 {
		weight := uint16(f.blkioWeight)
		if int(weight) != f.blkioWeight {
			return nil, fmt.Errorf("invalid value for blkio-weight: %d", f.blkioWeight)
		}
		r.BlockIO = &specs.LinuxBlockIO{Weight: &weight}
	}
	if f.pidsLimit != 0 {
		r.Pids = &specs.LinuxPids{Limit: new(int64(f.pidsLimit))}
	}
	signed := func(s string) (int64, error) { return strconv.ParseInt(s, 10, 64) }
	unsigned := func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }
	return r, errors.Join(
		parseFlag("cpu-idle", f.cpuIdle, &cpu.Idle, signed),
		parseFlag("cpu-burst", f.cpuBurst, &cpu.Burst, unsigned),
		parseFlag("cpu-period", f.cpuPeriod, &cpu.Period, unsigned),
		parseFlag("cpu-share", f.cpuShare, &cpu.Shares, unsigned),
		parseFlag("cpu-quota", f.cpuQuota, &cpu.Quota, signed),
		parseFlag("memory", f.memory, &memory.Limit, parseSize),
		parseFlag("memory-swap", f.memorySwap, &memory.Swap, parseSize),
		parseFlag("kernel-memory", f.kernel, &memory.Kernel, parseSize), //nolint:staticcheck // deprecated, and warned of
		parseFlag("kernel-memory-tcp", f.kernelTCP, &memory.KernelTCP, parseSize),
		parseFlag("memory-reservation", f.memoryReservation, &memory.Reservation, parseSize),
	)
}

// parseFlag sets to when the flag was given.
func parseFlag[T any](name, value string, to **T, parse func(string) (T, error)) error {
	if value == "" {
		return nil
	}
	v, err := parse(value)
	if err != nil {
		return fmt.Errorf("invalid value for %s: %w", name, err)
	}
	*to = &v
	return nil
}

// parseSize reads a size in bytes, or with a unit of 1024, or -1.
func parseSize(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	return units.RAMInBytes(s)
}

// updated is what update --json prints.
type updated struct {
	InEffect map[string]string `json:"inEffect"` // by file of the container's cgroup
	VM       struct {
		VCPUs       uint32 `json:"vcpus"`
		MemoryBytes uint64 `json:"memoryBytes"`
	} `json:"vm"`
	Warnings []string `json:"warnings,omitempty"`
}

func (a *app) printUpdated(resp *supervisorv1.UpdateResponse) error {
	u := updated{InEffect: resp.GetInEffect(), Warnings: resp.GetWarnings()}
	u.VM.VCPUs, u.VM.MemoryBytes = resp.GetVcpus(), resp.GetMemoryBytes()
	out := json.NewEncoder(a.prog.Stdout)
	out.SetIndent("", "  ")
	return out.Encode(u)
}
