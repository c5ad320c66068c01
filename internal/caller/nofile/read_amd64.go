package nofile

func read() (l limit, ok bool) {
	ok = getrlimit(&l) == 0
	return l, ok
}

// getrlimit is prlimit64(0, RLIMIT_NOFILE, nil, l), and returns what the kernel does.
func getrlimit(l *limit) int64
