package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Repository is what the Debian source needs of the host's package tools.
type Repository interface {
	// Show returns the control fields of the version of a package that would be installed.
	Show(ctx context.Context, pkg string) (map[string]string, error)
	// Update fetches the lists of packages anew.
	Update(ctx context.Context) error
	// Download puts the file of pkg=version into dir.
	Download(ctx context.Context, pkg, version, dir string) error
	// Unpack extracts the files of a package file into dir.
	Unpack(ctx context.Context, file, dir string) error
}

// A debianPackage is a version of a package with its file's digest.
type debianPackage struct {
	name, version, sha256 string
}

// resolve finds the package that holds the kernel: pkg itself, or the versioned one that it depends
// on.
func resolve(ctx context.Context, repo Repository, pkg string) (debianPackage, error) {
	fields, err := repo.Show(ctx, pkg)
	if err != nil {
		return debianPackage{}, err
	}
	if real := kernelDependency(fields["Depends"]); real != "" {
		if fields, err = repo.Show(ctx, real); err != nil {
			return debianPackage{}, err
		}
		pkg = real
	}
	p := debianPackage{name: pkg, version: fields["Version"], sha256: fields["SHA256"]}
	if p.version == "" || p.sha256 == "" {
		return debianPackage{}, fmt.Errorf("find package %s: its description has no version or digest", pkg)
	}
	return p, nil
}

// kernelDependency returns the kernel package in a Depends field, if any.
func kernelDependency(depends string) string {
	for dep := range strings.SplitSeq(depends, ",") {
		if name, _, _ := strings.Cut(strings.TrimSpace(dep), " "); strings.HasPrefix(name, "linux-image-") {
			return name
		}
	}
	return ""
}

// fetch returns the package's file in the cache, downloaded if it is not there.
func fetch(ctx context.Context, repo Repository, p debianPackage, cache string) (string, error) {
	path := filepath.Join(cache, p.sha256+".deb")
	if digest, err := fileDigest(path); err == nil && digest == p.sha256 {
		return path, nil
	}
	tmp, err := os.MkdirTemp(cache, ".tmp-")
	if err != nil {
		return "", fmt.Errorf("download package: %w", err)
	}
	defer os.RemoveAll(tmp)
	if err := repo.Download(ctx, p.name, p.version, tmp); err != nil {
		return "", err
	}
	// apt names the file, with an epoch's colon escaped; it is the only one here.
	files, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("download package %s: %d files arrived (%v)", p.name, len(files), err)
	}
	digest, err := fileDigest(files[0])
	if err != nil {
		return "", fmt.Errorf("download package %s: %w", p.name, err)
	}
	if digest != p.sha256 {
		return "", fmt.Errorf("download package %s: the file's sha256 is %s, announced was %s", p.name, digest, p.sha256)
	}
	if err := os.Rename(files[0], path); err != nil {
		return "", fmt.Errorf("download package %s: %w", p.name, err)
	}
	return path, nil
}

func fileDigest(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

// debianTree gets the package and unpacks it into dir.
func debianTree(ctx context.Context, repo Repository, pkg, cache, dir string, log *slog.Logger) (debianPackage, error) {
	get := func() (debianPackage, string, error) {
		p, err := resolve(ctx, repo, pkg)
		if err != nil {
			return p, "", err
		}
		log.Info("get kernel package", "package", p.name, "version", p.version)
		file, err := fetch(ctx, repo, p, cache)
		return p, file, err
	}
	p, file, err := get()
	if err != nil {
		// On a fresh machine there are no lists, on an old one they name files that the mirror no
		// longer has.
		log.Info("update the lists of packages", "because", err)
		if updateErr := repo.Update(ctx); updateErr != nil {
			return p, errors.Join(err, updateErr)
		}
		if p, file, err = get(); err != nil {
			return p, err
		}
	}
	return p, repo.Unpack(ctx, file, dir)
}

// Apt is the Repository of a Debian host.
type Apt struct{}

// Show implements Repository.
func (Apt) Show(ctx context.Context, pkg string) (map[string]string, error) {
	out, err := run(ctx, "", "apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return nil, fmt.Errorf("find package %s: %w", pkg, err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(out)) {
		// A line that begins with a space continues a field; none of those is of use here.
		if key, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			fields[key] = strings.TrimSpace(value)
		}
	}
	return fields, nil
}

// Update implements Repository.
func (Apt) Update(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("update the lists of packages: not root: run apt-get update as root, then try again")
	}
	if _, err := run(ctx, "", "apt-get", "-qq", "update"); err != nil {
		return fmt.Errorf("update the lists of packages: %w", err)
	}
	return nil
}

// Download implements Repository. apt-get checks the file against the lists and those against
// Debian's keys.
func (Apt) Download(ctx context.Context, pkg, version, dir string) error {
	// The user _apt, as whom root downloads otherwise, cannot write here, and apt-get would warn
	// about that.
	if _, err := run(ctx, dir, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", pkg+"="+version); err != nil {
		return fmt.Errorf("download package %s: %w", pkg, err)
	}
	return nil
}

// Unpack implements Repository.
func (Apt) Unpack(ctx context.Context, file, dir string) error {
	if _, err := run(ctx, "", "dpkg-deb", "-x", file, dir); err != nil {
		return fmt.Errorf("unpack package %s: %w", filepath.Base(file), err)
	}
	return nil
}

// run runs a program in dir and returns its output. The error ends in the last line that the
// program wrote to stderr.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("%w: this kernel's description needs Debian's package tools", err)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if err := cmd.Run(); err != nil {
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		return nil, fmt.Errorf("%s: %w: %s", name, err, lines[len(lines)-1])
	}
	return stdout.Bytes(), nil
}
