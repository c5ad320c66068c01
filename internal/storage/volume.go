package storage

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"

	"golang.org/x/sys/unix"

	"runv/internal/sharefs"
)

// A volume is what is mounted for a bind. Binds of the same source are one volume, whichever
// containers they are of: the server tells files apart by the mounts that lead to them, so the guest
// would otherwise have two files of each, with a cache and locks of its own, and what one container
// writes the other would see late, or in memory that both have mapped never.
type volume struct {
	added
	key      volumeKey
	readOnly bool
	coherent bool
	// writableBelow says that it is read-only and what is mounted below it is not.
	writableBelow bool
	at            string // path below the share
	users         int    // binds; under Share.volumesMu
}

// volumeKey tells sources apart. Its first two alone do, as long as the volume is there; the mount decides
// what is mounted below the source.
type volumeKey struct {
	dev, ino  uint64
	mount     uint64 // 0 if the kernel does not tell
	recursive bool
}

// use finds or makes the volume of a bind. Each call is undone by leave. One that can be written to is
// used for a read-only bind, too: the guest can write there anyway, and makes the bind itself read-only.
func (s *Share) use(ctx context.Context, b Bind) (_ *volume, err error) {
	opts := treeOptions{recursive: b.Recursive, readOnly: b.ReadOnly, readOnlyBelow: b.ReadOnlyBelow, ids: b.IDMap}
	t, err := s.open(ctx, b.Source, opts)
	if err != nil {
		return nil, err
	}
	writableBelow := b.ReadOnly && !b.ReadOnlyBelow && t.below
	s.volumesMu.Lock()
	defer s.volumesMu.Unlock()
	if v := s.find(t.key, b); v != nil && !writableBelow {
		t.close()
		v.users++
		return v, nil
	}
	s.lastVolume++
	v := &volume{key: t.key, readOnly: b.ReadOnly, coherent: b.coherent() || writableBelow, writableBelow: writableBelow, users: 1}
	if b.IDMap != nil || writableBelow {
		v.key = volumeKey{} // nobody else's
	}
	dir := sharefs.BindPrefix + strconv.Itoa(s.lastVolume)
	if v.coherent {
		dir += sharefs.CoherentSuffix
	}
	v.at = path.Join(dir, nameOf(b.Source))
	if err = s.makePoint(&v.added, dir, true); err == nil {
		err = s.attach(&v.added, v.at, b.Source, t)
	} else {
		t.close()
	}
	if err != nil {
		return nil, errors.Join(err, s.removePoints(&v.added))
	}
	s.volumes[v] = struct{}{}
	return v, nil
}

// coherent tells whether the guest must see at once what others change. Who can only read sees it within a second: programs
// that read each other's files in turn, with locks, write as well.
func (b *Bind) coherent() bool { return !b.ReadOnly && !b.Exclusive }

// find returns the volume for a bind, if there is one. s.volumesMu is held.
func (s *Share) find(key volumeKey, b Bind) (found *volume) {
	if b.IDMap != nil {
		return nil
	}
	for v := range s.volumes {
		if v.key == key && (b.ReadOnly || !v.readOnly) && (v.coherent || !b.coherent()) && (found == nil || !v.readOnly) {
			found = v
		}
	}
	return found
}

// leave undoes use; after an error it can be called again.
func (s *Share) leave(v *volume) error {
	s.volumesMu.Lock()
	defer s.volumesMu.Unlock()
	if v.users > 1 {
		v.users--
		return nil
	}
	delete(s.volumes, v) // nobody comes to one that is half gone
	return s.withdraw(path.Dir(v.at), &v.added)
}

// keyOf tells sources apart.
func keyOf(fd int, st *unix.Stat_t, recursive bool) (volumeKey, error) {
	k := volumeKey{dev: st.Dev, ino: st.Ino, recursive: recursive}
	var stx unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stx); err != nil {
		return k, fmt.Errorf("ask for its mount: %w", err)
	}
	if stx.Mask&unix.STATX_MNT_ID != 0 {
		k.mount = stx.Mnt_id
	}
	return k, nil
}
