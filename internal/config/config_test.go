package config_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"runv/internal/config"
)

// write makes a configuration file, with an environment without runv's variables.
func write(t *testing.T, text string) string {
	t.Helper()
	clean(t)
	path := filepath.Join(t.TempDir(), "config.toml")
	assert.NilError(t, os.WriteFile(path, []byte(text), 0o644))
	assert.NilError(t, os.Chmod(path, 0o644))
	return path
}

func clean(t *testing.T) {
	t.Helper()
	t.Setenv("RUNV_CONFIG", "")
	for _, k := range config.Keys() {
		t.Setenv(k.Env(), "")
	}
}

func TestDefaults(t *testing.T) {
	clean(t)
	e, err := config.LoadFrom(config.Overrides{}, filepath.Join(t.TempDir(), "missing"))
	assert.NilError(t, err)
	assert.DeepEqual(t, e.Config, config.Config{
		Accel: "auto", DefaultVCPUs: 1, DefaultMemory: 512 << 20, VMMMemory: 256 << 20, BootTimeout: time.Minute, Binds: config.Coherent, Mirrors: true,
	})
	assert.Equal(t, e.File, "")
	for _, k := range config.Keys() {
		assert.Equal(t, e.Origins[k.Name].String(), "default")
	}
}

func TestEachSourceWinsOverTheOneBelow(t *testing.T) {
	file := write(t, "accel = \"kvm\"\n\n  guest_dir = '/from/file'\nqemu = \"qemu-kvm\"\ndefault_vcpus = 2\nboot_timeout = \"90s\"\n")
	t.Setenv("RUNV_GUEST_DIR", "/from/env")
	t.Setenv("RUNV_DEFAULT_MEMORY", "1G")
	t.Setenv("RUNV_ACCEL", "tcg")
	e, err := config.LoadFrom(config.Overrides{GuestDir: "from/flag"}, file)
	assert.NilError(t, err)
	wd, err := os.Getwd()
	assert.NilError(t, err)
	assert.DeepEqual(t, e.Config, config.Config{
		Accel: "tcg", QEMU: "qemu-kvm", GuestDir: filepath.Join(wd, "from/flag"),
		DefaultVCPUs: 2, DefaultMemory: 1 << 30, VMMMemory: 256 << 20, BootTimeout: 90 * time.Second, Binds: config.Coherent, Mirrors: true,
	})
	assert.Equal(t, e.File, file)
	for key, want := range map[string]string{
		"accel": "RUNV_ACCEL", "guest_dir": "--guest-dir", "qemu": file + ":4:1", "default_vcpus": file + ":5:1",
		"default_memory": "RUNV_DEFAULT_MEMORY", "boot_timeout": file + ":6:1", "kernel": "default",
	} {
		assert.Equal(t, e.Origins[key].String(), want)
	}

	e, err = config.LoadFrom(config.Overrides{}, file)
	assert.NilError(t, err)
	assert.Equal(t, e.GuestDir, "/from/env")
	t.Setenv("RUNV_GUEST_DIR", "")
	e, err = config.LoadFrom(config.Overrides{}, file)
	assert.NilError(t, err)
	assert.Equal(t, e.GuestDir, "/from/file")
	assert.Equal(t, e.Origins["guest_dir"].String(), file+":3:3")
}

