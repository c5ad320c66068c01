package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/pelletier/go-toml/v2"
)

// TOML writes the configuration as a file that Load would read, with what each
// key is for and where its value came from in comments.
func (e *Effective) TOML() (string, error) {
	var b bytes.Buffer
	if e.File == "" {
		b.WriteString("# no configuration file was read\n")
	} else {
		fmt.Fprintf(&b, "# read from %s\n", strconv.QuoteToGraphic(e.File))
	}
	for _, k := range Keys() {
		line, err := toml.Marshal(map[string]any{k.Name: e.value(&k)})
		if err != nil {
			return "", fmt.Errorf("print configuration: %s: %w", k.Name, err)
		}
		fmt.Fprintf(&b, "\n# %s\n# from: %s\n%s", k.Doc, oneLine(e.Origins[k.Name].String()), line)
	}
	return b.String(), nil
}

// MarshalJSON writes an object with the file and, by key, value and origin.
func (e *Effective) MarshalJSON() ([]byte, error) {
	type entry struct {
		Value  any    `json:"value"`
		Origin Origin `json:"origin"`
	}
	values := map[string]entry{}
	for _, k := range Keys() {
		values[k.Name] = entry{e.value(&k), e.Origins[k.Name]}
	}
	return json.Marshal(struct {
		File   string           `json:"file"`
		Values map[string]entry `json:"values"`
	}{e.File, values})
}

// value is the key's value as it stands in a file.
func (e *Effective) value(k *Key) any {
	s := k.get(&e.Config)
	if k.kind == number {
		if n, err := strconv.ParseInt(s, 10, 64); err == nil {
			return n
		}
	}
	return s
}
