package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"runv/internal/hostcgroup"
	"runv/internal/network"
	"runv/internal/unixsock"
)

// Purge removes a container by force and from disk alone: it kills the
// container's stand-in and removes its cgroup and its directory, and when no other container
// names its pod it kills the pod's supervisor and VM, removes the pod's cgroup and what mirrors
// its network namespaces, unmounts what is mounted below the pod's directory and removes that, too.
//
// It works with damaged and missing state files, succeeds when there is
// nothing to remove, and may run concurrently with itself and anything else.
// It kills only processes that a pid with its start time identifies, or that
// the kernel names as the listener of the supervisor's socket, and never the
// calling process. It waits for their end until ctx is done, at most ten
// seconds each. After an error call it again: a record stays as long as
// something it names may live. taken is as RemoveContainer's, and may be set beside an error.
func (s *Store) Purge(ctx context.Context, id string) (taken *Container, err error) {
	if !validName(id) {
		return nil, invalidID("container", id)
	}
	if _, err := os.Lstat(s.root); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	pod := s.podOf(id)
	if c, _ := loose[Container](filepath.Join(s.ContainerDir(id), containerFile)); c.ID == id {
		if err := killOther(ctx, c.StandIn); err != nil {
			return taken, fmt.Errorf("purge container %s: stand-in: %w", id, err)
		}
		if err := removeCgroup(ctx, c.Cgroup); err != nil {
			return taken, fmt.Errorf("purge container %s: %w", id, err)
		}
	}
	var shared bool
	if err := s.locked(func() error { shared = s.shared(pod, id); return nil }); err != nil {
		return taken, fmt.Errorf("purge container %s: %w", id, err)
	}
	if !shared {
		if err := endPod(ctx, s.PodDir(pod)); err != nil {
			return taken, fmt.Errorf("purge container %s: %w", id, err)
		}
	}
	// Look again: the last two containers of a pod may be purged at once, and
	// then whoever removes the last record must kill the pod.
	var gone []string
	err = s.locked(func() error {
		alone := !s.shared(pod, id)
		if dir, err := s.discard(s.ContainerDir(id)); err != nil {
			return err
		} else if dir != "" {
			gone = append(gone, dir)
			taken = recordIn(dir, id)
		}
		if !alone {
			return nil
		}
		dir, err := s.discard(s.PodDir(pod))
		if dir != "" {
			gone = append(gone, dir)
		}
		return err
	})
	errs := []error{err}
	for _, dir := range gone {
		errs = append(errs, destroy(ctx, dir))
	}
	if err := errors.Join(errs...); err != nil {
		return taken, fmt.Errorf("purge container %s: %w", id, err)
	}
	return taken, nil
}

