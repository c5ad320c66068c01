package pod

import (
	"context"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/internal/bundle"
	"runv/internal/join"
	"runv/internal/state"
)

// findShared tells what a new container shares with others of the pod. The command line has found the
// pod in the same way; what it has seen of others may have gone since.
func (p *Pod) findShared(ctx context.Context, id string, b *bundle.Bundle) (join.Plan, error) {
	var records []state.Container
	if err := p.do(ctx, func() error {
		for _, c := range p.containers {
			if c.record.ID != id {
				records = append(records, c.record)
			}
		}
		return nil
	}); err != nil {
		return join.Plan{}, err
	}
	return join.Find(b.Spec, records, join.Look)
}

// shares turns a plan into the words of the agent's API. The network is not in it: that is told by the
// stand-in's; see joinNetwork. On the pod's goroutine.
func (p *Pod) shares(plan join.Plan) (map[specs.LinuxNamespaceType]string, error) {
	namespaces := make(map[specs.LinuxNamespaceType]string)
	for kind, id := range plan.Containers {
		if kind == specs.NetworkNamespace {
			continue
		}
		c, err := p.find(id)
		if err != nil {
			return nil, fmt.Errorf("%s namespace of container %s: %w", kind, id, err)
		}
		if err := admit(verbJoin, id, c.record.Status); err != nil {
			return nil, err
		}
		namespaces[kind] = "container:" + id
	}
	return namespaces, nil
}
