package shareserver

// For the test of the filter.
var (
	SetFilter = setFilter
)
