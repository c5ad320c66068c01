package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"golang.org/x/sys/unix"
)

// maxFile bounds the configuration file, in bytes.
const maxFile = 1 << 20

// document is the file. A nil field is not in it.
type document struct {
	Accel         *string `toml:"accel"`
	QEMU          *string `toml:"qemu"`
	Pasta         *string `toml:"pasta"`
	GuestDir      *string `toml:"guest_dir"`
	Kernel        *string `toml:"kernel"`
	Initrd        *string `toml:"initrd"`
	DefaultVCPUs  *int64  `toml:"default_vcpus"`
	DefaultMemory *string `toml:"default_memory"`
	VMMMemory     *string `toml:"vmm_memory"`
	BootTimeout   *string `toml:"boot_timeout"`
	Binds         *string `toml:"binds"`
	Mirrors       *string `toml:"mirrors"`
}

// value is what the file says of one key.
type value struct {
	text   string
	origin Origin
}

// readFile reads the values of the file by key. The map is nil when the file
// is missing and need not be there.
func readFile(path string, required bool) (map[string]value, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not block
	if errors.Is(err, fs.ErrNotExist) {
		if !required {
			return nil, nil
		}
		return nil, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("read configuration %s: no such file", path))
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	if err := trusted(path, f); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if len(data) > maxFile {
		return nil, &Error{Origin{"file", path}, "", fmt.Sprintf("larger than %d bytes", maxFile)}
	}
	return parse(path, data)
}

// trusted refuses a file that others can make name any program.
func trusted(path string, f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("read configuration %s: %w", path, err)
	}
	denied := func(format string, args ...any) error {
		return errdefs.ErrPermissionDenied.WithMessage(
			fmt.Sprintf("read configuration %s: %s", path, fmt.Sprintf(format, args...)))
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return &Error{Origin{"file", path}, "", "not a regular file"}
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return denied("it belongs to uid %d", st.Uid)
	case st.Mode&0o022 != 0:
		return denied("others may write to it (mode %04o)", st.Mode&0o7777)
	}
	return nil
}

// parse decodes the text of a file. Errors are *Error.
func parse(path string, data []byte) (map[string]value, error) {
	var doc document
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil {
		return nil, located(path, err)
	}
	places := positions(data)
	values := map[string]value{}
	v := reflect.ValueOf(doc)
	for i := range v.NumField() {
		if field := v.Field(i); !field.IsNil() {
			name := v.Type().Field(i).Tag.Get("toml")
			p := places[name]
			values[name] = value{
				text:   fmt.Sprint(field.Elem().Interface()),
				origin: Origin{"file", fmt.Sprintf("%s:%d:%d", path, p.Line, p.Column)},
			}
		}
	}
	return values, nil
}

// goType is how the decoder names what the key's value should have been.
var goType = regexp.MustCompile(`into (?:a )?(?:struct field \S+|value) of type \*?(\S+)`)

// located turns the decoder's errors into ours.
func located(path string, err error) error {
	at := func(e *toml.DecodeError) Origin {
		line, column := e.Position()
		return Origin{"file", fmt.Sprintf("%s:%d:%d", path, line, column)}
	}
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) && len(missing.Errors) > 0 {
		first := &missing.Errors[0]
		return &Error{at(first), strings.Join(first.Key(), "."), "unknown key"}
	}
	if de, ok := errors.AsType[*toml.DecodeError](err); ok {
		reason := goType.ReplaceAllString(strings.TrimPrefix(de.Error(), "toml: "), "into a $1")
		return &Error{at(de), strings.Join(de.Key(), "."), oneLine(reason)}
	}
	return &Error{Origin{"file", path}, "", oneLine(err.Error())}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// positions finds where each key of the top level is, in a document that has
// been decoded already. The decoder itself tells positions only of what is wrong.
func positions(data []byte) map[string]unstable.Position {
	places := map[string]unstable.Position{}
	var p unstable.Parser
	p.Reset(data)
	for p.NextExpression() {
		if e := p.Expression(); e.Kind == unstable.KeyValue {
			if it := e.Key(); it.Next() {
				places[string(it.Node().Data)] = p.Shape(it.Node().Raw).Start
			}
		}
	}
	return places
}
