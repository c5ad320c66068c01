package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// maxUnknown bounds the warnings about unknown fields.
const maxUnknown = 16

// decode reads one JSON value into v and warns of fields that v does not have,
// which the runtime-spec wants ignored. Errors name the line and column.
func decode(c *checker, data []byte, v any) error {
	if len(data) > MaxConfig {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s: larger than %d bytes", c.doc, MaxConfig))
	}
	// Unmarshal would take null for an empty value.
	if text := bytes.TrimSpace(data); len(text) > 0 && text[0] != '{' {
		return c.syntax(data, int64(len(data)-len(bytes.TrimLeft(data, " \t\r\n"))+1), "must be a JSON object")
	}
	if err := json.Unmarshal(data, v); err != nil {
		var syntax *json.SyntaxError
		var typ *json.UnmarshalTypeError
		switch {
		case errors.As(err, &syntax):
			return c.syntax(data, syntax.Offset, strings.TrimPrefix(syntax.Error(), "json: "))
		case errors.As(err, &typ) && typ.Field != "":
			line, column := position(data, typ.Offset)
			return c.invalid(typ.Field, "%s does not fit (line %d, column %d)", typ.Value, line, column)
		case errors.As(err, &typ):
			return c.syntax(data, typ.Offset, typ.Value+" does not fit")
		}
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s: %v", c.doc, err))
	}
	var raw any
	if err := json.Unmarshal(data, &raw); err != nil {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s: %v", c.doc, err))
	}
	u := &unknown{}
	u.find(reflect.TypeOf(v), raw, "")
	for i, path := range u.paths {
		if i == maxUnknown {
			c.warn("%d more unknown fields: ignored", len(u.paths)-i)
			break
		}
		c.warn("%s: unknown field: ignored", path)
	}
	return nil
}

func (c *checker) syntax(data []byte, offset int64, reason string) error {
	line, column := position(data, offset)
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s: line %d, column %d: %s", c.doc, line, column, reason))
}

// position tells where the last of the first offset bytes is, from 1; the
// column counts bytes.
func position(data []byte, offset int64) (line, column int) {
	before := data[:max(0, min(offset-1, int64(len(data))))]
	return 1 + bytes.Count(before, []byte("\n")), len(before) - bytes.LastIndexByte(before, '\n')
}

// unknown collects the paths of JSON fields that a Go type has not.
type unknown struct{ paths []string }

func (u *unknown) find(t reflect.Type, raw any, path string) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch raw := raw.(type) {
	case map[string]any:
		keys := make([]string, 0, len(raw))
		for k := range raw {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			at := join(path, printable(k))
			switch t.Kind() {
			case reflect.Map:
				u.find(t.Elem(), raw[k], at)
			case reflect.Struct:
				if ft := fieldType(t, k); ft != nil {
					u.find(ft, raw[k], at)
				} else {
					u.paths = append(u.paths, at)
				}
			}
		}
	case []any:
		if t.Kind() == reflect.Slice {
			for i := range raw {
				u.find(t.Elem(), raw[i], path+"["+strconv.Itoa(i)+"]")
			}
		}
	}
}

// fieldType finds a struct's field as encoding/json does: whatever the case,
// and in embedded structs, too.
func fieldType(t reflect.Type, key string) reflect.Type {
	for _, f := range reflect.VisibleFields(t) {
		if name := jsonName(f); name != "" && strings.EqualFold(name, key) {
			return f.Type
		}
	}
	return nil
}

// printable keeps a key from breaking the one line of a warning.
func printable(key string) string {
	if q := quote(key); q != `"`+key+`"` {
		return q
	}
	return key
}
