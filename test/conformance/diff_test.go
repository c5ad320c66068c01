package conformance

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"gotest.tools/v3/assert"
)

// accepted is a difference between runc and runv that has a reason.
type accepted struct {
	where  string // pattern of "case/section"
	line   string // pattern of the line that only one of them prints
	reason string

	sometimes bool // not in every run
}

// judge tells explained differences from others, and remembers which explanations were needed.
type judge struct {
	list []accepted
	exps []struct{ where, line *regexp.Regexp }

	mu    sync.Mutex
	cases map[int]map[string]bool // by index in list
}

func newJudge(list []accepted) *judge {
	j := &judge{list: list, cases: map[int]map[string]bool{}}
	for _, a := range list {
		j.exps = append(j.exps, struct{ where, line *regexp.Regexp }{
			regexp.MustCompile("^(?:" + a.where + ")$"), regexp.MustCompile("^(?:" + a.line + ")$"),
		})
	}
	return j
}

// explains tells whether a line that only one side printed is accepted.
func (j *judge) explains(name, section, line string) bool {
	for i, e := range j.exps {
		if e.where.MatchString(name+"/"+section) && e.line.MatchString(line) {
			j.mu.Lock()
			if j.cases[i] == nil {
				j.cases[i] = map[string]bool{}
			}
			j.cases[i][name] = true
			j.mu.Unlock()
			return true
		}
	}
	return false
}

// verdict is the comparison of one case.
type verdict struct {
	sections, lines int
	explained       int
	unexplained     []string
}

// compare compares what the two sides saw in a case.
func (j *judge) compare(name string, runc, runv sections) verdict {
	var v verdict
	var missing [2][]string
	for _, section := range sectionNames(runc, runv) {
		ours, inRunv := linesOf(runv, section)
		theirs, inRunc := linesOf(runc, section)
		switch {
		case !inRunc:
			missing[0] = append(missing[0], section)
			continue
		case !inRunv:
			missing[1] = append(missing[1], section)
			continue
		}
		v.sections++
		v.lines += max(len(ours), len(theirs))
		common := map[string]int{}
		for who, lines := range map[string][2][]string{"runc": {theirs, ours}, "runv": {ours, theirs}} {
			for _, line := range only(lines[0], lines[1]) {
				if j.explains(name, section, line) {
					v.explained++
					continue
				}
				v.unexplained = append(v.unexplained, fmt.Sprintf("%s/%s: only %s: %s", name, section, who, line))
			}
		}
		for _, line := range theirs {
			common[line] = min(count(theirs, line), count(ours, line))
		}
		a, b := those(theirs, common), those(ours, common)
		if !slices.Equal(a, b) {
			v.unexplained = append(v.unexplained, fmt.Sprintf("%s/%s: the order differs:\nrunc %q\nrunv %q", name, section, a, b))
		}
	}
	for i, who := range []string{"runc", "runv"} {
		if len(missing[i]) > 0 {
			v.unexplained = append(v.unexplained, fmt.Sprintf("%s: not seen under %s: %s", name, who, strings.Join(missing[i], " ")))
		}
	}
	slices.Sort(v.unexplained)
	return v
}

func sectionNames(all ...sections) []string {
	var names []string
	for _, s := range all {
		for _, section := range s {
			if !slices.Contains(names, section.name) {
				names = append(names, section.name)
			}
		}
	}
	return names
}

func linesOf(s sections, name string) (lines []string, ok bool) {
	for _, section := range s {
		if section.name == name {
			return section.lines, true
		}
	}
	return nil, false
}

func count(lines []string, line string) (n int) {
	for _, l := range lines {
		if l == line {
			n++
		}
	}
	return n
}

// only returns the lines of a that b has not, or has less often.
func only(a, b []string) []string {
	left := map[string]int{}
	for _, line := range b {
		left[line]++
	}
	var lines []string
	for _, line := range a {
		if left[line]--; left[line] < 0 {
			lines = append(lines, line)
		}
	}
	return lines
}

// those returns the first common[line] of each line, in order.
func those(lines []string, common map[string]int) []string {
	seen := map[string]int{}
	var all []string
	for _, line := range lines {
		if seen[line]++; seen[line] <= common[line] {
			all = append(all, line)
		}
	}
	return all
}

func sortLines(lines []string) []string {
	slices.Sort(lines)
	return lines
}

func TestJudge(t *testing.T) {
	j := newJudge([]accepted{
		{where: `.*/status`, line: `CPU: .*`, reason: "CPUs differ"},
		{where: `other/.*`, line: `.*`, reason: "not here"},
	})
	runc := sections{{"status", []string{"a", "CPU: 1", "b", "b"}}, {"gone", []string{"x"}}}
	v := j.compare("case", runc, runc)
	assert.Equal(t, len(v.unexplained)+v.explained, 0)
	runv := sections{{"status", []string{"a", "CPU: 2", "b", "c"}}}
	v = j.compare("case", runc, runv)
	assert.Equal(t, v.explained, 2)
	assert.DeepEqual(t, v.unexplained, []string{
		"case/status: only runc: b",
		"case/status: only runv: c",
		"case: not seen under runv: gone",
	})
	v = j.compare("case", sections{{"s", []string{"a", "b"}}}, sections{{"s", []string{"b", "a"}}})
	assert.Equal(t, len(v.unexplained), 1, "the order counts")
}
