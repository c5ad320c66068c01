package cpulist_test

import (
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/cpulist"
)

func members(set *unix.CPUSet) (all []int) {
	for i := range cpulist.Max + 1 {
		if set.IsSet(i) {
			all = append(all, i)
		}
	}
	return all
}

func TestParse(t *testing.T) {
	for list, want := range map[string][]int{
		"0":             {0},
		"0-3,7":         {0, 1, 2, 3, 7},
		" 2 , ,1, 1-2,": {1, 2},
		"1023":          {1023},
		"63-65":         {63, 64, 65},
	} {
		set, err := cpulist.Parse(list)
		assert.NilError(t, err, list)
		assert.DeepEqual(t, members(set), want)
	}
	for list, want := range map[string]string{
		"":             "names none",
		", ,":          "names none",
		"x":            `"x" is not a number`,
		"-1":           `"" is not a number`,
		"1-":           `"" is not a number`,
		"1-2-3":        `"2-3" is not a number`,
		"3-1":          `"3-1" counts down`,
		"1024":         "1024 is more than 1023",
		"0-4294967295": "4294967295 is more than 1023",
		"0-4294967296": `"4294967296" is not a number`,
		"1 2":          `"1 2" is not a number`,
		"+1":           `"+1" is not a number`,
		"0-1 023":      `"1 023" is not a number`,
	} {
		_, err := cpulist.Parse(list)
		assert.Error(t, err, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("0-3,7")
	f.Fuzz(func(t *testing.T, list string) {
		set, err := cpulist.Parse(list)
		if err == nil {
			assert.Assert(t, set.Count() > 0)
		}
	})
}
