// Package compare judges what a test has seen under runc and under runv: the same, different for a reason
// that is accepted, or different without one. Tests that have runc as their oracle use it; it runs nothing.
package compare

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// Accepted is a difference between runc and runv that has a reason.
type Accepted struct {
	Where  string // pattern of "case/section"
	Line   string // pattern of the line that only one of them prints
	Reason string // in words of the document

	Sometimes bool // not in every run
}

// Sections are what was seen in a case, in order.
type Sections []Section

// Section is what was seen at one place of a case.
type Section struct {
	Name  string
	Lines []string
}

// Add adds lines to the section of a name, which it makes if there is none.
func (s *Sections) Add(name string, lines ...string) {
	for i := range *s {
		if (*s)[i].Name == name {
			(*s)[i].Lines = append((*s)[i].Lines, lines...)
			return
		}
	}
	*s = append(*s, Section{name, lines})
}

// Judge tells explained differences from others, and remembers which explanations were needed. Its methods
// may be called from several goroutines.
type Judge struct {
	list []Accepted
	exps []struct{ where, line *regexp.Regexp }

	mu    sync.Mutex
	cases map[int]map[string]bool // by index in list
}

// NewJudge makes a judge that accepts these differences. The patterns are of whole words: anchored at both ends.
func NewJudge(list []Accepted) *Judge {
	j := &Judge{list: list, cases: map[int]map[string]bool{}}
	for _, a := range list {
		j.exps = append(j.exps, struct{ where, line *regexp.Regexp }{
			regexp.MustCompile("^(?:" + a.Where + ")$"), regexp.MustCompile("^(?:" + a.Line + ")$"),
		})
	}
	return j
}

// explains tells whether a line that only one side printed is accepted.
func (j *Judge) explains(name, section, line string) bool {
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

// Verdict is the comparison of one case.
type Verdict struct {
	Sections, Lines int      // that both have seen, and their lines
	Explained       int      // lines that only one of them prints, for a reason
	Unexplained     []string // the rest, in words
}

// Compare compares what the two sides saw in a case.
func (j *Judge) Compare(name string, runc, runv Sections) Verdict {
	var v Verdict
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
		v.Sections++
		v.Lines += max(len(ours), len(theirs))
		common := map[string]int{}
		for who, lines := range map[string][2][]string{"runc": {theirs, ours}, "runv": {ours, theirs}} {
			for _, line := range only(lines[0], lines[1]) {
				if j.explains(name, section, line) {
					v.Explained++
					continue
				}
				v.Unexplained = append(v.Unexplained, fmt.Sprintf("%s/%s: only %s: %s", name, section, who, line))
			}
		}
		for _, line := range theirs {
			common[line] = min(count(theirs, line), count(ours, line))
		}
		a, b := those(theirs, common), those(ours, common)
		if !slices.Equal(a, b) {
			v.Unexplained = append(v.Unexplained, fmt.Sprintf("%s/%s: the order differs:\nrunc %q\nrunv %q", name, section, a, b))
		}
	}
	for i, who := range []string{"runc", "runv"} {
		if len(missing[i]) > 0 {
			v.Unexplained = append(v.Unexplained, fmt.Sprintf("%s: not seen under %s: %s", name, who, strings.Join(missing[i], " ")))
		}
	}
	slices.Sort(v.Unexplained)
	return v
}

func sectionNames(all ...Sections) []string {
	var names []string
	for _, s := range all {
		for _, section := range s {
			if !slices.Contains(names, section.Name) {
				names = append(names, section.Name)
			}
		}
	}
	return names
}

func linesOf(s Sections, name string) (lines []string, ok bool) {
	for _, section := range s {
		if section.Name == name {
			return section.Lines, true
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

// Cases returns the cases that accepted difference i of the list was needed for.
func (j *Judge) Cases(i int) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Sorted(maps.Keys(j.cases[i]))
}
