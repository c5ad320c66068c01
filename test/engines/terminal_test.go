package engines

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"runv/test/harness"
)

// terminalName is the name under which scripts call this program for a terminal:
//
//	terminal COMMAND [EXPECT TYPE]...
//
// runs the shell command COMMAND on a terminal of 93 columns and 31 rows, waits for each line with the text EXPECT on its
// screen and then types TYPE, if it is not empty, with a return unless it ends in a control character, prints what the
// screen shows, and ends with the command's exit status.
const terminalName = "terminal"

func terminal(args []string) int {
	code, err := onTerminal(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "terminal:", err)
		return 1
	}
	return code
}

func onTerminal(args []string) (int, error) {
	if len(args)%2 != 1 {
		return 0, fmt.Errorf("%d arguments", len(args))
	}
	master, path, err := console.NewPty()
	if err != nil {
		return 0, err
	}
	defer master.Close()
	if err := master.Resize(console.WinSize{Width: 93, Height: 31}); err != nil {
		return 0, err
	}
	slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command("sh", "-c", args[0])
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: unix.SIGKILL}
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return 0, err
	}
	screen := make(chan []byte)
	go func() {
		defer close(screen)
		for {
			buf := make([]byte, 4096)
			n, err := master.Read(buf)
			if n > 0 {
				screen <- buf[:n]
			}
			if err != nil { // EIO once nobody has the terminal any more
				return
			}
		}
	}()
	limit := time.After(harness.Timeout / 2)
	var seen []byte
	unread := 0
	for dialog := args[1:]; ; {
		if len(dialog) > 0 {
			if n := lineWith(seen[unread:], dialog[0]); n > 0 {
				unread += n
				text := dialog[1]
				if text != "" && text[len(text)-1] >= ' ' {
					text += "\r"
				}
				if _, err := master.Write([]byte(text)); err != nil {
					return 0, err
				}
				dialog = dialog[2:]
				continue
			}
		}
		select {
		case data, ok := <-screen:
			seen = append(seen, data...)
			if ok {
				continue
			}
			fmt.Print(strings.ReplaceAll(string(seen), "\r", ""))
			return harness.ExitCode(cmd.Wait()), nil
		case <-limit:
			_ = cmd.Process.Kill()
			return 0, fmt.Errorf("the screen does not show %q, or the command does not end: %q", dialog, seen)
		}
	}
}

// lineWith returns where the line ends that has a text first, 0 if there is none that is complete.
func lineWith(screen []byte, text string) int {
	i := bytes.Index(screen, []byte(text))
	if i < 0 {
		return 0
	}
	end := bytes.IndexByte(screen[i:], '\n')
	if end < 0 {
		return 0
	}
	return i + end + 1
}
