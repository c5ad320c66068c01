package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// benchFiles measures files of the host in a container: in a bind mount, which is coherent, in one that is exclusive, and under
// runc. A shell in the container takes the times.
func benchFiles(t *table, runv, runc subject, dir string, n int) error {
	const directories, files = 50, 40
	volume := filepath.Join(dir, "volume")
	for d := range directories {
		sub := filepath.Join(volume, "tree", strconv.Itoa(d))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		for f := range files {
			if err := os.WriteFile(filepath.Join(sub, strconv.Itoa(f)), bytes.Repeat([]byte("x"), 1000), 0o644); err != nil {
				return err
			}
		}
	}
	if err := os.WriteFile(filepath.Join(volume, "large"), make([]byte, 64<<20), 0o644); err != nil {
		return err
	}
	rows := []struct {
		what, unit, script string
		mb                 float64 // 0: a time
	}{
		{"find over 2,000 files, warm", "ms", "find /v/tree >/dev/null", 0},
		{"read 2,000 files of 1 KB, warm", "ms", "cat /v/tree/*/* >/dev/null", 0},
		{"read 64 MB, cached by the host", speedUnit, "dd if=/v/large of=/dev/null bs=1M status=none iflag=direct", 64},
		{"read 64 MB again", speedUnit, "cat /v/large >/dev/null", 64},
		{"write 64 MB", speedUnit, "dd if=/dev/zero of=/v/new bs=1M count=64 status=none", 64},
		{"make and remove 200 files", "ms", "mkdir /v/n; i=0; while [ $i -lt 200 ]; do : >/v/n/$i; i=$((i+1)); done; rm -r /v/n", 0},
		{"stat and rewrite a file 300 times", "ms", "i=0; while [ $i -lt 300 ]; do [ -e /v/f ]; echo $i >/v/f; i=$((i+1)); done", 0},
	}
	got := make(map[string][3][]float64)
	for i, s := range []subject{runv, runv, runc} {
		err := editSpec(s.bundle, func(spec *specs.Spec) {
			spec.Process.Args = []string{"sleep", "100000"}
			spec.Mounts = append(withoutVolume(spec.Mounts), specs.Mount{Type: "bind", Source: volume, Destination: "/v", Options: []string{"rbind"}})
			spec.Annotations = nil
			if i == 1 {
				spec.Annotations = map[string]string{"dev.runv.exclusive": "/v"}
			}
		})
		if err != nil {
			return err
		}
		err = s.with(func() error {
			for _, row := range rows {
				times, err := s.scripts(row.script, n)
				if err != nil {
					return err
				}
				if row.mb > 0 {
					for i := range times {
						times[i] = row.mb / (times[i] / 1000)
					}
				}
				all := got[row.what]
				all[i] = times
				got[row.what] = all
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, row := range rows {
		all := got[row.what]
		t.add("bind mount: "+row.what, row.unit, all[0], all[2])
		t.add("exclusive bind mount: "+row.what, row.unit, all[1], all[2])
	}
	return editSpec(runv.bundle, func(spec *specs.Spec) { spec.Mounts, spec.Annotations = withoutVolume(spec.Mounts), nil })
}

func withoutVolume(mounts []specs.Mount) (rest []specs.Mount) {
	for _, m := range mounts {
		if m.Destination != "/v" {
			rest = append(rest, m)
		}
	}
	return rest
}

// scripts measures a shell script in the container n times, in milliseconds, after a first time that is not measured. The shell
// itself takes the time, for an exec varies more than what is measured.
func (s subject) scripts(script string, n int) (times []float64, err error) {
	// Busybox's date has no fractions; /proc/uptime has hundredths.
	loop := fmt.Sprintf("for r in $(seq %d); do read a b </proc/uptime; %s; read c d </proc/uptime; echo $a $c; done", n+1, script)
	var out bytes.Buffer
	if err := s.run(nil, &out, "exec", "bench", "sh", "-c", loop); err != nil {
		return nil, err
	}
	for i, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		var from, to float64
		if _, err := fmt.Sscan(line, &from, &to); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", s.name, line, err)
		}
		if i > 0 {
			times = append(times, max((to-from)*1000, 5)) // half of what the clock can tell apart
		}
	}
	return times, nil
}
