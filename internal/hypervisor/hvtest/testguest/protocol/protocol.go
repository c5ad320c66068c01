// Package protocol is what a test guest answers on the agent channel: enough for
// the suite in hvtest to see that a VM works, and no more. The program testguest
// above it serves it as PID 1 of a real VM, a test of an in-memory driver in a
// goroutine.
//
// A request is a line, "VERB ARGUMENT..."; the answer is a line, "ok TEXT" or
// "error TEXT".
//
//	echo TEXT        ok TEXT
//	console TEXT     writes TEXT to the console
//	read TAG FILE    ok CONTENT of a file in the share with that tag
//	size             ok CPUS MIB: takes into use what was plugged, and tells what there is
//	release TAG      lets go of the share
//	nic MAC ADDRESS  ok MTU QUEUES: waits for the network device and gives it the address, which has a prefix length
//	nics             ok COUNT of network devices but lo
//	busy MILLIS      keeps all processors busy from now on
//	poweroff, panic  end the guest; no answer
package protocol

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// Actions are what the guest can do. PowerOff and Panic may not return.
type Actions interface {
	Console(text string) error
	Read(tag, file string) (string, error)
	Size() (cpus int, mebibytes int64, err error)
	Release(tag string) error
	NIC(mac, address string) (mtu, queues int, err error)
	NICs() (int, error)
	Busy(time.Duration) error
	PowerOff() error
	Panic() error
}

// maxLine is enough for the suite's longest echo, in bytes.
const maxLine = 4 << 20

// Serve answers until the channel ends.
func Serve(channel io.ReadWriter, guest Actions) error {
	lines := bufio.NewScanner(channel)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		text, err := answer(lines.Text(), guest)
		reply := "ok " + text
		if err != nil {
			reply = "error " + err.Error()
		}
		if _, err := io.WriteString(channel, strings.ReplaceAll(reply, "\n", " ")+"\n"); err != nil {
			return err
		}
	}
	return lines.Err()
}

func answer(request string, guest Actions) (string, error) {
	verb, argument, _ := strings.Cut(request, " ")
	switch verb {
	case "echo":
		return argument, nil
	case "console":
		return "", guest.Console(argument)
	case "read":
		tag, file, _ := strings.Cut(argument, " ")
		return guest.Read(tag, file)
	case "size":
		cpus, mebibytes, err := guest.Size()
		return fmt.Sprintf("%d %d", cpus, mebibytes), err
	case "release":
		return "", guest.Release(argument)
	case "nic":
		mac, address, _ := strings.Cut(argument, " ")
		mtu, queues, err := guest.NIC(mac, address)
		return fmt.Sprintf("%d %d", mtu, queues), err
	case "nics":
		n, err := guest.NICs()
		return strconv.Itoa(n), err
	case "busy":
		millis, err := strconv.Atoi(argument)
		if err != nil {
			return "", err
		}
		return "", guest.Busy(time.Duration(millis) * time.Millisecond)
	case "poweroff":
		return "", guest.PowerOff()
	case "panic":
		return "", guest.Panic()
	}
	return "", fmt.Errorf("unknown verb %q", verb)
}
