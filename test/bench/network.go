package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"runv/test/harness"
)

const (
	bitUnit = "Mbit/s"
	// transfer is how long iperf3 sends for one figure.
	transfer = 3 * time.Second
	pings    = 20 // of one figure
)

// benchNetwork measures what goes through a veth pair between a container and a network namespace that stands for
// the world: throughput of one TCP connection in each direction, and the round trip of a ping.
func benchNetwork(t *table, runv, runc subject, n int) error {
	type figures struct{ out, in, ping []float64 }
	var got [2]figures
	for i, s := range []subject{runv, runc} {
		f := &got[i]
		err := s.withNetwork(func() error {
			for range n {
				for _, way := range []struct {
					speeds *[]float64
					flags  []string
				}{{&f.out, nil}, {&f.in, []string{"--reverse"}}} {
					speed, err := s.iperf(way.flags...)
					if err != nil {
						return err
					}
					*way.speeds = append(*way.speeds, speed)
				}
				trip, err := s.ping()
				if err != nil {
					return err
				}
				f.ping = append(f.ping, trip)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	t.add("TCP from the container, iperf3", bitUnit, got[0].out, got[1].out)
	t.add("TCP to the container, iperf3", bitUnit, got[0].in, got[1].in)
	t.add(fmt.Sprintf("ping, mean of %d", pings), "ms", got[0].ping, got[1].ping)
	return nil
}

// withNetwork runs do while a container runs that has a network, and iperf3 serves at its other end.
func (s subject) withNetwork(do func() error) (err error) {
	var both [2]*harness.NetNS
	for i := range both {
		if both[i], err = harness.OpenNetNS(); err != nil {
			return err
		}
		defer both[i].Close()
	}
	pod, world := both[0], both[1]
	if err := pod.Connect("eth0", []string{"10.9.0.2/24"}, world, "world0", []string{"10.9.0.1/24"}); err != nil {
		return err
	}
	server := exec.Command("nsenter", "--net="+world.Path, "iperf3", "--server", "--bind", "10.9.0.1")
	if err := server.Start(); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, server.Process.Kill())
		_ = server.Wait()
	}()
	// A tree of its own: the host's programs, with their libraries.
	s.bundle = filepath.Join(filepath.Dir(s.bundle), "network-"+s.name)
	if err := harness.WriteRootfs(filepath.Join(s.bundle, "rootfs")); err != nil {
		return err
	}
	if out, err := exec.Command(filepath.Join(harness.TreeRoot(), "bin", "runv"), "spec", "--bundle", s.bundle).CombinedOutput(); err != nil {
		return fmt.Errorf("runv spec: %w: %s", err, out)
	}
	err = editSpec(s.bundle, func(spec *specs.Spec) {
		harness.MayPing(spec)
		spec.Process.Args = []string{"sleep", "100000"}
		for i := range spec.Linux.Namespaces {
			if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				spec.Linux.Namespaces[i].Path = pod.Path
			}
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"}) // iperf3's files
		for _, dir := range []string{"/usr", "/lib", "/lib64"} {
			spec.Mounts = append(spec.Mounts, specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"rbind", "ro"}})
		}
	})
	if err != nil {
		return err
	}
	return s.with(do)
}

// iperf measures the throughput of one connection in Mbit/s, as who receives counts it.
func (s subject) iperf(flags ...string) (float64, error) {
	args := append([]string{"exec", "bench", "/usr/bin/iperf3", "--json", "--client", "10.9.0.1", "--time", strconv.Itoa(int(transfer.Seconds()))}, flags...)
	var out bytes.Buffer
	if err := s.run(nil, &out, args...); err != nil {
		return 0, fmt.Errorf("%w: %s", err, out.String())
	}
	var report struct {
		Error string `json:"error"`
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		return 0, fmt.Errorf("read iperf3's report: %w", err)
	}
	if report.Error != "" {
		return 0, fmt.Errorf("iperf3 in %s: %s", s.name, report.Error)
	}
	return report.End.Received.BitsPerSecond / 1e6, nil
}

var meanTrip = regexp.MustCompile(`min/avg/max = [0-9.]+/([0-9.]+)/`)

// ping measures a round trip, in milliseconds.
func (s subject) ping() (float64, error) {
	var out bytes.Buffer
	if err := s.run(nil, &out, "exec", "bench", "ping", "-c", strconv.Itoa(pings), "-i", "0.05", "10.9.0.1"); err != nil {
		return 0, err
	}
	m := meanTrip.FindStringSubmatch(out.String())
	if m == nil {
		return 0, fmt.Errorf("ping told no mean: %s", out.String())
	}
	return strconv.ParseFloat(m[1], 64)
}
