package boot_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"gotest.tools/v3/assert"

	"runv/internal/guest/boot"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	assert.NilError(t, os.WriteFile(path, []byte(text), 0o644))
}

func TestScanPorts(t *testing.T) {
	dir := t.TempDir()
	assert.Equal(t, boot.ScanPorts(filepath.Join(dir, "none"), "runv.agent"), "")
	write(t, filepath.Join(dir, "vport1p1/name"), "other\n")
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "vport1p2"), 0o755)) // has no name yet
	assert.Equal(t, boot.ScanPorts(dir, "runv.agent"), "")
	write(t, filepath.Join(dir, "vport1p3/name"), "runv.agent\n")
	assert.Equal(t, boot.ScanPorts(dir, "runv.agent"), "/dev/vport1p3")
}

func TestCountList(t *testing.T) {
	for list, want := range map[string]uint32{"0": 1, "0-3": 4, "0-1,4,6-7": 5, "": 0, "x": 0, "3-1": 0} {
		assert.Equal(t, boot.CountList(list), want, list)
	}
}

func TestHotplug(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	write(t, file("memory/block_size_bytes"), "8000000\n")
	write(t, file("memory/memory0/state"), "online\n")
	write(t, file("memory/probe"), "")
	write(t, file("cpu/online"), "0\n")
	assert.NilError(t, os.MkdirAll(file("cpu/cpu0"), 0o755)) // cannot be taken out of use
	assert.NilError(t, os.MkdirAll(file("cpu/cpufreq"), 0o755))
	h := boot.NewHotplugIn(dir)
	cpus, plugged, err := h.Online(t.Context(), 1, 0)
	assert.NilError(t, err)
	assert.Equal(t, cpus, uint32(1))
	assert.Equal(t, plugged, uint64(0))

	// One is there, the others come while they are waited for.
	write(t, file("cpu/cpu1/online"), "0\n")
	write(t, file("memory/memory32/state"), "offline\n")
	go func() {
		_ = os.MkdirAll(file("memory/memory33"), 0o755)
		for name, text := range map[string]string{"memory/memory33/state": "offline\n", "cpu/online": "0-1\n"} {
			_ = os.WriteFile(file("new"), []byte(text), 0o644)
			_ = os.Rename(file("new"), file(name))
		}
	}()
	cpus, plugged, err = h.Online(t.Context(), 2, 256<<20)
	assert.NilError(t, err)
	assert.Equal(t, cpus, uint32(2))
	assert.Equal(t, plugged, uint64(256<<20))
	for name, want := range map[string]string{"cpu/cpu1/online": "1", "memory/memory32/state": "online", "memory/memory33/state": "online"} {
		data, err := os.ReadFile(file(name))
		assert.NilError(t, err)
		assert.Equal(t, string(data), want, name)
	}

	// What does not come is missing in the answer.
	assert.NilError(t, os.MkdirAll(file("cpu/cpu2/online"), 0o755)) // cannot be read
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cpus, plugged, err = h.Online(ctx, 4, 1<<40)
	assert.ErrorContains(t, err, "take cpu2 into use")
	assert.Equal(t, cpus, uint32(2))
	assert.Equal(t, plugged, uint64(256<<20))

	none := boot.NewHotplugIn(t.TempDir())
	_, _, err = none.Online(t.Context(), 0, 1)
	assert.ErrorContains(t, err, "cannot take more memory")
}

func TestNoModuleLists(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	assert.NilError(t, boot.LoadModules(none))
	late, err := boot.NewLate(none, slog.New(slog.DiscardHandler))
	assert.NilError(t, err)
	late.Run(t.Context())
	assert.NilError(t, late.Wait(t.Context(), "virtiofs"))
}

func TestMissingModule(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	write(t, list, "/nonexistent/a.ko\n\n")
	assert.ErrorContains(t, boot.LoadModules(list), "/nonexistent/a.ko")
}

// Somebody who waits for a module gets it and those before it at once; one that
// cannot be loaded holds nobody up.
func TestLateModules(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	write(t, list, "/nonexistent/fuse.ko\n/nonexistent/virtio-fs.ko\n/nonexistent/overlay.ko\n")
	late, err := boot.NewLate(list, slog.New(slog.DiscardHandler))
	assert.NilError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { late.Run(ctx) })
	assert.NilError(t, late.Wait(ctx, "virtio_fs"))
	assert.NilError(t, late.Wait(ctx, "fuse"))
	assert.NilError(t, late.Wait(ctx, "unknown"))
	cancel()
	wg.Wait()
	late, err = boot.NewLate(list, slog.New(slog.DiscardHandler))
	assert.NilError(t, err)
	assert.ErrorIs(t, late.Wait(ctx, "fuse"), context.Canceled)
}
