package hostcgroup

// For tests of what the API alone cannot reach.
var (
	ConfigOf = configOf
	Limits   = (*Group).limits
	Missing  = missing
)
