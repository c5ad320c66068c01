package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/bundle"
	"runv/internal/factory"
	"runv/internal/mirror"
	"runv/internal/storage"
)

// Small read-only binds are mirrored in the guest, so that watches fire there; see internal/mirror. All binds are on the
// share as well: a mirror that is given up leads there.

// addMirrors finds out which binds of a new container can be mirrored. It gives up mirrors of others that
// the container may write to.
func (p *Pod) addMirrors(ctx context.Context, c *container, b *bundle.Bundle, m storage.Mapping) error {
	if p.cfg.Mirrors == nil {
		return nil
	}
	ids, err := p.writable(ctx, b)
	if err != nil {
		return err
	}
	if err := p.cfg.Mirrors.Writable(ctx, c.record.ID, ids); err != nil {
		return err
	}
	mirrors := make(map[int]*mirror.Mirror)
	for _, bind := range b.Binds() {
		if !bind.ReadOnly || bind.IDMap != nil || propagates(b.Spec.Mounts[bind.Index].Options) {
			continue
		}
		src, err := onHost(ctx, p.cfg.OnHost, func() (mirror.Source, error) { return openSource(bind) },
			func(src mirror.Source) { _ = src.Tree.Close() })
		if err == nil {
			src.Fallback = m.Binds[bind.Index]
			src.Lost = func(reason string) { go p.lostWatches(c, bind.Source, reason) }
			mirrors[bind.Index], err = p.cfg.Mirrors.Add(ctx, src)
		}
		if err != nil {
			delete(mirrors, bind.Index)
			p.log.Debug("bind mount comes over the share: watches do not fire", "container", c.record.ID, "source", bind.Source, "why", err)
		}
	}
	return p.do(context.WithoutCancel(ctx), func() error {
		c.mirrors = mirrors
		return nil
	})
}

// propagates tells of a bind that mounts of the host may come into later.
func propagates(options []string) bool {
	return slices.ContainsFunc(options, func(o string) bool {
		return o == "slave" || o == "rslave" || o == "shared" || o == "rshared"
	})
}

// writable are the files of the host that a container may write to. What is not there counts as none: whoever
// needs it fails.
func (p *Pod) writable(ctx context.Context, b *bundle.Bundle) ([]mirror.FileID, error) {
	var paths []string
	if !b.Spec.Root.Readonly {
		paths = append(paths, b.Rootfs)
	}
	for _, bind := range b.Binds() {
		if !bind.ReadOnly {
			paths = append(paths, bind.Source)
		}
	}
	return onHost(ctx, p.cfg.OnHost, func() (ids []mirror.FileID, err error) {
		for _, path := range paths {
			var st unix.Stat_t
			if unix.Stat(path, &st) == nil {
				ids = append(ids, mirror.FileID{Dev: st.Dev, Ino: st.Ino})
			}
		}
		return ids, nil
	}, nil)
}

// onHost returns what f gives with the file system of the host. When ctx ends first, f goes on behind the scenes, since a
// dead network file system cannot be interrupted; what it gives then is dropped.
func onHost[T any](ctx context.Context, enter func(func() error) error, f func() (T, error), drop func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.err = enter(func() (err error) {
			r.value, err = f()
			return err
		})
		done <- r
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil && drop != nil {
				drop(r.value)
			}
		}()
		var none T
		return none, context.Cause(ctx)
	}
}

// openSource opens the source of a bind. The mount is a copy, as for the share: the host's own stays free to be
// unmounted, and none that come later appear in it.
func openSource(bind bundle.Bind) (src mirror.Source, err error) {
	found, err := unix.Open(bind.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return src, fmt.Errorf("open: %w", err)
	}
	defer unix.Close(found)
	var st unix.Stat_t
	if err := unix.Fstat(found, &st); err != nil {
		return src, fmt.Errorf("stat: %w", err)
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if bind.Recursive && isDir {
		flags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(found, "", flags)
	if err != nil {
		return src, fmt.Errorf("copy mount: %w", err)
	}
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME,
		Attr_clr:    unix.MOUNT_ATTR__ATIME,
		Propagation: unix.MS_PRIVATE,
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return src, errors.Join(fmt.Errorf("set mount attributes: %w", err), unix.Close(tree))
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", found))
	if err != nil {
		path = bind.Source
	}
	src.Tree, src.Name = os.NewFile(uintptr(tree), bind.Source), filepath.Base(path)
	if src.Name == "/" {
		src.Name = "root"
	}
	for dir := path; dir != "/" && filepath.IsAbs(dir); {
		dir = filepath.Dir(dir)
		if unix.Stat(dir, &st) == nil {
			src.Above = append(src.Above, mirror.FileID{Dev: st.Dev, Ino: st.Ino})
		}
	}
	return src, nil
}

// startMirrors brings what is mirrored to the guest, and has the container use it there. What cannot be brought stays
// on the share.
func (p *Pod) startMirrors(ctx context.Context, c *container, vm *factory.VM, m storage.Mapping) {
	for i, mir := range c.mirrors {
		path, err := mir.Start(ctx, vm.Agent.Mirrors)
		if err == nil {
			m.Binds[i] = path
			continue
		}
		p.log.Info("bind mount comes over the share: watches do not fire", "container", c.record.ID, "mount", i, "why", err)
	}
}

// settleMirrors sees to mirrors that were given up while a container was made with them.
func settleMirrors(ctx context.Context, c *container) error {
	for _, mir := range c.mirrors {
		if err := mir.Created(ctx); err != nil {
			return err
		}
	}
	return nil
}

// syncMirrors lets a program that is about to start see what was changed before. A tree that changes too fast
// for that is no reason not to start it.
func (p *Pod) syncMirrors(ctx context.Context, id string) {
	any := false
	if err := p.do(ctx, func() error {
		c, err := p.find(id)
		any = err == nil && len(c.mirrors) > 0
		return err
	}); err != nil || !any {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	if err := p.cfg.Mirrors.Sync(ctx); err != nil {
		p.log.Warn("follow changes of bind mounts", "container", id, "err", err)
	}
}

// syncTimeout is how long a start waits for that.
const syncTimeout = 10 * time.Second

// leaveMirrors ends a container's use of mirrors.
func (p *Pod) leaveMirrors(c *container) {
	if p.cfg.Mirrors == nil {
		return
	}
	var mirrors map[int]*mirror.Mirror
	_ = p.do(context.Background(), func() error {
		mirrors, c.mirrors = c.mirrors, nil
		return nil
	})
	for _, mir := range mirrors {
		mir.Release()
	}
	p.cfg.Mirrors.Forget(c.record.ID)
}

// closeMirrors ends the following when the VM has ended.
func (p *Pod) closeMirrors() {
	if p.cfg.Mirrors != nil {
		p.cfg.Mirrors.Close()
	}
}

// maxLost bounds what is recorded of a container's lost watches.
const maxLost = 64

// lostWatches records that watches on a bind mount do not fire any more.
func (p *Pod) lostWatches(c *container, source, reason string) {
	p.post(func() {
		if len(c.record.LostWatches) < maxLost {
			c.record.LostWatches = append(c.record.LostWatches, source+": "+reason)
			p.saveContainer(c)
		}
	})
}
