// The watcher prints what inotify tells of the files and directories that are its arguments, an event a line:
// path, kinds, and a number that the two halves of a rename have in common. Repetitions are left out. It ends with
// the event of a file that is called end. The tests run it in containers.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const watched = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE | unix.IN_MOVED_FROM |
	unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "watcher:", err)
		os.Exit(1)
	}
}

func run(paths []string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	names := make(map[int32]string)
	for _, path := range paths {
		wd, err := unix.InotifyAddWatch(fd, path, watched)
		if err != nil {
			return fmt.Errorf("watch %s: %w", path, err)
		}
		names[int32(wd)] = path
	}
	fmt.Println("ready")
	buf := make([]byte, 64<<10)
	cookies := make(map[uint32]int)
	for last := ""; ; {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			name := unix.ByteSliceToString(b[unix.SizeofInotifyEvent:size])
			if name == "end" {
				return nil
			}
			line := names[int32(binary.NativeEndian.Uint32(b))] + " " + name + kinds(binary.NativeEndian.Uint32(b[4:]))
			if cookie := binary.NativeEndian.Uint32(b[8:]); cookie != 0 {
				if cookies[cookie] == 0 {
					cookies[cookie] = len(cookies) + 1
				}
				line += fmt.Sprint(" ", cookies[cookie])
			}
			if line != last {
				fmt.Println(line)
			}
			last = line
			b = b[size:]
		}
	}
}

func kinds(mask uint32) string {
	var b strings.Builder
	for _, k := range []struct {
		bit  uint32
		name string
	}{
		{unix.IN_CREATE, "CREATE"},
		{unix.IN_DELETE, "DELETE"},
		{unix.IN_MODIFY, "MODIFY"},
		{unix.IN_ATTRIB, "ATTRIB"},
		{unix.IN_CLOSE_WRITE, "CLOSE_WRITE"},
		{unix.IN_MOVED_FROM, "MOVED_FROM"},
		{unix.IN_MOVED_TO, "MOVED_TO"},
		{unix.IN_DELETE_SELF, "DELETE_SELF"},
		{unix.IN_MOVE_SELF, "MOVE_SELF"},
		{unix.IN_Q_OVERFLOW, "OVERFLOW"},
		{unix.IN_ISDIR, "DIR"},
	} {
		if mask&k.bit != 0 {
			b.WriteString(" " + k.name)
		}
	}
	return b.String()
}
