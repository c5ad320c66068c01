package container

// TranslateMount translates a mount of a specification.
var TranslateMount = translateMount

// ParseStat parses /proc/PID/stat.
func ParseStat(line string) (name string, parent, start uint64, err error) {
	s, err := parseStat(line)
	return s.name, s.parent, s.start, err
}
