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
	v := j.Compare("case", runc, runc)
	assert.Equal(t, len(v.Unexplained)+v.Explained, 0)
	runv := compare.Sections{{"status", []string{"a", "CPU: 2", "b", "c"}}}
	v = j.Compare("case", runc, runv)
	assert.Equal(t, v.Explained, 2)
	assert.DeepEqual(t, v.Unexplained, []string{
		"case/status: only runc: b",
		"case/status: only runv: c",
		"case: not seen under runv: gone",
	})
	v = j.Compare("case", compare.Sections{{"s", []string{"a", "b"}}}, compare.Sections{{"s", []string{"b", "a"}}})
	assert.Equal(t, len(v.Unexplained), 1, "the order counts")
}
