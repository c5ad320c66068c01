package cli

import (
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"runv/internal/bundle"
	"runv/internal/state"
)

// writableTrees lists what a container can write to by its bind mounts, in their order, and which mount each is of. What
// cannot be looked at is left out: the mount itself will tell why.
func writableTrees(b *bundle.Bundle) (trees []state.Tree, mounts []int) {
	for _, bind := range b.Binds() {
		if bind.ReadOnly {
			continue
		}
		path, err := filepath.EvalSymlinks(bind.Source)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			continue
		}
		trees = append(trees, state.Tree{Path: path, Dev: st.Dev, Ino: st.Ino})
		mounts = append(mounts, bind.Index)
	}
	return trees, mounts
}

// overlaps tells of each bind mount whose files a container in another VM can write to as well.
func overlaps(store *state.Store, podID string, trees []state.Tree, mounts []int) []string {
	if len(trees) == 0 {
		return nil
	}
	others, err := store.Containers()
	if err != nil {
		return nil // who needs the list will tell of the error
	}
	var warnings []string
	for i, tree := range trees {
		if other := writer(store, others, podID, tree); other != "" {
			warnings = append(warnings, fmt.Sprintf(
				"mounts[%d]: container %s writes to %s as well, from another VM: files and locks are shared, memory is not (mmap with MAP_SHARED, SQLite's WAL mode)",
				mounts[i], other, tree.Path))
		}
	}
	return warnings
}

// writer finds a container of another pod that can write to the files of a tree.
func writer(store *state.Store, containers []state.Container, podID string, tree state.Tree) string {
	for _, c := range containers {
		if c.PodID == podID || store.Live(c) == state.Stopped {
			continue
		}
		if slices.ContainsFunc(c.Writable, tree.Overlaps) {
			return c.ID
		}
	}
	return ""
}