// SweepPods removes pods that are of no use to anybody: their supervisor and
// creator are dead and no container names them. It finishes removals that were
// interrupted, too. Whoever starts a pod calls it first. What cannot be removed
// is told in the error and does not keep the rest from being removed.
func (s *Store) SweepPods(ctx context.Context) error {
	if _, err := os.Lstat(s.root); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var left []string
	var errs []error
	err := s.locked(func() error {
		ids, err := entries(filepath.Join(s.root, podsDir))
		if err != nil {
			return err
		}
		for _, id := range ids {
			if s.podAlive(id) || len(s.containersOf(id)) > 0 {
				continue
			}
			if _, err := s.discard(s.PodDir(id)); err != nil {
				errs = append(errs, err)
			}
		}
		// Under the lock, whatever is in tmp is on its way out, or its maker crashed.
		left, err = entries(filepath.Join(s.root, tmpDir))
		return err
	})
	if err != nil {
		return fmt.Errorf("sweep pods: %w", err)
	}
	for _, name := range left {
		errs = append(errs, destroy(ctx, filepath.Join(s.root, tmpDir, name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep pods: %w", err)
	}
	return nil
}

// remove takes a directory away if guard allows it and deletes it, killing nothing. taken gets its
// new path before.
func (s *Store) remove(kind, id, dir string, guard func() error, taken func(dir string)) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var gone string
	err := s.locked(func() (err error) {
		if err := guard(); err != nil {
			return err
		}
		if gone, err = s.discard(dir); gone != "" {
			taken(gone)
		}
		return err
	})
	if err == nil && gone != "" {
		err = removeTree(gone)
	}
	if err != nil {
		return fmt.Errorf("remove %s %s: %w", kind, id, err)
	}
	return nil
}

// discard moves a directory out of everybody's sight, where it keeps its
// record until destroy or a later sweep deletes it. It returns the new path, or
// "" when there was no such directory. The root's lock must be held.
func (s *Store) discard(dir string) (string, error) {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err := unmountAll(dir); err != nil {
		return "", err
	}
	tmp := filepath.Join(s.root, tmpDir)
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return "", err
	}
	gone, err := os.MkdirTemp(tmp, "")
	if err != nil {
		return "", err
	}
	if err := unix.Rename(dir, gone); err != nil { // replaces the empty directory
		return "", errors.Join(fmt.Errorf("move %s away: %w", dir, err), os.Remove(gone))
	}
	return gone, nil
}

// shared tells whether a container other than id names the pod.
func (s *Store) shared(pod, id string) bool {
	for _, other := range s.containersOf(pod) {
		if other != id {
			return true
		}
	}
	return false
}

// podAlive tells whether somebody cares for the pod.
func (s *Store) podAlive(id string) bool {
	pod, clean := loose[Pod](filepath.Join(s.PodDir(id), podFile))
	if pod.Supervisor.Alive() || pod.Creator.Alive() {
		return true
	}
	if clean {
		return false
	}
	_, served := servedBy(s.PodDir(id))
	return served
}

// destroy kills what a discarded directory names and then deletes it.
func destroy(ctx context.Context, dir string) error {
	if err := endPod(ctx, dir); err != nil {
		return err // the record must outlive what it names
	}
	return removeTree(dir)
}

// endPod kills the pod whose files are in dir, if it is a pod's, and removes what it has elsewhere.
func endPod(ctx context.Context, dir string) error {
	if err := killPod(ctx, dir); err != nil {
		return err
	}
	pod, _ := loose[Pod](filepath.Join(dir, podFile))
	return errors.Join(removeCgroup(ctx, pod.Cgroup), cleanNetworks(pod))
}

// cleanNetworks removes what mirrored the pod's network namespaces.
func cleanNetworks(pod Pod) error {
	var errs []error
	for _, r := range pod.Networks[:min(len(pod.Networks), maxNets)] {
		if err := network.Clean(r); err != nil {
			errs = append(errs, fmt.Errorf("clean network namespace: %w", err))
		}
	}
	return errors.Join(errs...)
}

// cgroupTimeout bounds the wait for processes in a cgroup that are ending.
const cgroupTimeout = 2 * time.Second

// removeCgroup removes a cgroup that was recorded, if one was.
func removeCgroup(ctx context.Context, r hostcgroup.Record) error {
	if r.IsZero() || r.Validate() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, cgroupTimeout)
	defer cancel()
	return r.Remove(ctx)
}

// killPod kills the processes of the pod whose files are in dir, if it is a
// pod's: the supervisor first, so that it does not react to the rest. It takes
// from pod.json what can be read, and does not rely on it: a supervisor that
// has not saved itself yet, or whose file is damaged, is known by its socket,
// and a VM dies with its supervisor.
func killPod(ctx context.Context, dir string) error {
	pod, _ := loose[Pod](filepath.Join(dir, podFile))
	if err := killOther(ctx, pod.Supervisor); err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	if p, ok := servedBy(dir); ok {
		if err := killOther(ctx, p); err != nil {
			return fmt.Errorf("supervisor: %w", err)
		}
	}
	for _, p := range pod.VM {
		if err := killOther(ctx, p); err != nil {
			return fmt.Errorf("VM: %w", err)
		}
	}
	return nil
}

// killOther kills p unless that is the caller.
func killOther(ctx context.Context, p Process) error {
	if p.PID == os.Getpid() {
		return nil
	}
	return p.Kill(ctx)
}

// loose reads whatever can be read of a state file, of whatever version. clean
// tells whether that is all of it.
func loose[T any](path string) (v T, clean bool) {
	data, err := readFile(path)
	if err != nil {
		return v, false
	}
	return v, json.Unmarshal(data, &v) == nil
}

// servedBy identifies the process that listens on the supervisor's socket in
// dir, as the kernel knows it.
func servedBy(dir string) (Process, bool) {
	ctx, cancel := bounded(time.Second)
	defer cancel()
	conn, err := unixsock.Dial(ctx, dir, SupervisorSocket, "unix")
	if err != nil {
		return Process{}, false
	}
	defer conn.Close()
	cred, err := unixsock.Peer(conn)
	if err != nil {
		return Process{}, false
	}
	p, err := ProcessOf(int(cred.Pid))
	return p, err == nil && p.PID > 1
}
