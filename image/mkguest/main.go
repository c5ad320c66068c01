// Command mkguest builds the guest's files: vmlinux, initrd.cpio and guest.json. The Makefile runs
// it after it built the agent; it is done at once when nothing changed. It parses flags and calls
// package image, no more.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"runv/image"
	"runv/image/kernel"
)

// timeout bounds a build, which may have to download a kernel.
const timeout = 20 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mkguest:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cfg := image.Config{Repository: kernel.Apt{}, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: brief}))}
	flags := flag.NewFlagSet("mkguest", flag.ContinueOnError)
	flags.StringVar(&cfg.Kernel, "kernel", "image/kernels/debian-cloud.toml", "the kernel's description")
	flags.StringVar(&cfg.Agent, "agent", "build/runv-agent", "the agent's static binary")
	flags.StringVar(&cfg.Init, "init", "build/runv-init", "the static program that sets up the processes of containers")
	flags.StringVar(&cfg.AgentVersion, "agent-version", "", "the agent's version, for the guest's description")
	flags.StringVar(&cfg.Out, "out", "build/guest", "the directory for the guest's files")
	flags.StringVar(&cfg.Cache, "cache", "build/kernel", "the directory that keeps downloads and kernels")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	var err error
	if cfg.Builder, err = self(); err != nil {
		return err
	}
	guest, built, err := image.Build(ctx, cfg)
	if err != nil {
		return err
	}
	if built {
		fmt.Printf("%s: kernel %s, %d modules, %.1f MB initramfs\n", filepath.Clean(cfg.Out), guest.Kernel.Release,
			len(guest.Kernel.EarlyModules)+len(guest.Kernel.LateModules)+len(guest.Kernel.DemandModules), float64(guest.Initrd.Size)/1e6)
	}
	return nil
}

// brief leaves out time and level: this is a build's output.
func brief(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
		return slog.Attr{}
	}
	return a
}

// self returns the digest of this program, so that a change to the builder makes it build anew.
func self() (string, error) {
	path, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read this program: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}
