package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/wire"
)

// pageSize is that of every architecture this runs on so far; data of memory
// is cut at its multiples, so that the other side gets whole pages.
const pageSize = 4096

// stageLimit is how much is gathered before a chunk is sent, bytes. Data of at
// least a quarter of it is not copied into the stage.
const stageLimit = 256 << 10

// chunkWriter is the sending end of a stream as the sink sees it. What is
// written is copied before Write returns.
type chunkWriter interface {
	MaxChunk() int
	Write(ctx context.Context, parts ...[]byte) error
}

// streamSink sends a dump: Hello, facts and entries as items, ImagesDone, data,
// DataDone, StreamEnd; in a pre-copy an outline and data before the facts. The records and their order are described in wire/stream.go.
type streamSink struct {
	ctx     context.Context // of the calls that an image.Sink has no context for
	out     chunkWriter
	stage   []byte
	limit   int // of a chunk, bytes
	entries uint64
	bytes   uint64 // of data
	pages   atomic.Uint64
	early   bool // data may come before the images
	// complete is called when all entries have been given, before the reader hears of it;
	// it may be nil.
	complete func() error
	sealed   bool
}

var _ image.EarlySink = (*streamSink)(nil)

func newStreamSink(ctx context.Context, out chunkWriter) *streamSink {
	return &streamSink{ctx: ctx, out: out, limit: out.MaxChunk()}
}

// hello opens the stream for the reader and is sent at once.
func (s *streamSink) hello(h *wire.Hello) error {
	if err := s.item(&wire.Item{Item: &wire.Item_Hello{Hello: h}}); err != nil {
		return err
	}
	return s.flush()
}

// Outline implements image.EarlySink.
func (s *streamSink) Outline(o *image.Outline) error {
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("send the outline: %w", err)
	}
	s.early = true
	return s.item(&wire.Item{Item: &wire.Item_Outline{Outline: b}})
}

// File implements image.EarlySink.
func (s *streamSink) File(f *image.EarlyFile) error {
	s.early = true
	return s.item(&wire.Item{Item: &wire.Item_EarlyFile{EarlyFile: &wire.EarlyFile{Id: f.ID, Path: f.Path, MtimeNs: f.MTimeNS, Size: f.Size}}})
}

// Facts implements image.Sink.
func (s *streamSink) Facts(f *image.Facts) error {
	b, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("send the facts: %w", err)
	}
	return s.item(&wire.Item{Item: &wire.Item_Facts{Facts: b}})
}

// Entry implements image.Sink.
func (s *streamSink) Entry(e image.Entry) error {
	var m []byte
	if e.Magic != image.MagicRaw {
		var err error
		if m, err = (proto.MarshalOptions{Deterministic: true}).Marshal(e.Msg); err != nil {
			return fmt.Errorf("send image %s: %w", e.File, err)
		}
	}
	s.entries++
	return s.item(&wire.Item{Item: &wire.Item_Entry{Entry: &wire.ImageEntry{
		File: e.File, Magic: e.Magic, Message: m, Extra: e.Extra,
	}}})
}

// Sealed implements image.Sink. The other side starts to build on it.
func (s *streamSink) Sealed() error {
	if s.sealed {
		return fmt.Errorf("send the images: they were sealed twice")
	}
	if s.complete != nil {
		if err := s.complete(); err != nil {
			return err
		}
	}
	s.sealed = true
	if err := s.item(&wire.Item{Item: &wire.Item_ImagesDone{ImagesDone: &wire.ImagesDone{Entries: s.entries}}}); err != nil {
		return err
	}
	return s.flush()
}

// Data implements image.Sink.
func (s *streamSink) Data(id image.DataID, off uint64, p []byte) error {
	if !s.sealed && !s.early {
		return fmt.Errorf("send data of %s: the images are not sealed", id)
	}
	s.bytes += uint64(len(p))
	if id.Kind == image.Memory || id.Kind == image.Shmem {
		s.pages.Add(uint64(len(p) / pageSize))
	}
	for len(p) > 0 {
		room := s.limit - len(s.stage) - wire.DataHeaderLen
		n := len(p)
		if n > room {
			n = max(room, 0) &^ (pageSize - 1)
		}
		if n == 0 {
			if len(s.stage) == 0 { // the bus allows only tiny messages
				return fmt.Errorf("send data of %s: a page does not fit into a chunk of %d bytes", id, s.limit)
			}
			if err := s.flush(); err != nil {
				return err
			}
			continue
		}
		h := wire.DataHeader{Type: wire.RecordData, Kind: uint8(id.Kind), ID: id.ID, Offset: off, Length: uint32(n)}
		s.stage = h.Append(s.stage)
		if n >= stageLimit/4 {
			if err := s.write(p[:n]); err != nil {
				return err
			}
		} else {
			s.stage = append(s.stage, p[:n]...)
		}
		off += uint64(n)
		p = p[n:]
		if err := s.maybeFlush(); err != nil {
			return err
		}
	}
	return nil
}

// dataDone tells the reader that no more data comes: it can go on while it waits for
// the end.
func (s *streamSink) dataDone() error {
	if err := s.item(&wire.Item{Item: &wire.Item_DataDone{DataDone: &wire.DataDone{}}}); err != nil {
		return err
	}
	return s.flush()
}

// end sends the last item: the sums, or why there is nothing more.
func (s *streamSink) end(failed error) error {
	if err := s.item(&wire.Item{Item: &wire.Item_End{End: &wire.StreamEnd{
		DataBytes: s.bytes, Pages: s.pages.Load(), Error: wire.ErrorOf(failed),
	}}}); err != nil {
		return err
	}
	return s.flush()
}

// item puts one message into the stream, in parts if it does not fit into a chunk.
func (s *streamSink) item(it *wire.Item) error {
	b, err := proto.Marshal(it)
	if err != nil {
		return fmt.Errorf("send an item of the stream: %w", err)
	}
	for {
		room := s.limit - len(s.stage) - wire.DataHeaderLen
		n := min(len(b), room)
		if n < len(b) && len(s.stage) > 0 {
			if err := s.flush(); err != nil {
				return err
			}
			continue
		}
		h := wire.DataHeader{Type: wire.RecordItem, Length: uint32(n)}
		if n < len(b) {
			h.Flags = wire.FlagMore
		}
		s.stage = append(h.Append(s.stage), b[:n]...)
		if b = b[n:]; len(b) == 0 {
			return s.maybeFlush()
		}
	}
}

func (s *streamSink) maybeFlush() error {
	if len(s.stage) < min(stageLimit, s.limit/2) {
		return nil
	}
	return s.flush()
}

func (s *streamSink) flush() error {
	if len(s.stage) == 0 {
		return nil
	}
	return s.write()
}

// write sends what is staged and what follows it as one chunk.
func (s *streamSink) write(more ...[]byte) error {
	err := s.out.Write(s.ctx, append([][]byte{s.stage}, more...)...)
	s.stage = s.stage[:0]
	return err
}
