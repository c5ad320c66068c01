package vhostuser

import (
	"encoding/binary"
	"fmt"
)

// The numbers and layouts are those of QEMU's document "Vhost-user Protocol". All fields have the byte
// order of the host, which is that of the guest: little.

// Kinds of messages.
const (
	getFeatures         = 1
	setFeatures         = 2
	setOwner            = 3
	resetOwner          = 4
	setMemTable         = 5
	setVringNum         = 8
	setVringAddr        = 9
	setVringBase        = 10
	getVringBase        = 11
	setVringKick        = 12
	setVringCall        = 13
	setVringErr         = 14
	getProtocolFeatures = 15
	setProtocolFeatures = 16
	getQueueNum         = 17
	setVringEnable      = 18
	resetDevice         = 34
	getMaxMemSlots      = 36
	addMemReg           = 37
	remMemReg           = 38
)

// Features of the device and of the protocol, as bits.
const (
	featureIndirect = 1 << 28
	featureEventIdx = 1 << 29
	featureProtocol = 1 << 30
	featureVersion1 = 1 << 32

	protocolMQ          = 1 << 0
	protocolReplyAck    = 1 << 3
	protocolResetDevice = 1 << 13
	protocolMemSlots    = 1 << 15
)

const (
	offeredFeatures = featureIndirect | featureEventIdx | featureProtocol | featureVersion1
	offeredProtocol = protocolMQ | protocolReplyAck | protocolResetDevice | protocolMemSlots
)

const (
	headerSize = 12
	regionSize = 32

	flagVersion   = 1
	flagVersions  = 3 // mask
	flagReply     = 1 << 2
	flagNeedReply = 1 << 3

	noFD = 1 << 8 // in the payload of a message that could bring an eventfd

	tableRegions = 8 // that one message can set
	maxSlots     = 64
	maxPayload   = 8 + tableRegions*regionSize
	maxFDs       = tableRegions
)

// A format is what is known of a kind of message.
type format struct {
	name    string
	size    uint32 // of the payload
	fds     int    // most that come with it
	answers bool   // has an answer of its own
}

// formats are the messages that this back end takes. What QEMU sends only after features were agreed upon
// that are not offered is missing.
func formatOf(kind uint32) (format, bool) {
	const none, number, state = 0, 8, 8
	switch kind {
	case getFeatures:
		return format{"GET_FEATURES", none, 0, true}, true
	case setFeatures:
		return format{"SET_FEATURES", number, 0, false}, true
	case setOwner:
		return format{"SET_OWNER", none, 0, false}, true
	case resetOwner:
		return format{"RESET_OWNER", none, 0, false}, true
	case setMemTable: // size: at most
		return format{"SET_MEM_TABLE", maxPayload, tableRegions, false}, true
	case setVringNum:
		return format{"SET_VRING_NUM", state, 0, false}, true
	case setVringAddr:
		return format{"SET_VRING_ADDR", 40, 0, false}, true
	case setVringBase:
		return format{"SET_VRING_BASE", state, 0, false}, true
	case getVringBase:
		return format{"GET_VRING_BASE", state, 0, true}, true
	case setVringKick:
		return format{"SET_VRING_KICK", number, 1, false}, true
	case setVringCall:
		return format{"SET_VRING_CALL", number, 1, false}, true
	case setVringErr:
		return format{"SET_VRING_ERR", number, 1, false}, true
	case getProtocolFeatures:
		return format{"GET_PROTOCOL_FEATURES", none, 0, true}, true
	case setProtocolFeatures:
		return format{"SET_PROTOCOL_FEATURES", number, 0, false}, true
	case getQueueNum:
		return format{"GET_QUEUE_NUM", none, 0, true}, true
	case setVringEnable:
		return format{"SET_VRING_ENABLE", state, 0, false}, true
	case resetDevice:
		return format{"RESET_DEVICE", none, 0, false}, true
	case getMaxMemSlots:
		return format{"GET_MAX_MEM_SLOTS", none, 0, true}, true
	case addMemReg:
		return format{"ADD_MEM_REG", 8 + regionSize, 1, false}, true
	case remMemReg: // older VMMs add a descriptor that means nothing
		return format{"REM_MEM_REG", 8 + regionSize, 1, false}, true
	}
	return format{}, false
}

