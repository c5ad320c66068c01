package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Event is something that QEMU tells without being asked.
type Event struct {
	Name string          // as in QEMU's documentation, such as "SHUTDOWN"
	Data json.RawMessage // nil when the event has none
}

// Error is QEMU's refusal of a command.
type Error struct {
	Command string
	Class   string // "GenericError" for nearly all
	Desc    string // for humans, one line, shortened
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc)
}

const (
	maxDesc = 1024 // bytes of an error description that are kept
	maxName = 128  // bytes of an event's name or of an id
)

// message is one line from QEMU. Exactly one of greeting, event and reply is set.
type message struct {
	greeting *greeting
	event    *Event
	reply    *reply
}

// greeting is the first line of a connection.
type greeting struct {
	Version struct {
		QEMU struct {
			Major, Minor, Micro int
		}
		Package string
	}
}

// String is the version as `qemu --version` writes it.
func (g *greeting) String() string {
	v := fmt.Sprintf("%d.%d.%d", g.Version.QEMU.Major, g.Version.QEMU.Minor, g.Version.QEMU.Micro)
	if p := printable(g.Version.Package, maxName); p != "" {
		v += " (" + p + ")"
	}
	return v
}

// reply answers a command.
type reply struct {
	id     string // empty when QEMU could not parse the command
	result json.RawMessage
	err    *Error
}

// decode parses a line. The line comes from a process that is not trusted: any
// input gives a message or an error, and nothing in the message is longer than
// the line.
func decode(line []byte) (message, error) {
	var raw struct {
		QMP    *greeting       `json:"QMP"`
		Event  *string         `json:"event"`
		Data   json.RawMessage `json:"data"`
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
		ID *string `json:"id"`
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return message{}, fmt.Errorf("parse qmp message: %v", err)
	}
	var kinds int
	for _, set := range []bool{raw.QMP != nil, raw.Event != nil, raw.Return != nil, raw.Error != nil} {
		if set {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, errors.New("parse qmp message: not exactly one of greeting, event, return and error")
	}
	var id string
	if raw.ID != nil {
		id = *raw.ID
	}
	if len(id) > maxName {
		return message{}, errors.New("parse qmp message: id too long")
	}
	switch {
	case raw.QMP != nil:
		return message{greeting: raw.QMP}, nil
	case raw.Event != nil:
		if len(*raw.Event) > maxName {
			return message{}, errors.New("parse qmp message: event name too long")
		}
		return message{event: &Event{Name: *raw.Event, Data: raw.Data}}, nil
	case raw.Error != nil:
		return message{reply: &reply{id: id, err: &Error{
			Class: printable(raw.Error.Class, maxName),
			Desc:  printable(raw.Error.Desc, maxDesc),
		}}}, nil
	default:
		return message{reply: &reply{id: id, result: raw.Return}}, nil
	}
}

// printable makes text of QEMU fit for an error message: one line, no control
// characters, at most n bytes.
func printable(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case r == utf8.RuneError || !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
	s = strings.TrimSpace(s)
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "")
	}
	return s
}
