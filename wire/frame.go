package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Frames are the messages of a transport stream. Each is a NATS message of a
// FrameHeader and a payload; the header is inside the message's payload since
// NATS headers cost about a tenth of the throughput.
//
//	offset 0  magic      "gdwt"
//	       4  version    FrameVersion
//	       5  type       FrameType
//	       6  lane       0 … lanes-1; 0 in frames that do not travel on a lane
//	       7  lanes      number of lanes of the stream
//	       8  stream     StreamKey of the stream's id
//	      16  session    random number of the sending end's life
//	      24  epoch      of the sender: how often it went back
//	      28  length     of the payload, bytes
//	      32  seq        see FrameType
//	      40  body CRC   CRC-32C of the payload
//	      44  head CRC   CRC-32C of bytes 0 … 43
//
// All numbers are little endian.

// FrameVersion is the version of the stream protocol that this build speaks.
const FrameVersion = 1

// FrameHeaderLen is the size of a FrameHeader on the wire, in bytes.
const FrameHeaderLen = 48

// MaxLanes bounds the number of lanes of a stream.
const MaxLanes = 16

const frameMagic = "gdwt"

// FrameType says what a frame is.
type FrameType uint8

const (
	// FrameData carries chunk seq on lane seq mod lanes.
	FrameData FrameType = 1
	// FrameEnd is the last frame of the sequence; its payload is a FrameTotal.
	FrameEnd FrameType = 2
	// FrameProbe asks, in order behind the data of its lane, whether the
	// receiver has every chunk of that lane below seq.
	FrameProbe FrameType = 3
	// FrameAck tells what the receiver has; its payload is an AckBody. seq is
	// the first chunk that has not been applied.
	FrameAck FrameType = 4
	// FramePing tells that the sender lives and asks for a FrameAck; seq is
	// the next chunk that it will number.
	FramePing FrameType = 5
	// FrameAbort ends the stream, from either side; its payload is an Error in protobuf.
	FrameAbort FrameType = 6
	// FrameBye tells the receiver that the sender knows everything to be applied.
	FrameBye FrameType = 7
	// FrameCompressed is FrameData whose payload is a CodedHeader and what a
	// codec made of the chunk. Only a receiver that named the codec gets it.
	FrameCompressed FrameType = 8
)

func (t FrameType) String() string {
	switch t {
	case FrameData:
		return "data"
	case FrameEnd:
		return "end"
	case FrameProbe:
		return "probe"
	case FrameAck:
		return "ack"
	case FramePing:
		return "ping"
	case FrameAbort:
		return "abort"
	case FrameBye:
		return "bye"
	case FrameCompressed:
		return "compressed data"
	}
	return fmt.Sprintf("frame type %d", uint8(t))
}

// FrameHeader is the fixed part of a frame.
type FrameHeader struct {
	Type    FrameType
	Lane    uint8
	Lanes   uint8
	Stream  uint64
	Session uint64
	Epoch   uint32
	Length  uint32 // set by Seal
	Seq     uint64
	BodyCRC uint32 // CRC-32C of the payload
}

