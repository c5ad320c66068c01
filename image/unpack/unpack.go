// Package unpack decompresses what kernel packages hold: a bzImage's payload and compressed
// modules.
//
// The image builder calls it. gzip and LZ4 (what Debian's kernels use) are decompressed here; for
// xz and zstd it runs the program of that name, because a library for a format that today's kernel
// does not use is not worth its weight.
package unpack

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"

	"github.com/pierrec/lz4/v4"
)

// MaxSize bounds, in bytes, what one call returns.
const MaxSize = 512 << 20

// lz4Block is the size of the blocks of LZ4's legacy frame, the one that the kernel's build uses.
const lz4Block = 8 << 20

// A format is a compression, known by the first bytes of its data.
type format struct {
	name    string
	magic   string
	unpack  func(ctx context.Context, data []byte) ([]byte, error)
	trailer bool
}

func formats() []format {
	return []format{
		{"gzip", "\x1f\x8b", unpackGzip, true},
		{"lz4", "\x02\x21\x4c\x18", unpackLZ4, false},
		{"xz", "\xfd7zXZ\x00", tool("xz", "xz-utils"), false},
		{"zstd", "\x28\xb5\x2f\xfd", tool("zstd", "zstd"), false},
		{"bzip2", "BZh", nil, false},
		{"lzma", "\x5d\x00\x00", nil, false},
		{"lzo", "\x89LZO", nil, false},
	}
}

// Payload decompresses the payload of a bzImage. All formats but gzip, which ends in it anyway,
// carry the size of the content in four more bytes at their end.
func Payload(ctx context.Context, data []byte) ([]byte, error) {
	f, err := detect(data)
	if err != nil {
		return nil, err
	}
	if len(data) < 8 {
		return nil, errors.New("the compressed data ends too early")
	}
	body, size := data, binary.LittleEndian.Uint32(data[len(data)-4:])
	if !f.trailer {
		body = data[:len(data)-4]
	}
	out, err := run(ctx, f, body)
	if err != nil {
		return nil, err
	}
	if uint64(len(out)) != uint64(size) {
		return nil, fmt.Errorf("decompress %s data: %d bytes where %d were announced", f.name, len(out), size)
	}
	return out, nil
}

// File decompresses a whole compressed file.
func File(ctx context.Context, data []byte) ([]byte, error) {
	f, err := detect(data)
	if err != nil {
		return nil, err
	}
	return run(ctx, f, data)
}

func detect(data []byte) (format, error) {
	for _, f := range formats() {
		if bytes.HasPrefix(data, []byte(f.magic)) {
			return f, nil
		}
	}
	return format{}, fmt.Errorf("unknown compression: the data begins with % x", data[:min(6, len(data))])
}

func run(ctx context.Context, f format, data []byte) ([]byte, error) {
	if f.unpack == nil {
		return nil, fmt.Errorf("%s compression is not supported: use a kernel compressed with lz4, gzip, xz or zstd, or give a vmlinux", f.name)
	}
	out, err := f.unpack(ctx, data)
	if err != nil {
		return nil, fmt.Errorf("decompress %s data: %w", f.name, err)
	}
	return out, nil
}

func unpackGzip(_ context.Context, data []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	r.Multistream(false)
	return readBounded(r)
}

func unpackLZ4(_ context.Context, data []byte) ([]byte, error) {
	data = data[4:] // the magic number
	var out []byte
	for block := make([]byte, lz4Block); len(data) > 0; {
		if len(data) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		size := binary.LittleEndian.Uint32(data)
		data = data[4:]
		if uint64(size) > uint64(len(data)) {
			return nil, io.ErrUnexpectedEOF
		}
		n, err := lz4.UncompressBlock(data[:size], block)
		if err != nil {
			return nil, err
		}
		if len(out)+n > MaxSize {
			return nil, errTooLarge
		}
		out = append(out, block[:n]...)
		data = data[size:]
	}
	return out, nil
}

// tool returns a function that decompresses with a program of the host.
func tool(name, pkg string) func(context.Context, []byte) ([]byte, error) {
	return func(ctx context.Context, data []byte) ([]byte, error) {
		path, err := exec.LookPath(name)
		if err != nil {
			return nil, fmt.Errorf("%w: install the package %s", err, pkg)
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, path, "-dc")
		cmd.Stdin, cmd.Stderr = bytes.NewReader(data), &stderr
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		out, readErr := readBounded(stdout)
		if readErr != nil {
			cancel()
		}
		if err := cmd.Wait(); err != nil && readErr == nil {
			return nil, fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(stderr.Bytes()))
		}
		return out, readErr
	}
}

var errTooLarge = fmt.Errorf("more than %d bytes", MaxSize)

func readBounded(r io.Reader) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, err
	}
	if len(out) > MaxSize {
		return nil, errTooLarge
	}
	return out, nil
}
