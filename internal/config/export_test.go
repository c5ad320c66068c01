package config

// For tests, which have no say over /etc and their own executable.
var (
	LoadFrom   = load
	GuestOf    = (*Effective).guestOf
	Parse      = parse
	ParseSize  = parseSize
	FormatSize = formatSize
)
