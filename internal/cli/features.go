package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	urfave "github.com/urfave/cli/v3"

	"runv/internal/bundle"
	"runv/internal/bundle/seccomp"
	"runv/internal/hypervisor/qemu"
)

func (a *app) featuresCommand() *urfave.Command {
	return &urfave.Command{
		Name:     "features",
		Usage:    "print what runv supports as JSON, in the form of the OCI runtime-spec",
		Category: groupSetup,
		Description: `The annotations dev.runv.* tell the version, the hypervisor, and what would
execute a guest's instructions on this machine now: kvm, or tcg, which QEMU's
developers do not treat as a security boundary.

Example:
   runv features | jq .annotations`,
		Action: func(_ context.Context, cmd *urfave.Command) error {
			if err := exactArgs(cmd, 0); err != nil {
				return err
			}
			f := supported()
			f.Annotations = a.featureAnnotations()
			data, err := json.MarshalIndent(f, "", "    ")
			if err != nil {
				return fmt.Errorf("features: %w", err)
			}
			_, err = fmt.Fprintf(a.prog.Stdout, "%s\n", data)
			return err
		},
	}
}

// supported is what the table of the bundle's fields says, in the words of the
// runtime-spec.
func supported() *features.Features {
	honoured := func(path string) bool {
		return slices.ContainsFunc(bundle.Fields(), func(f bundle.Field) bool {
			return f.Path == path && f.Support == bundle.Honoured
		})
	}
	f := &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: specs.Version,
		MountOptions:  bundle.MountOptions(),
		Linux: &features.Linux{
			Capabilities: bundle.Capabilities(),
			// Of the host, where the VM is bounded. The guest, where the container is, has v2.
			Cgroup: &features.Cgroup{V1: new(true), V2: new(true), Systemd: new(true), SystemdUser: new(false), Rdma: new(honoured("linux.resources.rdma"))},
			Seccomp: &features.Seccomp{
				Enabled:        new(honoured("linux.seccomp.syscalls")),
				Actions:        seccomp.Actions(),
				Operators:      seccomp.Operators(),
				Archs:          seccomp.Archs(),
				KnownFlags:     seccomp.Flags(),
				SupportedFlags: seccomp.Flags(),
			},
			Apparmor: &features.Apparmor{Enabled: new(honoured("process.apparmorProfile"))},
			Selinux:  &features.Selinux{Enabled: new(honoured("process.selinuxLabel"))},
			IntelRdt: &features.IntelRdt{Enabled: new(honoured("linux.intelRdt"))},
			MemoryPolicy: &features.MemoryPolicy{
				Modes: bundle.MemoryPolicyModes(),
				Flags: bundle.MemoryPolicyFlags(),
			},
			NetDevices: &features.NetDevices{Enabled: new(honoured("linux.netDevices"))},
			MountExtensions: &features.MountExtensions{
				IDMap: &features.IDMap{Enabled: new(honoured("mounts[].uidMappings"))},
			},
		},
	}
	for _, ns := range bundle.Namespaces() {
		f.Linux.Namespaces = append(f.Linux.Namespaces, string(ns))
	}
	slices.Sort(f.Linux.Namespaces)
	for _, field := range bundle.Fields() {
		if hook, ok := strings.CutPrefix(field.Path, "hooks."); ok && field.Support == bundle.Honoured {
			f.Hooks = append(f.Hooks, hook)
		}
	}
	return f
}

func (a *app) featureAnnotations() map[string]string {
	annotations := map[string]string{
		"dev.runv.version":    a.version(),
		"dev.runv.commit":     a.commit(),
		"dev.runv.hypervisor": "qemu",
	}
	cfg, err := a.loadConfig()
	if err != nil {
		a.warn("accelerator is not known: %v", err)
		return annotations
	}
	accel, note, err := qemu.ThisHost().ProbeAccel(cfg.Accel)
	if err != nil {
		a.warn("accelerator is not known: %v", err)
		return annotations
	}
	annotations["dev.runv.accel"] = string(accel)
	if note != "" {
		annotations["dev.runv.accel-note"] = note
	}
	return annotations
}
