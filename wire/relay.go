package wire

import (
	"encoding/binary"
	"fmt"
)

// Relay frames carry the bytes of an object that stays on its host (home) to
// and from the host on which a tree that has it open runs (tree). Both
// directions count bytes from the object's first one on; the counts outlive
// every tree's end, so that another host can take the tree's side over.
//
//	offset 0  magic    "gdwr"
//	       4  version  RelayVersion
//	       5  type     RelayType
//	       6  flags    RelayFlags
//	       7  0
//	       8  epoch    of the tree's side: one more with each host it moves to
//	      12  length   of the payload, bytes
//	      16  offset   RelayData: of the payload's first byte
//	      24  end      how many bytes the sender of the frame has read of its object
//	      32  base     how many of them it knows to be taken by the other side
//	      40  taken    how many of the other direction it has taken
//	      48  limit    how many of the other direction it takes by now
//	      56  body CRC CRC-32C of the payload
//	      60  head CRC CRC-32C of bytes 0 … 59
//
// All numbers are little endian.

// RelayVersion is the version of the relay protocol that this build speaks.
const RelayVersion = 1

// RelayHeaderLen is the size of a RelayHeader on the wire, in bytes.
const RelayHeaderLen = 64

// MaxRelayPayload bounds the payload of a relay frame, in bytes.
const MaxRelayPayload = 256 << 10

const relayMagic = "gdwr"

// RelayType says what a relay frame is.
type RelayType uint8

const (
	// RelayAttach is how a tree's side begins; the payload is the name of its host.
	RelayAttach RelayType = 1
	// RelayData carries bytes.
	RelayData RelayType = 2
	// RelayState tells the counts, at least every two seconds.
	RelayState RelayType = 3
	// RelayGone: nobody at this host knows of the relay; with RelayFin: any more.
	RelayGone RelayType = 4
	// RelaySize tells a tree's side of the size of the terminal that is proxied; the
	// payload is rows, columns and both in pixels (0: unknown), 2 bytes each.
	RelaySize RelayType = 5
	// RelayEnd tells home how the tree has ended; the payload is one byte, an Ending, and
	// one of status. It is told again and again as long as the relay is there.
	RelayEnd RelayType = 6
)

// Ending is how a tree ended that had a relay for its terminal.
type Ending uint8

const (
	EndingUnknown Ending = 0 // nobody can tell
	EndingRunning Ending = 1 // its root runs on without the terminal
	EndingExited  Ending = 2 // the status is its root's, as a shell has it (128 and the signal)
	EndingMoved   Ending = 3 // it runs on another host
)

// EndPayload is the payload of RelayEnd.
func EndPayload(e Ending, status uint8) []byte { return []byte{byte(e), status} }

// ParseEnd reads a payload of RelayEnd.
func ParseEnd(b []byte) (e Ending, status uint8, ok bool) {
	if len(b) != 2 || b[0] > byte(EndingMoved) {
		return 0, 0, false
	}
	return Ending(b[0]), b[1], true
}

// SizePayload is the payload of RelaySize.
func SizePayload(s *WindowSize) []byte {
	var b []byte
	for _, v := range []uint32{s.GetRows(), s.GetColumns(), s.GetXPixels(), s.GetYPixels()} {
		b = binary.LittleEndian.AppendUint16(b, uint16(v))
	}
	return b
}

// ParseSize reads a payload of RelaySize.
func ParseSize(b []byte) (*WindowSize, bool) {
	if len(b) != 8 {
		return nil, false
	}
	at := func(i int) uint32 { return uint32(binary.LittleEndian.Uint16(b[2*i:])) }
	return &WindowSize{Rows: at(0), Columns: at(1), XPixels: at(2), YPixels: at(3)}, true
}

// RelayFlags of a frame.
type RelayFlags uint8

const (
	// RelayFin: the object has come to its end after `end` bytes.
	RelayFin RelayFlags = 1 << iota
	// RelayShut: the frame's sender takes nothing any more: nobody reads it.
	RelayShut
	// RelayResend asks for everything from `taken` on once more.
	RelayResend
)

// RelayHeader is the fixed part of a relay frame.
type RelayHeader struct {
	Type   RelayType
	Flags  RelayFlags
	Epoch  uint32
	Offset uint64
	End    uint64
	Base   uint64
	Taken  uint64
	Limit  uint64
}

// Frame returns a whole frame: header, then a copy of payload.
func (h RelayHeader) Frame(payload []byte) []byte {
	b := make([]byte, RelayHeaderLen+len(payload))
	copy(b, relayMagic)
	b[4], b[5], b[6] = RelayVersion, byte(h.Type), byte(h.Flags)
	binary.LittleEndian.PutUint32(b[8:], h.Epoch)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(payload)))
	for i, v := range []uint64{h.Offset, h.End, h.Base, h.Taken, h.Limit} {
		binary.LittleEndian.PutUint64(b[16+8*i:], v)
	}
	binary.LittleEndian.PutUint32(b[56:], BodyCRC(payload))
	binary.LittleEndian.PutUint32(b[60:], BodyCRC(b[:60]))
	copy(b[RelayHeaderLen:], payload)
	return b
}

// ParseRelayFrame takes a frame apart; the payload is part of b. Errors wrap
// ErrCorrupt or ErrFrameVersion.
func ParseRelayFrame(b []byte) (h RelayHeader, payload []byte, err error) {
	if len(b) < RelayHeaderLen || string(b[:4]) != relayMagic {
		return h, nil, fmt.Errorf("%w: %d bytes that are no relay frame", ErrCorrupt, len(b))
	}
	if binary.LittleEndian.Uint32(b[60:]) != BodyCRC(b[:60]) {
		return h, nil, fmt.Errorf("%w: its head does not match its checksum", ErrCorrupt)
	}
	if b[4] != RelayVersion {
		return h, nil, fmt.Errorf("%w: relay frame of version %d, this side speaks %d", ErrFrameVersion, b[4], RelayVersion)
	}
	h = RelayHeader{Type: RelayType(b[5]), Flags: RelayFlags(b[6]), Epoch: binary.LittleEndian.Uint32(b[8:])}
	for i, v := range []*uint64{&h.Offset, &h.End, &h.Base, &h.Taken, &h.Limit} {
		*v = binary.LittleEndian.Uint64(b[16+8*i:])
	}
	payload = b[RelayHeaderLen:]
	switch {
	case h.Type < RelayAttach || h.Type > RelayEnd || h.Flags > RelayFin|RelayShut|RelayResend || b[7] != 0:
		return h, nil, fmt.Errorf("%w: relay frame of type %d with flags %#x", ErrCorrupt, b[5], b[6])
	case int(binary.LittleEndian.Uint32(b[12:])) != len(payload) || len(payload) > MaxRelayPayload:
		return h, nil, fmt.Errorf("%w: %d bytes of payload, the head says %d", ErrCorrupt, len(payload), binary.LittleEndian.Uint32(b[12:]))
	case binary.LittleEndian.Uint32(b[56:]) != BodyCRC(payload):
		return h, nil, fmt.Errorf("%w: its payload does not match its checksum", ErrCorrupt)
	case h.Base > h.End || h.Taken > h.Limit, h.Type == RelayData && (h.Offset > h.End || uint64(len(payload)) > h.End-h.Offset):
		return h, nil, fmt.Errorf("%w: the counts of a relay frame do not add up", ErrCorrupt)
	}
	return h, payload, nil
}
