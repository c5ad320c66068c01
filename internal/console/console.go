// Package console keeps what a guest's kernel and agent write to the serial
// console: the newest part in memory, for error messages, and all of it up to a
// limit in a file, for people.
//
// The guest is hostile: it may write without end, and anything. So both copies
// are bounded, and Tail strips control characters.
package console

import (
	"os"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

const (
	ringBytes = 64 << 10 // kept in memory, at least; at most twice as much
	fileBytes = 4 << 20  // kept in the file
	lineBytes = 512      // longest line that Tail returns
)

// Log is the console of one VM. It is safe for concurrent use.
type Log struct {
	mu      sync.Mutex
	ring    []byte // the newest bytes
	file    *os.File
	written int64 // to the file
}

// New makes a log that also writes to a new file at path, mode 0600. The
// caller closes it. An empty path means no file.
func New(path string) (*Log, error) {
	l := &Log{}
	if path == "" {
		return l, nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	l.file = f
	return l, nil
}

// Write appends to the log. It never fails and never blocks on the guest's
// behalf: once the file is full or broken only the memory copy goes on.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring = append(l.ring, p...)
	if len(l.ring) > 2*ringBytes { // not each time: a guest may write byte by byte
		l.ring = append(l.ring[:0], l.ring[len(l.ring)-ringBytes:]...)
	}
	if l.file != nil && l.written < fileBytes {
		part := p[:min(int64(len(p)), fileBytes-l.written)]
		n, err := l.file.Write(part)
		l.written += int64(n)
		if err != nil {
			l.written = fileBytes
		} else if l.written == fileBytes {
			_, _ = l.file.WriteString("\n[runv: this file is full, the rest is not kept]\n")
		}
	}
	return len(p), nil
}

// Tail returns the newest n lines that are not blank, oldest first, printable
// and shortened.
func (l *Log) Tail(n int) []string {
	l.mu.Lock()
	text := string(l.ring)
	l.mu.Unlock()
	var lines []string
	all := strings.Split(text, "\n")
	for i := len(all) - 1; i >= 0 && len(lines) < n; i-- {
		if line := clean(all[i]); line != "" {
			lines = append(lines, line)
		}
	}
	for i, j := 0, len(lines)-1; i < j; i, j = i+1, j-1 {
		lines[i], lines[j] = lines[j], lines[i]
	}
	return lines
}

// Close closes the file. The memory copy stays readable.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return f.Close()
}

// clean makes a line of guest output fit for an error message.
func clean(line string) string {
	line = strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r == utf8.RuneError || !unicode.IsPrint(r): // controls, and what reorders or hides text
			return -1
		}
		return r
	}, line)
	line = strings.TrimSpace(line)
	if len(line) > lineBytes {
		line = strings.ToValidUTF8(line[:lineBytes], "") + "..."
	}
	return line
}
