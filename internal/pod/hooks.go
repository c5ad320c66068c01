package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/hook"
	"runv/internal/state"
)

// runHooks runs hooks of a container on the host, until ctx ends; those without an environment get this one. The VM's boot
// goes on meanwhile.
func (p *Pod) runHooks(ctx context.Context, phase hook.Phase, hooks []specs.Hook, record state.Container, env []string, status specs.ContainerState) error {
	if len(hooks) == 0 {
		return nil
	}
	data, err := hookState(record, status, record.StandIn.PID)
	if err != nil {
		return err
	}
	return p.cfg.OnHost(func() error {
		return hook.Run(ctx, phase, hooks, hook.Surroundings{Dir: record.Bundle, State: data, Env: env})
	})
}

// hookState is the OCI state that hooks get.
func hookState(record state.Container, status specs.ContainerState, pid int) ([]byte, error) {
	return json.Marshal(specs.State{
		Version: specs.Version, ID: record.ID, Status: status, Pid: pid, Bundle: record.Bundle, Annotations: record.Annotations,
	})
}

// runCreateHooks runs the hooks on the host that a container's creation has.
func (p *Pod) runCreateHooks(ctx context.Context, record state.Container, env []string) error {
	//nolint:staticcheck // prestart is deprecated, and used
	if err := p.runHooks(ctx, hook.Prestart, record.Hooks.Prestart, record, env, specs.StateCreating); err != nil {
		return err
	}
	return p.runHooks(ctx, hook.CreateRuntime, record.Hooks.CreateRuntime, record, env, specs.StateCreating)
}

// poststart is the run of a container's poststart hooks.
type poststart struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when the hooks have ended
}

// runPoststart runs the poststart hooks of a container that has been started, as run says. A
// failure stops the container, as the runtime-spec demands. The hooks go on when the caller goes;
// the container's removal ends them.
func (p *Pod) runPoststart(ctx context.Context, c *container, run *poststart, record state.Container, env []string) error {
	err := p.runHooks(ctx, hook.Poststart, record.Hooks.Poststart, record, env, specs.StateRunning)
	if err != nil {
		err = errors.Join(err, p.kill(context.WithoutCancel(ctx), c))
	}
	close(run.done)
	p.post(func() { p.pending-- })
	return err
}

// endPoststart ends the poststart hooks of a container and waits until they have.
func (p *Pod) endPoststart(ctx context.Context, c *container) error {
	var run *poststart
	if err := p.do(ctx, func() error { run = c.poststart; return nil }); err != nil || run == nil {
		return err
	}
	run.cancel(errDeleted)
	select {
	case <-run.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// endHooks ends poststart hooks that still run, for a pod that is to end. On the pod's goroutine.
func (p *Pod) endHooks() {
	for _, c := range p.containers {
		if c.poststart != nil {
			c.poststart.cancel(errStopping)
		}
	}
}

// poststop runs the poststop hooks of a container whose record this process has removed: who does
// that runs them, so that they run once whoever deletes a container. Failures are logged, and the
// other hooks run. The caller that asked for the end may have gone; each hook has a timeout.
func (p *Pod) poststop(record state.Container, env []string) {
	data, err := hookState(record, specs.StateStopped, 0)
	if err == nil {
		err = p.cfg.OnHost(func() error {
			return hook.RunAll(context.Background(), hook.Poststop, record.Hooks.Poststop, hook.Surroundings{Dir: record.Bundle, State: data, Env: env})
		})
	}
	if err != nil {
		p.log.Warn("poststop", "container", record.ID, "err", err)
	}
}

// forget removes a container's record, which was pending, and runs the poststop hooks. On the pod's
// goroutine.
func (p *Pod) forget(c *container) {
	var record state.Container
	env := c.environ
	if p.containers[c.record.ID] == c {
		delete(p.containers, c.record.ID)
		p.dropPhases(c.record.ID)
		taken, err := p.cfg.Recorder.RemoveContainer(c.record.ID)
		if err != nil && !errdefs.IsNotFound(err) {
			p.log.Error("remove container's record", "container", c.record.ID, "err", err)
		}
		if taken != nil {
			record = c.record
		}
		p.lowerLimits()
	}
	forgotten := func() {
		p.pending--
		p.endOp(c)
		close(c.forgotten)
	}
	if len(record.Hooks.Poststop) == 0 {
		forgotten()
		return
	}
	go func() {
		p.poststop(record, env)
		p.post(forgotten)
	}()
}

// awaitForgotten waits until nothing is left of a container, and its poststop hooks have run.
func (c *container) awaitForgotten(ctx context.Context) error {
	select {
	case <-c.forgotten:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for poststop hooks: %w", context.Cause(ctx))
	}
}