func TestWhichFile(t *testing.T) {
	byDefault := write(t, "default_vcpus = 1")
	byEnv := write(t, "default_vcpus = 2")
	byFlag := write(t, "default_vcpus = 3")
	for _, c := range []struct {
		env, flag string
		want      int
	}{{"", "", 1}, {byEnv, "", 2}, {byEnv, byFlag, 3}} {
		t.Setenv("RUNV_CONFIG", c.env)
		e, err := config.LoadFrom(config.Overrides{File: c.flag}, byDefault)
		assert.NilError(t, err)
		assert.Equal(t, e.DefaultVCPUs, c.want)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	_, err := config.Load(config.Overrides{File: missing})
	assert.Error(t, err, "read configuration "+missing+": no such file")
	assert.Assert(t, errdefs.IsNotFound(err))
	t.Setenv("RUNV_CONFIG", missing)
	_, err = config.LoadFrom(config.Overrides{}, byDefault)
	assert.Assert(t, errdefs.IsNotFound(err))
}

func TestErrorsNameTheirPlace(t *testing.T) {
	for text, want := range map[string]string{
		"accel = \"auto\"\n  colour = 1\n":  ":2:3: colour: unknown key",
		"[network]\nbridge = \"x\"\n":       ": unknown key",
		"a.b = 1":                           ":1:1: a.b: unknown key",
		"accel = \"auto\"\naccel = \"kvm\"": ":2:1: ",
		"accel = 7":                         ":1:9: accel: cannot decode TOML integer into a string",
		"accel = {}":                        ":1:9: accel: cannot decode TOML inline table into a string",
		"[foo]":                             ":1:2: foo: unknown key",
		"default_vcpus = \"2\"":             ":1:17: ",
		"# x\naccel = \n":                   ":2:",
		"accel = \"vmx\"":                   `:1:1: accel: "vmx" is not one of auto, kvm, tcg`,
		"\n qemu = \"bin/qemu\"":            `:2:2: qemu: "bin/qemu" is not an absolute path`,
		"kernel = \"vmlinux\"":              `:1:1: kernel: "vmlinux" is not an absolute path`,
		"kernel = \"/\\u0000\"":             ":1:1: kernel: holds a NUL",
		"default_vcpus = 0":                 `:1:1: default_vcpus: "0" is not a number between 1 and 255`,
		"default_vcpus = 1000":              "between 1 and 255",
		"default_memory = \"lots\"":         `:1:1: default_memory: "lots" is not a size such as 512MiB`,
		"default_memory = \"512MB\"":        "is not a size",
		"default_memory = \"63MiB\"":        "is not between 64MiB and 16TiB",
		"default_memory = \"99999999999G\"": "is too large",
		"vmm_memory = \"8MiB\"":             "is not between 16MiB and 16TiB",
		"default_memory = \"65537KiB\"":     "is not a multiple of 1MiB",
		"boot_timeout = \"60\"":             `:1:1: boot_timeout: "60" is not a duration such as 60s`,
		"boot_timeout = \"0s\"":             "is not between 1s and 1h0m0s",
		"boot_timeout = \"2h\"":             "is not between",
	} {
		file := write(t, text)
		_, err := config.LoadFrom(config.Overrides{File: file}, "")
		assert.ErrorContains(t, err, want)
		assert.Assert(t, strings.HasPrefix(err.Error(), file+":"), "%v", err)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.Assert(t, !strings.Contains(err.Error(), "\n"), "%v", err)
	}
	file := write(t, "")
	t.Setenv("RUNV_ACCEL", "hvf")
	_, err := config.LoadFrom(config.Overrides{File: file}, "")
	assert.Error(t, err, `RUNV_ACCEL: accel: "hvf" is not one of auto, kvm, tcg`)
}

func TestUntrustedFiles(t *testing.T) {
	file := write(t, "")
	assert.NilError(t, os.Chmod(file, 0o666))
	_, err := config.LoadFrom(config.Overrides{File: file}, "")
	assert.Error(t, err, "read configuration "+file+": others may write to it (mode 0666)")
	assert.Assert(t, errdefs.IsPermissionDenied(err))

	_, err = config.LoadFrom(config.Overrides{File: filepath.Dir(file)}, "")
	assert.ErrorContains(t, err, "not a regular file")
	assert.NilError(t, os.Remove(file))
	assert.NilError(t, unix.Mkfifo(file, 0o600))
	_, err = config.LoadFrom(config.Overrides{File: file}, "")
	assert.ErrorContains(t, err, "not a regular file")
	assert.NilError(t, os.Remove(file))
	assert.NilError(t, os.WriteFile(file, make([]byte, 1<<20+1), 0o600))
	_, err = config.LoadFrom(config.Overrides{File: file}, "")
	assert.ErrorContains(t, err, "larger than 1048576 bytes")
	if os.Geteuid() == 0 {
		assert.NilError(t, os.Chown(file, 12345, -1))
		_, err = config.LoadFrom(config.Overrides{File: file}, "")
		assert.ErrorContains(t, err, "belongs to uid 12345")
	}
}

func TestPrintedConfigurationIsOne(t *testing.T) {
	file := write(t, "guest_dir = \"/a \\\"b\\\"\"\ndefault_vcpus = 3\ndefault_memory = \"1536MiB\"")
	t.Setenv("RUNV_BOOT_TIMEOUT", "1m30s")
	e, err := config.LoadFrom(config.Overrides{File: file}, "")
	assert.NilError(t, err)
	text, err := e.TOML()
	assert.NilError(t, err)
	for _, want := range []string{
		"# read from \"" + file + "\"\n",
		"# from: RUNV_BOOT_TIMEOUT\nboot_timeout = '1m30s'\n",
		"# from: " + file + ":2:1\ndefault_vcpus = 3\n",
		"# from: default\naccel = 'auto'\n",
	} {
		assert.Assert(t, strings.Contains(text, want), "%q is not in:\n%s", want, text)
	}
	again, err := config.LoadFrom(config.Overrides{File: write(t, text)}, "")
	assert.NilError(t, err)
	assert.DeepEqual(t, again.Config, e.Config)

	data, err := json.Marshal(e)
	assert.NilError(t, err)
	var got struct {
		File   string
		Values map[string]struct {
			Value  any
			Origin config.Origin
		}
	}
	assert.NilError(t, json.Unmarshal(data, &got))
	assert.Equal(t, got.File, file)
	assert.Equal(t, len(got.Values), len(config.Keys()))
	assert.Equal(t, got.Values["default_vcpus"].Value, float64(3))
	assert.Equal(t, got.Values["default_memory"].Value, "1536MiB")
	assert.DeepEqual(t, got.Values["boot_timeout"].Origin, config.Origin{Kind: "env", Place: "RUNV_BOOT_TIMEOUT"})
}

// The table of keys and what the file may hold are written down twice.
func TestEveryKeyCanBeInTheFile(t *testing.T) {
	for _, k := range config.Keys() {
		value := map[string]string{
			"accel": `"tcg"`, "default_vcpus": "4", "default_memory": `"1GiB"`, "vmm_memory": `"64MiB"`, "boot_timeout": `"5s"`, "binds": `"exclusive"`, "mirrors": `"off"`,
		}[k.Name]
		if value == "" {
			value = `"/x"`
		}
		file := write(t, k.Name+" = "+value)
		e, err := config.LoadFrom(config.Overrides{File: file}, "")
		assert.NilError(t, err, k.Name)
		assert.Equal(t, e.Origins[k.Name].String(), file+":1:1")
	}
}

func TestSizes(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "1K": 1 << 10, "3KiB": 3 << 10, "512M": 512 << 20, "512MiB": 512 << 20, "2G": 2 << 30, "1TiB": 1 << 40,
	} {
		n, err := config.ParseSize(s)
		assert.NilError(t, err, s)
		assert.Equal(t, n, want, s)
		again, err := config.ParseSize(config.FormatSize(n))
		assert.NilError(t, err)
		assert.Equal(t, again, n)
	}
	for _, s := range []string{"", "M", "-1M", "+1M", "1.5G", "1 M", "1m", "1MB", "1KK", "1KiBMiB", "8388608T", "99999999999999999999"} {
		_, err := config.ParseSize(s)
		assert.Assert(t, err != nil, s)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("accel = \"kvm\"\ndefault_vcpus = 2\n"))
	f.Add([]byte("[a]\nb = 1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := config.Parse("f", data)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.Contains(err.Error(), "\n"), "%q", err)
		}
	})
}
