package hypervisor_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"

	"runv/internal/hypervisor"
	"runv/internal/hypervisor/fake"
)

// A guest that says one thing and powers itself off.
func Example() {
	var driver hypervisor.Driver = &fake.Driver{Guest: func(vm *fake.VM, channel net.Conn) {
		_, _ = io.WriteString(channel, "hello from the guest")
		vm.PowerOff()
	}}
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	vm, err := driver.Start(context.Background(), hypervisor.Config{
		ID: "example", Accel: hypervisor.TCG, VCPUs: 1, MemoryBytes: 256 << 20, RunDir: dir,
	})
	if err != nil {
		log.Fatal(err)
	}
	text, _ := io.ReadAll(vm.Agent()) // ends with the VM
	<-vm.Done()
	fmt.Printf("%s, %v\n", text, vm.Err())
	// Output: hello from the guest, <nil>
}
