package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A payload of the stream from source to destination is a sequence of
// records, each a DataHeader and its body. Page data does not go through
// protobuf, so that it can be read from a process straight into the message
// and written from the message straight into a process.
//
//	payload = record ...
//	record  = header (24 bytes, little endian) body (Length bytes)
//
//	offset 0  type    1 item, 2 data
//	       1  kind    of data: image.DataKind; 0 in items
//	       2  flags   FlagMore
//	       4  id      of data: process, shmid or ghost id; 0 in items
//	       8  offset  of data: address or offset in the object, bytes; 0 in items
//	      16  length  of the body, bytes
//	      20  zero
//
// Order and integrity are the transport's business.

// RecordType says what the body of a record is.
type RecordType uint8

const (
	// RecordItem: the body is an Item in protobuf, or a part of one.
	RecordItem RecordType = 1
	// RecordData: the body is data of the set (Kind, ID) at Offset.
	RecordData RecordType = 2
)

// FlagMore marks the part of an Item that goes on in the next record, because
// the whole does not fit into one payload. The last part does not have it.
const FlagMore uint16 = 1

// DataHeaderLen is the size of a DataHeader on the wire, in bytes.
const DataHeaderLen = 24

// DataHeader stands before each record of a payload.
type DataHeader struct {
	Type   RecordType
	Kind   uint8  // image.DataKind; 0 for items
	Flags  uint16 // FlagMore, items only
	ID     uint32 // which process or object; 0 for items
	Offset uint64 // bytes; 0 for items
	Length uint32 // of the body, bytes
}

// ErrBadRecord is what a malformed record is reported as.
var ErrBadRecord = errors.New("malformed stream record")

// Put writes h into the first DataHeaderLen bytes of b.
//
// Preconditions: b is at least that long.
func (h DataHeader) Put(b []byte) {
	_ = b[DataHeaderLen-1]
	b[0] = byte(h.Type)
	b[1] = h.Kind
	binary.LittleEndian.PutUint16(b[2:], h.Flags)
	binary.LittleEndian.PutUint32(b[4:], h.ID)
	binary.LittleEndian.PutUint64(b[8:], h.Offset)
	binary.LittleEndian.PutUint32(b[16:], h.Length)
	binary.LittleEndian.PutUint32(b[20:], 0)
}

// Append appends h to b.
func (h DataHeader) Append(b []byte) []byte {
	var a [DataHeaderLen]byte
	h.Put(a[:])
	return append(b, a[:]...)
}

// NextRecord takes the first record off a payload. body and rest point into
// payload. An error wraps ErrBadRecord; nothing is to be used then.
func NextRecord(payload []byte) (h DataHeader, body, rest []byte, err error) {
	if len(payload) < DataHeaderLen {
		return DataHeader{}, nil, nil, fmt.Errorf("%w: %d bytes where a header of %d should be", ErrBadRecord, len(payload), DataHeaderLen)
	}
	h = DataHeader{
		Type:   RecordType(payload[0]),
		Kind:   payload[1],
		Flags:  binary.LittleEndian.Uint16(payload[2:]),
		ID:     binary.LittleEndian.Uint32(payload[4:]),
		Offset: binary.LittleEndian.Uint64(payload[8:]),
		Length: binary.LittleEndian.Uint32(payload[16:]),
	}
	rest = payload[DataHeaderLen:]
	switch {
	case binary.LittleEndian.Uint32(payload[20:]) != 0:
		err = errors.New("reserved bytes are not zero")
	case uint64(h.Length) > uint64(len(rest)):
		err = fmt.Errorf("body of %d bytes, %d are left", h.Length, len(rest))
	case h.Type == RecordItem:
		if h.Kind != 0 || h.ID != 0 || h.Offset != 0 || h.Flags&^FlagMore != 0 {
			err = errors.New("an item with fields of data")
		}
	case h.Type == RecordData:
		switch {
		case h.Flags != 0:
			err = errors.New("data with flags")
		case h.Kind == 0:
			err = errors.New("data without a kind")
		case h.Offset+uint64(h.Length) < h.Offset:
			err = errors.New("data beyond the end of the address space")
		}
	default:
		err = fmt.Errorf("unknown type %d", h.Type)
	}
	if err != nil {
		return DataHeader{}, nil, nil, fmt.Errorf("%w: %w", ErrBadRecord, err)
	}
	return h, rest[:h.Length:h.Length], rest[h.Length:], nil
}
