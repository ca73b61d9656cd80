package wire

import (
	"encoding/binary"
	"fmt"
)

// Codec is how the payload of a FrameCompressed was made smaller.
type Codec uint8

const (
	// CodecNone: as it is; never in a CodedHeader.
	CodecNone Codec = 0
	// CodecS2: a block of S2, an extension of Snappy's format.
	CodecS2 Codec = 1
	// CodecZstd: one frame of Zstandard (RFC 8878).
	CodecZstd Codec = 2
)

// Codecs are all that this build can undo, by the names that travel.
var Codecs = []string{CodecS2.String(), CodecZstd.String()}

func (c Codec) String() string {
	switch c {
	case CodecNone:
		return "none"
	case CodecS2:
		return "s2"
	case CodecZstd:
		return "zstd"
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// CodedHeader stands before what a codec made of a chunk.
//
//	offset 0  codec   Codec
//	       1  zero    3 bytes
//	       4  length  of the chunk before compression, bytes
//	       8  CRC     CRC-32C of the chunk before compression
//
// All numbers are little endian.
type CodedHeader struct {
	Codec  Codec
	Length uint32
	CRC    uint32
}

// CodedHeaderLen is the size of a CodedHeader on the wire, in bytes.
const CodedHeaderLen = 12

// Put writes h into the first CodedHeaderLen bytes of b.
//
// Preconditions: b is at least that long.
func (h CodedHeader) Put(b []byte) {
	_ = b[CodedHeaderLen-1]
	binary.LittleEndian.PutUint32(b, uint32(h.Codec))
	binary.LittleEndian.PutUint32(b[4:], h.Length)
	binary.LittleEndian.PutUint32(b[8:], h.CRC)
}

// ParseCoded takes the payload of a FrameCompressed apart; most is the largest
// chunk, bytes. body points into b. Errors wrap ErrCorrupt.
func ParseCoded(b []byte, most int) (h CodedHeader, body []byte, err error) {
	if len(b) <= CodedHeaderLen {
		return h, nil, fmt.Errorf("%w: a compressed chunk of %d bytes", ErrCorrupt, len(b))
	}
	h = CodedHeader{Codec: Codec(b[0]), Length: binary.LittleEndian.Uint32(b[4:]), CRC: binary.LittleEndian.Uint32(b[8:])}
	switch {
	case h.Codec != CodecS2 && h.Codec != CodecZstd || b[1]|b[2]|b[3] != 0:
		return h, nil, fmt.Errorf("%w: a chunk is compressed by %s, which this build does not know", ErrCorrupt, h.Codec)
	case h.Length == 0 || uint64(h.Length) > uint64(most):
		return h, nil, fmt.Errorf("%w: a compressed chunk of %d bytes, at most %d are allowed", ErrCorrupt, h.Length, most)
	}
	return h, b[CodedHeaderLen:], nil
}