var (
	// ErrCorrupt: the bytes are not a frame, or not the ones that were sent.
	ErrCorrupt = errors.New("corrupt stream frame")
	// ErrFrameVersion: a frame of another version of the stream protocol.
	ErrFrameVersion = errors.New("stream protocol version does not match")
	// ErrForeign: a sound frame that belongs to another stream.
	ErrForeign = errors.New("frame of a foreign stream")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// BodyCRC is the checksum of a payload, CRC-32C.
func BodyCRC(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// StreamKey is the number that stands for a stream's id in its frames: FNV-1a, 64 bits.
func StreamKey(id string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(id) {
		h = (h ^ uint64(id[i])) * 1099511628211
	}
	return h
}

// Put writes the header, checksummed, into the first FrameHeaderLen bytes of b.
//
// Preconditions: b is at least that long; Length and BodyCRC are set.
func (h FrameHeader) Put(b []byte) {
	_ = b[FrameHeaderLen-1]
	copy(b, frameMagic)
	b[4] = FrameVersion
	b[5] = byte(h.Type)
	b[6] = h.Lane
	b[7] = h.Lanes
	binary.LittleEndian.PutUint64(b[8:], h.Stream)
	binary.LittleEndian.PutUint64(b[16:], h.Session)
	binary.LittleEndian.PutUint32(b[24:], h.Epoch)
	binary.LittleEndian.PutUint32(b[28:], h.Length)
	binary.LittleEndian.PutUint64(b[32:], h.Seq)
	binary.LittleEndian.PutUint32(b[40:], h.BodyCRC)
	binary.LittleEndian.PutUint32(b[44:], BodyCRC(b[:44]))
}

// Frame returns a whole frame: header, then a copy of payload.
func (h FrameHeader) Frame(payload []byte) []byte {
	b := make([]byte, FrameHeaderLen+len(payload))
	copy(b[FrameHeaderLen:], payload)
	h.Length = uint32(len(payload))
	h.BodyCRC = BodyCRC(payload)
	h.Put(b)
	return b
}

// ParseFrame takes a frame apart and checks it: the magic, the version (before
// anything that another version might have elsewhere), both checksums, the
// fields. payload points into b. Errors wrap ErrCorrupt or ErrFrameVersion.
func ParseFrame(b []byte) (h FrameHeader, payload []byte, err error) {
	if len(b) < FrameHeaderLen {
		return FrameHeader{}, nil, fmt.Errorf("%w: %d bytes, a header has %d", ErrCorrupt, len(b), FrameHeaderLen)
	}
	if string(b[:4]) != frameMagic {
		return FrameHeader{}, nil, fmt.Errorf("%w: it starts with %x", ErrCorrupt, b[:4])
	}
	if got, want := BodyCRC(b[:44]), binary.LittleEndian.Uint32(b[44:]); got != want {
		// The version is looked at all the same: a later header may be longer.
		if b[4] != FrameVersion {
			return FrameHeader{}, nil, fmt.Errorf("%w: the peer speaks %d, this build speaks %d", ErrFrameVersion, b[4], FrameVersion)
		}
		return FrameHeader{}, nil, fmt.Errorf("%w: header checksum %08x, computed %08x", ErrCorrupt, want, got)
	}
	if b[4] != FrameVersion {
		return FrameHeader{}, nil, fmt.Errorf("%w: the peer speaks %d, this build speaks %d", ErrFrameVersion, b[4], FrameVersion)
	}
	h = FrameHeader{
		Type:    FrameType(b[5]),
		Lane:    b[6],
		Lanes:   b[7],
		Stream:  binary.LittleEndian.Uint64(b[8:]),
		Session: binary.LittleEndian.Uint64(b[16:]),
		Epoch:   binary.LittleEndian.Uint32(b[24:]),
		Length:  binary.LittleEndian.Uint32(b[28:]),
		Seq:     binary.LittleEndian.Uint64(b[32:]),
		BodyCRC: binary.LittleEndian.Uint32(b[40:]),
	}
	payload = b[FrameHeaderLen:]
	switch {
	case h.Type < FrameData || h.Type > FrameCompressed:
		err = fmt.Errorf("unknown type %d", h.Type)
	case h.Lanes == 0 || h.Lanes > MaxLanes || h.Lane >= h.Lanes:
		err = fmt.Errorf("lane %d of %d", h.Lane, h.Lanes)
	case uint64(h.Length) != uint64(len(payload)):
		err = fmt.Errorf("payload of %d bytes, the header says %d", len(payload), h.Length)
	case BodyCRC(payload) != h.BodyCRC:
		err = fmt.Errorf("payload checksum %08x, computed %08x", h.BodyCRC, BodyCRC(payload))
	case (h.Type == FrameData || h.Type == FrameEnd || h.Type == FrameCompressed) && h.Seq%uint64(h.Lanes) != uint64(h.Lane):
		err = fmt.Errorf("chunk %d on lane %d of %d", h.Seq, h.Lane, h.Lanes)
	}
	if err != nil {
		return FrameHeader{}, nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return h, payload, nil
}

// AckBody is the payload of a FrameAck.
type AckBody struct {
	// Peer is the session of the sender that this answers; 0: none is known yet.
	Peer uint64
	// Window is how many bytes the receiver can hold.
	Window uint64
	// Resend asks the sender, if it still is in the epoch of the frame's
	// header, to go back to Next: something of that epoch was lost.
	Resend bool
	// Done says that everything including the end has been applied.
	Done bool
	// Cut says that the receiver has lost its connections to the source: the
	// direct lane carries nothing. Set only if there was one.
	Cut bool
	// Next is for each lane the first chunk that has not arrived.
	Next []uint64
}

// Append appends the body to b.
//
// Preconditions: at most MaxLanes entries in Next.
func (a AckBody) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, a.Peer)
	b = binary.LittleEndian.AppendUint64(b, a.Window)
	var flags byte
	if a.Resend {
		flags |= 1
	}
	if a.Done {
		flags |= 2
	}
	if a.Cut {
		flags |= 4
	}
	b = append(b, flags, byte(len(a.Next)))
	for _, n := range a.Next {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b
}

// ParseAckBody reads the payload of a FrameAck; errors wrap ErrCorrupt.
func ParseAckBody(b []byte) (AckBody, error) {
	if len(b) < 18 {
		return AckBody{}, fmt.Errorf("%w: acknowledgement of %d bytes", ErrCorrupt, len(b))
	}
	a := AckBody{
		Peer:   binary.LittleEndian.Uint64(b),
		Window: binary.LittleEndian.Uint64(b[8:]),
		Resend: b[16]&1 != 0,
		Done:   b[16]&2 != 0,
		Cut:    b[16]&4 != 0,
	}
	n := int(b[17])
	if b[16]&^7 != 0 || n > MaxLanes || len(b) != 18+8*n {
		return AckBody{}, fmt.Errorf("%w: acknowledgement of %d bytes for %d lanes, flags %#x", ErrCorrupt, len(b), n, b[16])
	}
	for i := range n {
		a.Next = append(a.Next, binary.LittleEndian.Uint64(b[18+8*i:]))
	}
	return a, nil
}

// FrameTotal is the payload of a FrameEnd: what the stream was in all.
type FrameTotal struct {
	Chunks uint64
	Bytes  uint64 // of payload
	// Digest is the SHA-256 over (seq uint64, length uint32, CRC-32C uint32),
	// little endian, of every chunk in order, before any compression.
	Digest [32]byte
}

// Append appends the body to b.
func (t FrameTotal) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, t.Chunks)
	b = binary.LittleEndian.AppendUint64(b, t.Bytes)
	return append(b, t.Digest[:]...)
}

// ParseFrameTotal reads the payload of a FrameEnd; errors wrap ErrCorrupt.
func ParseFrameTotal(b []byte) (FrameTotal, error) {
	if len(b) != 48 {
		return FrameTotal{}, fmt.Errorf("%w: end of stream of %d bytes", ErrCorrupt, len(b))
	}
	t := FrameTotal{Chunks: binary.LittleEndian.Uint64(b), Bytes: binary.LittleEndian.Uint64(b[8:])}
	copy(t.Digest[:], b[16:])
	return t, nil
}
