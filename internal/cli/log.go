package cli

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"
)

// openLog opens what --log and --log-format ask for, in the form in which runc
// writes its log: callers parse the last line of level error. It does nothing
// when the log is open.
func (a *app) openLog() error {
	if a.logFile != nil {
		return nil
	}
	if a.logFormat != "text" && a.logFormat != "json" && a.logFormat != "" {
		return fmt.Errorf("--log-format=%s: text or json is possible", a.logFormat)
	}
	if a.logPath == "" {
		if a.debug {
			a.log = slog.New(newLogHandler(a.prog.Stderr, "text", slog.LevelDebug))
		}
		return nil
	}
	f, err := os.OpenFile(a.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_SYNC, 0o644)
	if err != nil {
		return fmt.Errorf("--log: %w", err)
	}
	level := slog.LevelInfo
	if a.debug {
		level = slog.LevelDebug
	}
	a.logFile = f
	a.log = slog.New(newLogHandler(f, a.logFormat, level))
	return nil
}

// newLogHandler writes records with the keys, times and level names of logrus.
func newLogHandler(w io.Writer, format string, level slog.Level) slog.Handler {
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, attr slog.Attr) slog.Attr {
		if len(groups) > 0 {
			return attr
		}
		switch attr.Key {
		case slog.TimeKey:
			return slog.String(slog.TimeKey, attr.Value.Time().Format(time.RFC3339))
		case slog.LevelKey:
			return slog.String(slog.LevelKey, levelName(attr.Value.Any()))
		}
		return attr
	}}
	if format == "json" {
		return slog.NewJSONHandler(w, opts)
	}
	return slog.NewTextHandler(w, opts)
}

func levelName(v any) string {
	level, _ := v.(slog.Level)
	switch {
	case level >= slog.LevelError:
		return "error"
	case level >= slog.LevelWarn:
		return "warning"
	case level >= slog.LevelInfo:
		return "info"
	}
	return "debug"
}

// logIsStderr tells whether the log and standard error are the same file, so
// that a message is not shown twice.
func (a *app) logIsStderr() bool {
	if a.logFile == nil {
		return false
	}
	log, err := a.logFile.Stat()
	if err != nil {
		return false
	}
	stderr, err := a.prog.Stderr.Stat()
	return err == nil && os.SameFile(log, stderr)
}

func (a *app) closeLog() {
	if a.logFile != nil {
		_ = a.logFile.Close()
	}
}
