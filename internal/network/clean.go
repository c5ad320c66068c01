package network

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

// Record is what is on disk of a mirror, for Clean.
type Record struct {
	Path      string `json:"path"` // of the namespace
	Namespace ID     `json:"namespace"`
	// Links are the indices of the interfaces that are, or were, mirrored.
	Links []int `json:"links,omitempty"`
	// Shared are those of them with an ingress qdisc of somebody else's.
	Shared []int `json:"shared,omitempty"`
	// PortRange is the range of local ports that the namespace had, if there are ports of its own.
	PortRange string `json:"portRange,omitempty"`
}

// maxRecord bounds what a record may name.
const maxRecord = 1 << 16

// save adds interfaces to the record before they are touched.
func (m *Mirror) save(links []netlink.Link) error {
	r := Record{Path: m.record.Path, Namespace: m.record.Namespace, PortRange: m.record.PortRange}
	if m.hostPorts && r.PortRange == "" && len(links) > 0 {
		if err := m.cfg.Namespace.Do(func() error {
			r.PortRange = readSysctls([]string{portRange})[portRange]
			return nil
		}); err != nil {
			return err
		}
		if r.PortRange == hostPortRange { // of a mirror that was killed
			r.PortRange = m.sysctls.defaults[portRange]
		}
	}
	for _, l := range links {
		r.Links = append(r.Links, l.Attrs().Index)
	}
	for _, p := range m.leaving {
		r.Links = append(r.Links, p.index)
	}
	slices.Sort(r.Links)
	r.Links = slices.Compact(r.Links)
	known := func(index int) bool { return slices.Contains(m.record.Links, index) }
	for _, index := range r.Links {
		if !known(index) {
			have, err := m.kernel.hasIngress(index)
			if err != nil {
				return err
			}
			if have {
				r.Shared = append(r.Shared, index)
			}
		} else if slices.Contains(m.record.Shared, index) {
			r.Shared = append(r.Shared, index)
		}
	}
	if r.PortRange == m.record.PortRange && !slices.ContainsFunc(r.Links, func(index int) bool { return !known(index) }) {
		return nil // what there is more in the old one does no harm
	}
	if err := m.cfg.Save(r); err != nil {
		return err
	}
	m.record = r
	return nil
}

// hasIngress tells whether there is an ingress qdisc that a mirror has not made. One with our filters alone
// is one whose mirror was killed.
func (k *kernel) hasIngress(index int) (bool, error) {
	qdiscs, err := dump(func() ([]netlink.Qdisc, error) {
		return k.QdiscList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}})
	})
	if err != nil {
		return false, fmt.Errorf("list qdiscs: %w", err)
	}
	if !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Attrs().Parent == netlink.HANDLE_INGRESS }) {
		return false, nil
	}
	all, err := k.filters(index)
	return len(all) == 0 || !slices.ContainsFunc(all, ours) || slices.ContainsFunc(all, func(f netlink.Filter) bool { return !ours(f) }), err
}

// Clean removes what a mirror has left in its namespace whose process was killed. If the record's path is not that
// namespace any more there is nothing to do. The VMM must have ended, with which its taps went; those that it did
// not let go of are removed. Idempotent.
func Clean(r Record) error {
	if r.Path == "" {
		return nil
	}
	if !filepath.IsAbs(r.Path) || len(r.Links) > maxRecord || len(r.Shared) > maxRecord {
		return kindOf(errdefs.ErrInvalidArgument, errors.New("network: clean: not a record"))
	}
	ns, err := Open(r.Path)
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("network: clean: %w", err)
	}
	defer ns.Close()
	if ns.ID() != r.Namespace {
		return nil
	}
	if r.PortRange != "" {
		if err := unreserve(ns, r.PortRange); err != nil {
			return fmt.Errorf("network: clean: %w", err)
		}
	}
	k, err := dial(ns)
	if err != nil {
		return fmt.Errorf("network: clean: %w", err)
	}
	defer k.close()
	links, err := dump(k.LinkList)
	if err != nil {
		return fmt.Errorf("network: clean: list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		index := l.Attrs().Index
		if isTap(l) {
			if err := k.LinkDel(l); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("network: clean: remove tap %s: %w", l.Attrs().Name, err))
			}
		}
		if !slices.Contains(r.Links, index) {
			continue
		}
		if err := k.release(index, !slices.Contains(r.Shared, index)); err != nil {
			errs = append(errs, fmt.Errorf("network: clean: %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}
