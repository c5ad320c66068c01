package compare_test

import (
	"testing"

	"gotest.tools/v3/assert"

	"runv/test/compare"
)

func TestJudge(t *testing.T) {
	j := compare.NewJudge([]compare.Accepted{
		{Where: `.*/status`, Line: `CPU: .*`, Reason: "CPUs differ"},
		{Where: `other/.*`, Line: `.*`, Reason: "not here"},
	})
	runc := compare.Sections{{"status", []string{"a", "CPU: 1", "b", "b"}}, {"gone", []string{"x"}}}
	v := j.Compare("runc", "case", runc, runc)
	assert.Equal(t, len(v.Unexplained)+v.Explained, 0)
	runv := compare.Sections{{"status", []string{"a", "CPU: 2", "b", "c"}}}
	v = j.Compare("runc", "case", runc, runv)
	assert.Equal(t, v.Explained, 2)
	assert.DeepEqual(t, v.Unexplained, []string{
		"case/status: only runc: b",
		"case/status: only runv: c",
		"case: not seen under runv: gone",
	})
	v = j.Compare("runc", "case", compare.Sections{{"s", []string{"a", "b"}}}, compare.Sections{{"s", []string{"b", "a"}}})
	assert.Equal(t, len(v.Unexplained), 1, "the order counts")
	j = compare.NewJudge([]compare.Accepted{{Where: `case/s`, Line: compare.Order}})
	v = j.Compare("runc", "case", compare.Sections{{"s", []string{"a", "b"}}}, compare.Sections{{"s", []string{"b", "a"}}})
	assert.Equal(t, len(v.Unexplained), 0, "it can be accepted")

	// What only one of two oracles does.
	list := []compare.Accepted{
		{Where: `.*`, Line: `new`, Reason: "older ones lack it", Only: "old"},
		{Where: `.*`, Line: `own`, Reason: "runv's own"},
	}
	j = compare.NewJudge(list)
	none, both := compare.Sections{{"s", nil}}, compare.Sections{{"s", []string{"new", "own"}}}
	assert.Equal(t, len(j.Compare("old", "case", none, both).Unexplained), 0)
	assert.DeepEqual(t, j.Compare("new", "case", none, both).Unexplained, []string{"case/s: only runv: new"})
	assert.DeepEqual(t, j.Oracles(1), []string{"new", "old"})
	assert.Equal(t, len(j.Stale([]string{"old", "new"})), 0)
	assert.DeepEqual(t, compare.NewJudge(list).Stale([]string{"old"}), []string{
		".*: new: accepted and not seen with old", ".*: own: accepted and not seen with old",
	})
	assert.DeepEqual(t, compare.With(list, "older ones lack it", []string{"old", "new"}), []string{"old"})
	assert.DeepEqual(t, compare.With(list, "runv's own", []string{"old", "new"}), []string{"old", "new"})
}
