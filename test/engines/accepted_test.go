package engines

import (
	"runv/test/compare"
	"runv/test/harness"
)

// Why a difference is accepted, in words of the documents.
const (
	asShells  = "a program that cannot be run gives the status that shells give, 126 or 127, as a failure of the runtime; the runcs start it and have 1 or 255"
	lacksCaps = "the oracle's machine lacks capabilities, so runc cannot give them; a VM has them all"
	hostNet   = "a VM cannot use the host's network, and runv says what to do instead"
	vmStats   = "`stats` tells what the VM takes on the host, and its limit there: the container's and what the VM takes beyond it"
)

// accepted are all differences between runc and runv that have a reason.
var accepted = []compare.Accepted{
	{Where: `.*/run/.* /etc`, Line: `stderr: .*exec: "/etc": (is a directory: )?permission denied: .*`, Reason: "runv says of a directory that it is one, too"},
	{Where: `.*/exec/.* exec /etc/passwd`, Line: `exit status \d+|(stderr: .*)?exec /etc/passwd: exec format error.*|OCI runtime exec failed: .*exec format error: unknown`, Reason: asShells},
	{Where: `.*/(security|exec)/.* --privileged .*`, Line: `.*unable to apply caps: (can't apply capabilities: )?operation not permitted.*|OCI runtime exec failed: .*|exit status \d+|mounted|CapEff:.*`, Reason: lacksCaps},
	{Where: `podman/security/.* --privileged .*`, Line: `stderr: runv: warning: linux\.devices\[\d+\]: block device \d+:\d+ is the guest's, not the host's`, Reason: "runv warns of devices of the host that are others in the VM"},
	{Where: `docker/limits/.* field oom .*`, Line: `137 (true|false)`, Sometimes: true, Reason: "OOMKilled is reported when runv can make the host's kernel tell of what the guest's has done, which it does not when the VM could come to harm"},
	{Where: `.*/network/.* --network host .*`, Line: `stderr: .*: a virtual machine cannot use the host's network; publish ports, or give the container a network of its own(: unknown\.)?|exit status 12[56]`, Reason: hostNet},
	{Where: `docker/looking/.* top .*`, Line: `sleep 1000|exit status 1`, Reason: "`top` shows the processes that the host has: the container's stand-in; `exec NAME ps` shows those in the VM"},
	{Where: `podman/looking/.* top .*`, Line: `\d+|sleep 1000|exit status 1`, Reason: "`top` reads the host's /proc, which has nothing of the VM; `exec NAME ps` shows the container's processes"},
	{Where: `podman/(locks|sqlite)/.*`, Line: `stderr: runv: warning: mounts\[\d+\]: container ID writes to DIR/\S+ as well, from another VM: .*`, Reason: "runv warns of a volume that containers in two VMs write to, since what they map of it in memory is not shared"},
	{Where: `docker/run/.*`, Line: `stderr: .*exec: "(nosuch|/etc)": .*|exit status 12[56]`, Only: harness.NewRunc, Reason: "the new runc tells in which of its own steps a program was missing, and fails otherwise with a directory"},
	{Where: `podman/(run|exec)/.*`, Line: `stderr: Error: .*|exit status 12[567]`, Reason: "Podman shows a line of a log of the runcs, which it does not know by the names that they have here"},
	{Where: `docker/limits/.*`, Line: `/ [\d.]+[MG]iB`, Reason: vmStats},
}
