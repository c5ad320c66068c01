// Package cpulist reads lists of CPUs and of memory nodes, such as "0-3,7", into the masks that
// the kernel takes. The host validates a bundle with it and the guest's agent translates the same
// text, so both use it and it knows neither.
package cpulist

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Max is the highest number that a list may hold: a mask has no room for more.
const Max = 1023

// Parse reads a list. Blanks around and commas between too many elements are fine, as under runc;
// a list without any element is an error.
func Parse(list string) (*unix.CPUSet, error) {
	set := &unix.CPUSet{}
	for element := range strings.SplitSeq(list, ",") {
		element = strings.TrimSpace(element)
		if element == "" {
			continue
		}
		low, high, isRange := strings.Cut(element, "-")
		first, err := number(low)
		if err != nil {
			return nil, err
		}
		last := first
		if isRange {
			if last, err = number(high); err != nil {
				return nil, err
			}
		}
		if first > last {
			return nil, fmt.Errorf("%q counts down", element)
		}
		for i := first; i <= last; i++ {
			set.Set(i)
		}
	}
	if set.Count() == 0 {
		return nil, errors.New("names none")
	}
	return set, nil
}

func number(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is not a number", s)
	case n > Max:
		return 0, fmt.Errorf("%d is more than %d", n, Max)
	}
	return int(n), nil
}