// A header begins each message.
type header struct {
	format

	kind      uint32
	needReply bool
	payload   uint32 // its size, at most maxPayload
}

// decodeHeader reads headerSize bytes.
func decodeHeader(b []byte) (header, error) {
	kind, flags, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[8:])
	f, ok := formatOf(kind)
	switch {
	case !ok:
		return header{}, fmt.Errorf("message of kind %d, which is not known or not agreed upon", kind)
	case flags&flagVersions != flagVersion:
		return header{}, fmt.Errorf("%s: version %d", f.name, flags&flagVersions)
	case flags&flagReply != 0:
		return header{}, fmt.Errorf("%s: is an answer", f.name)
	case size > f.size, size < f.size && kind != setMemTable:
		return header{}, fmt.Errorf("%s: payload of %d bytes instead of %d", f.name, size, f.size)
	}
	return header{format: f, kind: kind, needReply: flags&flagNeedReply != 0, payload: size}, nil
}

// A state is what most messages about a queue carry.
type state struct{ index, num uint32 }

func decodeState(b []byte) state {
	return state{index: binary.LittleEndian.Uint32(b), num: binary.LittleEndian.Uint32(b[4:])}
}

// An address tells where the parts of a queue are in the VMM's address space.
type address struct {
	desc, used, avail uint64
}

func decodeAddress(b []byte) (index uint32, a address, err error) {
	if flags := binary.LittleEndian.Uint32(b[4:]); flags != 0 { // logging of writes is not offered
		return 0, address{}, fmt.Errorf("flags %#x", flags)
	}
	return binary.LittleEndian.Uint32(b), address{
		desc:  binary.LittleEndian.Uint64(b[8:]),
		used:  binary.LittleEndian.Uint64(b[16:]),
		avail: binary.LittleEndian.Uint64(b[24:]),
	}, nil
}

// A regionInfo tells of a piece of the guest's memory.
type regionInfo struct {
	guest  uint64 // address in the guest
	size   uint64 // bytes
	user   uint64 // address in the VMM
	offset uint64 // in the file
}

func decodeRegion(b []byte) (regionInfo, error) {
	r := regionInfo{
		guest:  binary.LittleEndian.Uint64(b),
		size:   binary.LittleEndian.Uint64(b[8:]),
		user:   binary.LittleEndian.Uint64(b[16:]),
		offset: binary.LittleEndian.Uint64(b[24:]),
	}
	if r.size == 0 || r.guest+r.size < r.guest || r.user+r.size < r.user || r.offset+r.size < r.offset {
		return regionInfo{}, fmt.Errorf("region %s: empty or beyond all addresses", r)
	}
	return r, nil
}

// String shows where the region is.
func (r regionInfo) String() string {
	return fmt.Sprintf("guest %#x size %#x user %#x offset %#x", r.guest, r.size, r.user, r.offset)
}

func decodeTable(b []byte) ([]regionInfo, error) {
	if len(b) < 8 {
		return nil, fmt.Errorf("payload of %d bytes", len(b))
	}
	n := binary.LittleEndian.Uint32(b)
	if n > tableRegions || len(b) != 8+int(n)*regionSize {
		return nil, fmt.Errorf("%d regions in a payload of %d bytes", n, len(b))
	}
	regions := make([]regionInfo, n)
	for i := range regions {
		var err error
		if regions[i], err = decodeRegion(b[8+i*regionSize:]); err != nil {
			return nil, err
		}
	}
	return regions, nil
}

// appendAnswer appends a message that answers one of a kind.
func appendAnswer(b []byte, kind uint32, payload []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, kind)
	b = binary.LittleEndian.AppendUint32(b, flagVersion|flagReply)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}
