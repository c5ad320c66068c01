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
