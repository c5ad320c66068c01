// Package factory is where a pod's VM comes from. Direct boots one; a template
// that is cloned and a pool that holds VMs ready are to stand behind the same
// interface, so a pod never knows which it got.
//
// A factory gives a VM whose agent has answered, and leaves nothing behind when it
// cannot. It knows no pods and no containers.
package factory

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"runv/internal/agentclient"
	"runv/internal/hypervisor"
)

// consoleLines is how many of the guest's last words go into an error.
const consoleLines = 8

// VM is a running virtual machine with its agent. Whoever got it sees to it
// that both are closed: the client's Close, then the VM's Stop or Kill.
type VM struct {
	hypervisor.VM
	Agent  *agentclient.Client
	Phases []Phase // of its making, in order
}

// Phase is a step of a start and the time it took.
type Phase struct {
	Name     string
	Duration time.Duration
}

// Direct boots a VM for each Get.
type Direct struct {
	Driver      hypervisor.Driver
	BootTimeout time.Duration // from the VMM's start to the agent's answer
}

// Get starts a VM and returns when its agent has answered. ctx and BootTimeout
// bound it. Its error says what the guest's console said last. started is called
// before, once the VMM can be controlled, and must not block.
func (d Direct) Get(ctx context.Context, cfg hypervisor.Config, started func(hypervisor.VM)) (*VM, error) {
	began := time.Now()
	vm, err := d.Driver.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	started(vm)
	running := time.Now()
	agent, err := d.connect(ctx, vm)
	if err != nil {
		_ = vm.Kill()
		<-vm.Done()
		return nil, fmt.Errorf("start VM %s: %w", cfg.ID, err)
	}
	return &VM{VM: vm, Agent: agent, Phases: []Phase{
		{Name: "vmm", Duration: running.Sub(began)},
		{Name: "boot", Duration: time.Since(running)},
	}}, nil
}

var errBootTimeout = errors.New("boot timeout")

func (d Direct) connect(ctx context.Context, vm hypervisor.VM) (*agentclient.Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.BootTimeout, errBootTimeout)
	defer cancel()
	agent, err := agentclient.Connect(ctx, vm.Agent())
	if err == nil {
		return agent, nil
	}
	switch {
	case errors.Is(err, errBootTimeout):
		err = fmt.Errorf("agent did not answer in %s", d.BootTimeout)
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	default:
		// The channel breaks when the VMM dies; what that said is the cause.
		select {
		case <-vm.Done():
			if exit := vm.Err(); exit != nil {
				return nil, exit
			}
			err = errors.New("the guest powered itself off during boot")
		case <-time.After(time.Second):
		}
	}
	return nil, WithConsole(err, vm)
}

// WithConsole adds the guest's last words to err.
func WithConsole(err error, vm hypervisor.VM) error {
	tail := vm.Console().Tail(consoleLines)
	if len(tail) == 0 {
		return fmt.Errorf("%w; console: (empty)", err)
	}
	return fmt.Errorf("%w; console: %s", err, strings.Join(tail, " | "))
}
