package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

const (
	maxVCPUs     = 255      // without an interrupt remapper that is what a PC can have
	minMemory    = 64 << 20 // with less no guest boots
	minVMMMemory = 16 << 20 // with less no VMM runs
	maxMemory    = 16 << 40 // more is a slip
	memoryUnit   = 1 << 20  // what VMMs count in
	minTimeout   = time.Second
	maxTimeout   = time.Hour
)

// units are the suffixes of sizes, the larger ones first.
var units = []struct {
	name  string
	short string
	bytes int64
}{
	{"TiB", "T", 1 << 40},
	{"GiB", "G", 1 << 30},
	{"MiB", "M", 1 << 20},
	{"KiB", "K", 1 << 10},
}

// parseSize parses a size with a binary unit, as "512MiB", "1G" or "1048576".
func parseSize(s string) (int64, error) {
	digits, factor := s, int64(1)
	for _, u := range units {
		for _, suffix := range []string{u.name, u.short} {
			if rest, ok := strings.CutSuffix(s, suffix); ok && factor == 1 {
				digits, factor = rest, u.bytes
			}
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if errors.Is(err, strconv.ErrRange) || err == nil && int64(n) > math.MaxInt64/factor {
		return 0, fmt.Errorf("%q is too large", s)
	}
	if err != nil {
		return 0, fmt.Errorf("%q is not a size such as 512MiB or 2GiB", s)
	}
	return int64(n) * factor, nil
}

// formatSize writes what parseSize reads, with the largest unit that needs no fraction.
func formatSize(n int64) string {
	for _, u := range units {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

func parseMemory(s string) (int64, error) {
	n, err := parseSize(s)
	switch {
	case err != nil:
		return 0, err
	case n < minMemory || n > maxMemory:
		return 0, fmt.Errorf("%q is not between %s and %s", s, formatSize(minMemory), formatSize(maxMemory))
	case n%memoryUnit != 0:
		return 0, fmt.Errorf("%q is not a multiple of %s", s, formatSize(memoryUnit))
	}
	return n, nil
}

func parseVMMMemory(s string) (int64, error) {
	n, err := parseSize(s)
	if err == nil && (n < minVMMMemory || n > maxMemory) {
		err = fmt.Errorf("%q is not between %s and %s", s, formatSize(minVMMMemory), formatSize(maxMemory))
	}
	return n, err
}

func parseVCPUs(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > maxVCPUs {
		return 0, fmt.Errorf("%q is not a number between 1 and %d", s, maxVCPUs)
	}
	return n, nil
}

func parseTimeout(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is not a duration such as 60s or 2m", s)
	case d < minTimeout || d > maxTimeout:
		return 0, fmt.Errorf("%q is not between %s and %s", s, minTimeout, maxTimeout)
	}
	return d, nil
}
