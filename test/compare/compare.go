// Package compare judges what a test has seen under an oracle and under runv: the same, different for a reason
// that is accepted, or different without one. There may be several oracles, which differ from each other. Tests
// that have runc as their oracle use it; it runs nothing.
package compare

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// Accepted is a difference between an oracle and runv that has a reason.
type Accepted struct {
	Where  string // pattern of "case/section"
	Line   string // pattern of the line that only one of them prints, or Order
	Reason string // in words of the document

	Only      string // the oracle that alone differs so; with all of them if empty
	Sometimes bool   // not in every run
}

// Order is the Line of a difference that lies in the order of lines that both print.
const Order = "the order differs"

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
	needs map[need]bool
}

// need is a case in which an accepted difference was seen.
type need struct {
	index        int // in list
	oracle, name string
}

// NewJudge makes a judge that accepts these differences. The patterns are of whole words: anchored at both ends.
func NewJudge(list []Accepted) *Judge {
	j := &Judge{list: list, needs: map[need]bool{}}
	for _, a := range list {
		j.exps = append(j.exps, struct{ where, line *regexp.Regexp }{
			regexp.MustCompile("^(?:" + a.Where + ")$"), regexp.MustCompile("^(?:" + a.Line + ")$"),
		})
	}
	return j
}

// explains tells whether a line that only one side printed is accepted.
func (j *Judge) explains(oracle, name, section, line string) bool {
	for i, e := range j.exps {
		if only := j.list[i].Only; only != "" && only != oracle {
			continue
		}
		if e.where.MatchString(name+"/"+section) && e.line.MatchString(line) {
			j.mu.Lock()
			j.needs[need{i, oracle, name}] = true
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

// Compare compares what was seen in a case under an oracle and under runv.
func (j *Judge) Compare(oracle, name string, theirs, ours Sections) Verdict {
	var v Verdict
	var missing [2][]string
	for _, section := range sectionNames(theirs, ours) {
		our, isOurs := linesOf(ours, section)
		their, isTheirs := linesOf(theirs, section)
		switch {
		case !isTheirs:
			missing[0] = append(missing[0], section)
			continue
		case !isOurs:
			missing[1] = append(missing[1], section)
			continue
		}
		v.Sections++
		v.Lines += max(len(our), len(their))
		common := map[string]int{}
		for who, lines := range map[string][2][]string{oracle: {their, our}, "runv": {our, their}} {
			for _, line := range only(lines[0], lines[1]) {
				if j.explains(oracle, name, section, line) {
					v.Explained++
					continue
				}
				v.Unexplained = append(v.Unexplained, fmt.Sprintf("%s/%s: only %s: %s", name, section, who, line))
			}
		}
		for _, line := range their {
			common[line] = min(count(their, line), count(our, line))
		}
		a, b := those(their, common), those(our, common)
		switch {
		case slices.Equal(a, b):
		case j.explains(oracle, name, section, Order):
			v.Explained++
		default:
			v.Unexplained = append(v.Unexplained, fmt.Sprintf("%s/%s: %s:\n%s %q\nrunv %q", name, section, Order, oracle, a, b))
		}
	}
	for i, who := range []string{oracle, "runv"} {
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
func (j *Judge) Cases(i int) []string { return j.collect(i, func(n need) string { return n.name }) }

// Oracles returns the oracles that accepted difference i of the list was needed for.
func (j *Judge) Oracles(i int) []string { return j.collect(i, func(n need) string { return n.oracle }) }

func (j *Judge) collect(i int, of func(need) string) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	set := map[string]bool{}
	for n := range j.needs {
		if n.index == i {
			set[of(n)] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// Stale tells which accepted differences were not seen, or not with each oracle that the list says. The oracles are all that
// there are.
func (j *Judge) Stale(oracles []string) []string {
	var stale []string
	for i, a := range j.list {
		want := oracles
		if a.Only != "" {
			want = []string{a.Only}
		}
		for _, oracle := range want {
			if !a.Sometimes && !slices.Contains(j.Oracles(i), oracle) {
				stale = append(stale, fmt.Sprintf("%s: %s: accepted and not seen with %s", a.Where, a.Line, oracle))
			}
		}
	}
	return stale
}

// With tells with which oracles a reason of the list goes: those that differences of that reason name, all if one names none.
func With(list []Accepted, reason string, oracles []string) []string {
	var only []string
	for _, a := range list {
		if a.Reason == reason {
			if a.Only == "" {
				return oracles
			}
			only = append(only, a.Only)
		}
	}
	return slices.DeleteFunc(slices.Clone(oracles), func(oracle string) bool { return !slices.Contains(only, oracle) })
}
