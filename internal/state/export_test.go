package state

// For tests of what the API alone cannot reach.
var (
	ParseStat   = parseStat
	RemoveAt    = removeAt
	RemoveTree  = removeTree
	PodLinkName = podLink
)
